"""The transformer against diffusers' CogVideoXTransformer3DModel: same weights, same latent, same tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Size, Step, fill
from cvx_core.interfaces import Condition
from cvx_core.registry import Registry

PRESETS = ("cogvideox-2b", "cogvideox-5b", "cogvideox-1.5-5b")
SMALL = {"num_layers": 4, "num_heads": 8, "text_dim": 256, "text_length": 64, "temb_dim": 256}
FULL = {"num_layers": 2}
"""Two blocks of the full width: a block's cost does not depend on how many there are."""
LATENT = {"small": (1, 16, 4, 16, 24), "full": (1, 16, 14, 60, 90)}
CPU_LATENT = {"small": LATENT["small"], "full": (1, 16, 2, 16, 22)}


@dataclass(frozen=True)
class Work:
    """One model and input, to be built on either side."""

    preset: str
    device: str
    size: Size
    backward: bool

    def config(self) -> Any:
        component = Registry.discover().get("predictor", self.preset)
        assert component.config is not None
        fields = {**(SMALL if self.size == "small" else FULL), "out_norm_eps": 1e-5, "card": {}}
        return component.config(**{**component.preset, **fields})

    def ours(self) -> Step:
        component = Registry.discover().get("predictor", self.preset)
        model = self._placed(component.load()(self.config(), None))
        latent, timestep, text = self._inputs()
        cond = Condition(text, torch.ones(text.shape[:2], dtype=torch.bool, device=self.device))
        return self._step(model, lambda: model(latent, timestep, cond))

    def theirs(self) -> Step:
        from diffusers import CogVideoXTransformer3DModel
        from diffusers.utils import logging

        logging.set_verbosity_error()
        config = self.config()
        model = self._placed(CogVideoXTransformer3DModel.from_config(config.describe()))
        latent, timestep, text = self._inputs()
        frames_first = latent.transpose(1, 2).contiguous()
        rope = _rope(config, latent)

        def predict() -> Tensor:
            output = model(frames_first, text, timestep, image_rotary_emb=rope, return_dict=False)[0]
            return output.transpose(1, 2)

        return self._step(model, predict)

    def _step(self, model: nn.Module, predict: Callable[[], Tensor]) -> Step:
        def forward() -> Tensor:
            with torch.no_grad():
                return predict()

        def forward_backward() -> Tensor:
            output = predict()
            output.float().square().mean().backward()
            model.zero_grad(set_to_none=True)
            return output.detach()

        return forward_backward if self.backward else forward

    def _placed(self, model: nn.Module) -> nn.Module:
        return fill(model).to(self.device, self._dtype()).train(self.backward)

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        config = self.config()
        shapes = CPU_LATENT if self.device == "cpu" else LATENT
        latent = torch.randn(shapes[self.size], generator=generator)
        text = torch.randn(1, config.text_length, config.text_dim, generator=generator)
        like = torch.empty(0, device=self.device, dtype=self._dtype())
        return latent.to(like), torch.tensor([500], device=self.device), text.to(like)

    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def _rope(config: Any, latent: Tensor) -> Any:
    """Return the tables that diffusers' pipelines hand to their model, at the sizes used here."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    if config.positions == "sincos":
        return None
    frames, *size = latent.shape[2:]
    grid = tuple(length // config.patch for length in size)
    base = tuple(length // config.patch for length in (config.sample_height, config.sample_width))
    if config.patch_t is not None:
        frames = frames // config.patch_t
        return get_3d_rotary_pos_embed(
            config.head_dim, None, grid, frames, grid_type="slice", max_size=base, device=latent.device
        )
    region = get_resize_crop_region_for_grid(grid, base[1], base[0])
    return get_3d_rotary_pos_embed(config.head_dim, region, grid, frames, device=latent.device)


def cases(device: str, size: Size) -> Iterable[Case]:
    """Yield forward, and forward with backward, of each kind of model."""
    for preset in PRESETS:
        for backward in (False, True):
            work = Work(preset, device, size, backward)
            name = f"dit-{'train' if backward else 'forward'}-{preset.removeprefix('cogvideox-')}"
            tolerance = 1e-4 if device == "cpu" else 1e-1
            yield Case(name, work.ours, work.theirs, tolerance)
