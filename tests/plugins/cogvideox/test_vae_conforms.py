"""The autoencoder, at a small size and in each way of coding, through the conformance kit."""

from cvx_core.testing import autoencoder

SMALL = {"base_channels": 4, "channel_multipliers": (1, 2, 2, 3), "blocks_per_level": 1, "latent_channels": 4}
WHOLE = {"encode": "whole", "decode": "whole"}
LATER = {
    "encode": "whole",
    "encode_first_frame": "alone",
    "decode": "balanced",
    "decode_first_frame": "alone",
}
TILES = {"tile": {"height": 16, "width": 16, "overlap": 0.5}, "slicing": True}

test_chunked = autoencoder.suite("cogvideox-vae", **SMALL)
test_whole = autoencoder.suite("cogvideox-vae", **SMALL, **WHOLE)
test_later = autoencoder.suite("cogvideox-vae", **SMALL, **LATER)
test_tiles = autoencoder.suite("cogvideox-vae", **SMALL, **TILES)
