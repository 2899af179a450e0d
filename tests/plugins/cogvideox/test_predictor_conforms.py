"""The transformer and its five presets, at a small size, through the conformance kit."""

from cvx_core.testing import predictor

SMALL = {"num_layers": 2, "num_heads": 3, "head_dim": 16, "latent_channels": 4, "temb_dim": 32}
TEXT = {"text_dim": 24, "text_length": 5}
SAMPLE = {"sample_height": 10, "sample_width": 6, "sample_frames": 17}

test_all = (
    predictor.suite("cogvideox", **SMALL, **TEXT)
    + predictor.suite("cogvideox-2b", **SMALL, **TEXT)
    + predictor.suite("cogvideox-5b", **SMALL, **TEXT, **SAMPLE)
    + predictor.suite("cogvideox-5b-i2v", **SMALL, **TEXT, **SAMPLE)
    + predictor.suite("cogvideox-1.5-5b", **SMALL, **TEXT)
    + predictor.suite("cogvideox-1.5-5b-i2v", **SMALL, **TEXT, ofs_dim=32)
)
