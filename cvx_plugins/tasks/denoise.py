"""From noise to latents: the sampling loop, with guidance. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cvx_core.errors import CvxError
from cvx_core.interfaces import Condition, Guided
from cvx_plugins.tasks import SampleConfig


@torch.no_grad()
def denoise(
    predictor: Any,
    guided: Guided,
    scheduler: Any,
    noise: Tensor,
    cond: Condition,
    uncond: Condition | None,
    config: SampleConfig,
    generators: Sequence[torch.Generator],
    on_step: Callable[[], None] = lambda: None,
    refuse: bool = True,
) -> Tensor:
    """Return latents (B,C,T,h,w) in float32.

    guided: asked where there is `uncond`; noise: (B,C,T,h,w) float32; uncond: None where the guidance scale
    is 1; generators: one per video, so that a video does not depend on the others of its batch. refuse: raise
    CvxError where a latent is no longer finite; without, it stays so to the end.
    """
    latent = noise
    timesteps = scheduler.timesteps(config.steps)
    memories: list[Any] = [None] * len(noise)
    dtype = next(predictor.parameters()).dtype
    for index, t in enumerate(timesteps):
        given = latent.to(dtype)
        timestep = torch.full((len(noise),), t, dtype=torch.int64, device=noise.device)
        if uncond is None:
            prediction = predictor(given, timestep, cond).float()
        else:
            without, within = (half.float() for half in guided(given, timestep, uncond, cond))
            weight = (
                scheduler.guidance(config.guidance, index, timesteps)
                if config.dynamic_guidance
                else config.guidance
            )
            prediction = without + weight * (within - without)
        steps = [
            scheduler.step(
                prediction[i : i + 1], index, timesteps, latent[i : i + 1], memories[i], generators[i]
            )
            for i in range(len(noise))
        ]
        latent = torch.cat([new for new, _ in steps])
        memories = [memory for _, memory in steps]
        if refuse and not torch.isfinite(latent).all():
            raise CvxError(
                f"the latent is no longer finite after step {index + 1} of {config.steps} (timestep {t}). "
                "Use dtype: bfloat16 or float32, and check the weights with `task: {use: evaluate}`."
            )
        on_step()
    return latent


def in_one_batch(predictor: Any) -> Guided:
    """Return the one-device form of guidance: both halves in one call of the predictor."""

    def guided(latent: Tensor, timestep: Tensor, uncond: Condition, cond: Condition) -> tuple[Tensor, Tensor]:
        both = predictor(torch.cat([latent, latent]), torch.cat([timestep, timestep]), _stack(uncond, cond))
        without, within = both.chunk(2)
        return without, within

    return guided


def _stack(first: Condition, second: Condition) -> Condition:
    def joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    image = joined(first.image_latent, second.image_latent)
    return Condition(
        torch.cat([first.text_embeds, second.text_embeds]),
        torch.cat([first.text_mask, second.text_mask]),
        image,
    )
