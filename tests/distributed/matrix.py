"""One training step under any strategies, compared with one process: loss, every gradient, two updates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch
import yaml

from cvx_core.building import build
from cvx_core.interfaces import Features, ParamGroup, Parts, Work
from cvx_core.placing import place
from cvx_core.random import Draws, keyed
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_core.testing.training import randomise, whole
from cvx_parallel.gradients import clip
from cvx_plugins.tasks.rows import make_loader
from tests.distributed.harness import on_ranks

ROWS = 4
"""Rows of a step over all data ranks."""

VARIANTS: dict[str, dict[str, Any]] = {
    "1.0-t2v": {"positions": "rotary", "num_heads": 3},
    "2b": {"positions": "sincos", "num_heads": 4},
    "1.0-i2v": {"positions": "rotary+learned", "image_condition": True, "num_heads": 4},
    "1.5-t2v": {"patch_t": 2, "num_heads": 4},
    "1.5-i2v": {"patch_t": 2, "image_condition": True, "ofs_dim": 16, "num_heads": 3},
}


class Step(NamedTuple):
    """What a step did, whole and on the CPU. names: of all parameters on all ranks."""

    loss: float
    norm: float
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


def recipe(variant: str, parallel: list[dict[str, Any]], dtype: str, layers: int = 4) -> str:
    """Return a small training recipe; 7 x 5 x 3 patches or so: nothing divides.

    parallel: strategies, and LoRA as if it were one.
    """
    adapters = [item for item in parallel if item["use"] == "lora"]
    predictor = {
        "use": "cogvideox",
        "num_layers": layers,
        "head_dim": 16,
        "latent_channels": 2,
        "text_dim": 12,
        "text_length": 5,
        "temb_dim": 16,
        "sample_height": 6,
        "sample_width": 10,
        "sample_frames": 9,
        **VARIANTS[variant],
    }
    return yaml.safe_dump(
        {
            "device": "cpu",
            "dtype": dtype,
            "video": {"frames": 9, "height": 48, "width": 80},
            "predictor": predictor,
            "text_encoder": {
                "use": "t5",
                "num_layers": 1,
                "dim": 12,
                "num_heads": 2,
                "max_length": 5,
                "tokenizer": "bytes",
            },
            "autoencoder": {
                "use": "cogvideox-vae",
                "latent_channels": 2,
                "base_channels": 8,
                "blocks_per_level": 1,
            },
            "dataset": {"use": "synthetic", "rows": 8},
            "loader": {"batch": ROWS},
            "optimizer": {"use": "adamw", "lr": 1e-3},
            "task": {"use": "train", "steps": 2},
            "parallel": [item for item in parallel if item not in adapters],
            **({"adapter": adapters[0]} if adapters else {}),
        }
    )


def run_step(text: str, updates: int = 2, encoded: bool = False) -> Step:
    """Run `updates` training steps on this rank's share of the rows; gather everything whole.

    encoded: whether features are encoded from clips, or made up.
    """
    spec = resolve(parse(text))
    parts = place(build(spec), spec)
    randomise(parts)
    parts.predictor.train()
    optimizer = parts.make_optimizer([ParamGroup(_trainable(parts), {})])
    losses, norm, gradients = [], 0.0, {}
    works = _encoded(parts, spec) if encoded else (_share(parts, spec, n) for n in count())
    for number, (features, draws) in zip(range(updates), works, strict=False):
        parts.before_update(True)
        losses.append(float(_mean(parts.forward_backward(features, draws), parts)))
        parts.after_backward()
        if number == 0:
            gradients = {name: whole(p.grad) for name, p in _trainable(parts)}
        norm = float(clip([p for _, p in _trainable(parts)], None, parts.mesh))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    parameters = {name: whole(p) for name, p in parts.predictor.named_parameters()}
    return Step(losses[0], norm, gradients, parameters)


def run_steps(texts: list[str]) -> list[Step]:
    """Run several recipes one after the other."""
    return [run_step(text) for text in texts]


@cache
def alone(variant: str, dtype: str, layers: int, lora: str = "") -> Step:
    """Return what one process does, with LoRA of these settings, if any."""
    return run_step(recipe(variant, yaml.safe_load(lora) if lora else [], dtype, layers))


def compare(
    variant: str, parallel: list[dict[str, Any]], world: int, dtype: str = "float64", layers: int = 4
) -> None:
    """Assert that strategies on `world` ranks do what one process does."""
    compare_all([(variant, parallel)], world, dtype, layers)


def compare_all(
    cases: list[tuple[str, list[dict[str, Any]]]], world: int, dtype: str = "float64", layers: int = 4
) -> None:
    """Assert it for several variants and strategies, on the same processes one after the other."""
    texts = [recipe(variant, parallel, dtype, layers) for variant, parallel in cases]
    by_rank = on_ranks(world, run_steps, texts)
    for number, (variant, parallel) in enumerate(cases):
        try:
            lora = yaml.safe_dump([item for item in parallel if item["use"] == "lora"])
            check([steps[number] for steps in by_rank], alone(variant, dtype, layers, lora), dtype)
        except AssertionError as error:
            raise AssertionError(f"{variant} under {parallel} on {world}: {error}") from error


def check(ranks: list[Step], alone: Step, dtype: str) -> None:
    """Assert that all ranks together have what one process has, and each of them the same."""
    close = 1e-10 if dtype == "float64" else 1e-5
    assert set().union(*(rank.gradients for rank in ranks)) == alone.gradients.keys()
    assert set().union(*(rank.parameters for rank in ranks)) == alone.parameters.keys()
    # A constant added to keys changes nothing: norm_k.bias has a gradient of zero where keys are not rotated.
    least = 1e-6 * max(float(grad.abs().max()) for grad in alone.gradients.values())
    for place_, rank in enumerate(ranks):
        assert abs(rank.loss - alone.loss) <= close * abs(alone.loss), (rank.loss, alone.loss)
        assert abs(rank.norm - alone.norm) <= 1e-5 * alone.norm, (rank.norm, alone.norm)
        errors = {name: relative(grad, alone.gradients[name], least) for name, grad in rank.gradients.items()}
        wrong = {name: error for name, error in errors.items() if error > close}
        assert not wrong, f"rank {place_}: {len(wrong)} gradients differ: {dict(list(wrong.items())[:5])}"
        for name, value in rank.parameters.items():
            error = relative(value, alone.parameters[name])
            assert error <= (1e-8 if dtype == "float64" else 2e-5), f"rank {place_}: {name}: {error}"


def relative(got: torch.Tensor, expected: torch.Tensor, least: float = 1e-30) -> float:
    """Return the largest difference relative to the largest expected value, or to `least` if that is less."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(least))


