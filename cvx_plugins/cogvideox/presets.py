"""The released CogVideoX transformers: field values of the config with the card of each.

What a card leaves out follows from the fields (`CogVideoXConfig.rules`): the size step, the text's length and
width, and for the image-to-video model of 1.0, whose position table is learned, the one legal size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]

CARD_1_0: Fields = {"frames_step": 8, "frames_max": 49, "fps": 8, "snr_shift": 1.0, "latent_scale": 0.7}
CARD_1_5: Fields = {**CARD_1_0, "frames_step": 16, "frames_max": 161, "fps": 16, "dtype": "bfloat16"}
CARD_2B: Fields = {**CARD_1_0, "snr_shift": 3.0, "latent_scale": 1.15258426, "dtype": "float16"}
CARD_5B: Fields = {**CARD_1_0, "dtype": "bfloat16"}

MODEL_5B: Fields = {"num_layers": 42, "num_heads": 48, "positions": "rotary", "rope_grid": "resize"}
MODEL_1_5: Fields = {
    **MODEL_5B,
    "rope_grid": "crop",
    "patch_t": 2,
    "text_length": 224,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
}

PRESETS: Mapping[str, Fields] = {
    "cogvideox-2b": {"num_layers": 30, "num_heads": 30, "positions": "sincos", "card": CARD_2B},
    "cogvideox-5b": {**MODEL_5B, "card": CARD_5B},
    "cogvideox-5b-i2v": {
        **MODEL_5B,
        "image_condition": True,
        "positions": "rotary+learned",
        "card": {**CARD_5B, "image_latent": "scaled"},
    },
    "cogvideox-1.5-5b": {**MODEL_1_5, "card": CARD_1_5},
    "cogvideox-1.5-5b-i2v": {
        **MODEL_1_5,
        "image_condition": True,
        "ofs_dim": 512,
        "card": {**CARD_1_5, "image_latent": "divided"},
    },
}

SUMMARIES: Mapping[str, str] = {
    "cogvideox-2b": "CogVideoX-2B: text to video, 480x720, 49 frames at 8 fps",
    "cogvideox-5b": "CogVideoX-5B: text to video, 480x720, 49 frames at 8 fps",
    "cogvideox-5b-i2v": "CogVideoX-5B-I2V: image to video, 480x720 only, 49 frames at 8 fps",
    "cogvideox-1.5-5b": "CogVideoX1.5-5B: text to video, 768x1360, 81 or 161 frames at 16 fps",
    "cogvideox-1.5-5b-i2v": "CogVideoX1.5-5B-I2V: image to video, any size, 81 or 161 frames at 16 fps",
}
