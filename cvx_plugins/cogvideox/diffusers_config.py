"""diffusers' config.json of a CogVideoX transformer, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cvx_core import FormatError

if TYPE_CHECKING:
    from cvx_plugins.cogvideox.predictor_config import CogVideoXConfig

CLASS_NAME = "CogVideoXTransformer3DModel"

SAME = {
    "num_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "out_channels": "latent_channels",
    "text_embed_dim": "text_dim",
    "max_text_seq_length": "text_length",
    "time_embed_dim": "temb_dim",
    "ofs_embed_dim": "ofs_dim",
    "patch_size": "patch",
    "patch_size_t": "patch_t",
    "sample_height": "sample_height",
    "sample_width": "sample_width",
    "sample_frames": "sample_frames",
    "temporal_compression_ratio": "temporal_compression",
    "spatial_interpolation_scale": "spatial_interpolation_scale",
    "temporal_interpolation_scale": "temporal_interpolation_scale",
    "norm_eps": "norm_eps",
}
"""Their key: our field, where both mean the same and have the same default."""

FIXED = {
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "attention_bias": True,
    "norm_elementwise_affine": True,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
"""What a file may choose, and every CogVideoX model has alike."""


UNSPOKEN = ("out_norm_eps", "qk_norm_eps", "ofs", "rope_grid")
"""Fields that diffusers has one value for and no key."""
OURS = "_cvx"
"""Where they stand in a file that we wrote; diffusers skips keys that begin with an underscore."""


def is_ours(foreign: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is of this model."""
    return foreign.get("_class_name") == CLASS_NAME


def fields_of(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that make our model compute what diffusers would.

    Raises FormatError where the file asks for something this model does not have.
    """
    fields = {ours: foreign[theirs] for theirs, ours in SAME.items() if theirs in foreign}
    channels, inputs = foreign.get("out_channels", 16), foreign.get("in_channels", 16)
    learned = foreign.get("use_learned_positional_embeddings", False)
    rotary = foreign.get("use_rotary_positional_embeddings", False)
    is_image_patch = foreign.get("patch_size_t") is None

    wrong = [
        (key, foreign[key], repr(legal)) for key, legal in FIXED.items() if foreign.get(key, legal) != legal
    ]
    if inputs not in (channels, 2 * channels):
        wrong.append(("in_channels", inputs, f"{channels} or {2 * channels}"))
    if is_image_patch and not foreign.get("patch_bias", True):
        wrong.append(("patch_bias", False, "True"))
    if learned and not rotary:
        wrong.append(("use_learned_positional_embeddings", True, "False without rotary positions"))
    if wrong:
        found = "; ".join(f"{key} is {value!r}, expected {legal}" for key, value, legal in wrong)
        raise FormatError(f"config.json of a {CLASS_NAME}: {found}. No CogVideoX model is like that.")

    fields["image_condition"] = inputs == 2 * channels
    fields["positions"] = "rotary+learned" if learned else "rotary" if rotary else "sincos"
    fields["rope_grid"] = "resize" if is_image_patch else "crop"
    fields["out_norm_eps"] = foreign.get("norm_eps", 1e-5)
    return {**fields, **foreign.get(OURS, {})}


def describe(config: CogVideoXConfig) -> dict[str, Any]:
    """Return the config.json of a model, with the fields that have no key there apart."""
    return {
        "_class_name": CLASS_NAME,
        **{theirs: getattr(config, ours) for theirs, ours in SAME.items()},
        **FIXED,
        "in_channels": config.latent_channels * (2 if config.image_condition else 1),
        "patch_bias": config.patch_t is None,
        "use_rotary_positional_embeddings": config.positions != "sincos",
        "use_learned_positional_embeddings": config.positions == "rotary+learned",
        "_pipeline": "CogVideoXImageToVideoPipeline" if config.image_condition else "CogVideoXPipeline",
        OURS: {name: getattr(config, name) for name in UNSPOKEN},
    }
