"""Small training recipes, and the same as plans."""

from __future__ import annotations

from typing import Any

import yaml

from cvx_core.recipe import parse
from cvx_core.spec import Spec, resolve


def text(
    parallel: list[dict[str, Any]],
    world: int,
    *,
    plan: bool = True,
    task: dict[str, Any] | None = None,
    **changes: Any,
) -> str:
    """Return a recipe whose sizes nothing divides; changes: fields of the predictor."""
    small = {"num_layers": 5, "num_heads": 3, "head_dim": 16, "latent_channels": 2, "text_dim": 12}
    sample = {"sample_height": 6, "sample_width": 10, "sample_frames": 9}
    encoder = {"num_layers": 1, "dim": 12, "num_heads": 2, "max_length": 5, "tokenizer": "bytes"}
    planned = {"use": "plan", "world": world}
    adapter, optimizer = changes.pop("adapter", None), changes.pop("optimizer", {"use": "adamw"})
    data = {
        "device": "cpu",
        "dtype": changes.pop("dtype", "float32"),
        "video": changes.pop("video", {"frames": 9, "height": 48, "width": 80}),
        "predictor": {"use": "cogvideox", **small, **sample, "text_length": 5, "temb_dim": 18, **changes},
        "text_encoder": {"use": "t5", **encoder},
        "autoencoder": {
            "use": "cogvideox-vae",
            "latent_channels": 2,
            "base_channels": 8,
            "blocks_per_level": 1,
        },
        "dataset": {"use": "synthetic", "rows": 8},
        "loader": {"batch": 4},
        "optimizer": optimizer,
        "parallel": parallel,
        "task": {**(planned if plan else {"use": "train", "steps": 1}), **(task or {})},
    }
    return yaml.safe_dump(data if adapter is None else {**data, "adapter": adapter})


def plan_of(parallel: list[dict[str, Any]], world: int, **changes: Any) -> Spec:
    """Return the spec of a plan."""
    return resolve(parse(text(parallel, world, **changes)))