def _trainable(parts: Parts) -> list[tuple[str, torch.Tensor]]:
    return [(name, p) for name, p in parts.predictor.named_parameters() if name in parts.trainable]


def _share(parts: Parts, spec: Any, number: int) -> tuple[Features, Draws]:
    """Return this rank's rows of a step that all data ranks share."""
    rank, world = parts.mesh.place("batch"), parts.mesh.size("batch")
    places = tuple(range(rank, ROWS, world))
    cfg = spec.config("predictor")
    frames = 3 + spec.card.padding(3)
    rows = []
    for place_ in places:
        generator = keyed(2, "row", number, place_)
        latent = torch.randn(cfg.latent_channels, frames, 6, 10, generator=generator)
        text = torch.randn(cfg.text_length, cfg.text_dim, generator=generator)
        rows.append((latent, text, torch.randn(latent.shape, generator=generator)))
    mask = torch.ones(len(rows), cfg.text_length, dtype=torch.bool)
    image = torch.stack([row[2] for row in rows]) if cfg.image_condition else None
    dtype = next(parts.predictor.parameters()).dtype
    features = Features(
        torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]).to(dtype), mask, image
    )
    return features, Draws(3, number, places, rank, world)


def _encoded(parts: Parts, spec: Any) -> Iterator[tuple[Features, Draws]]:
    """Yield this rank's rows of each step, read and encoded as the task does."""
    loader = make_loader(parts, spec)

    def works() -> Iterator[Work]:
        for number, (cursor, batch) in enumerate(loader.iterate()):
            places = tuple(loader.rank + i * loader.world for i in range(len(batch.rows)))
            yield Work(cursor, batch, Draws(3, number, places, loader.rank, loader.world))

    for work in parts.encode(works()):
        yield work.features, work.draws


def _mean(loss: torch.Tensor, parts: Parts) -> torch.Tensor:
    import torch.distributed as dist

    if (group := parts.mesh.group("batch")) is not None:
        dist.all_reduce(loss, group=group)
        loss = loss / parts.mesh.size("batch")
    return loss
