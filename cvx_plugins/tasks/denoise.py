"""From noise to latents: the sampling loop, with guidance. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cvx_core.errors import CvxError
from cvx_core.interfaces import Condition
from cvx_plugins.tasks import SampleConfig


@torch.no_grad()
def denoise(
    predictor: Any,
    scheduler: Any,
    noise: Tensor,
    cond: Condition,
    uncond: Condition | None,
    config: SampleConfig,
    generators: Sequence[torch.Generator],
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return latents (B,C,T,h,w) in float32.

    noise: (B,C,T,h,w) float32; uncond: None where the guidance scale is 1; generators: one per video, so that
    a video does not depend on the others of its batch. Raises CvxError where a latent is no longer finite.
    """
    latent = noise
    timesteps = scheduler.timesteps(config.steps)
    memories: list[Any] = [None] * len(noise)
    both = _stack(uncond, cond) if uncond is not None else cond
    dtype = next(predictor.parameters()).dtype
    for index, t in enumerate(timesteps):
        prediction = _predict(predictor, latent.to(dtype), t, both, guided=uncond is not None)
        if uncond is not None:
            weight = (
                scheduler.guidance(config.guidance, index, timesteps)
                if config.dynamic_guidance
                else config.guidance
            )
            without, within = prediction.chunk(2)
            prediction = without + weight * (within - without)
        steps = [
            scheduler.step(
                prediction[i : i + 1], index, timesteps, latent[i : i + 1], memories[i], generators[i]
            )
            for i in range(len(noise))
        ]
        latent = torch.cat([new for new, _ in steps])
        memories = [memory for _, memory in steps]
        if not torch.isfinite(latent).all():
            raise CvxError(
                f"the latent is no longer finite after step {index + 1} of {config.steps} (timestep {t}). "
                "Use dtype: bfloat16 or float32, and check the weights with `task: {use: evaluate}`."
            )
        on_step()
    return latent


def _predict(predictor: Any, latent: Tensor, t: int, cond: Condition, guided: bool) -> Tensor:
    """Return the prediction in float32, of the unconditional and the conditional half where guided."""
    inputs = torch.cat([latent, latent]) if guided else latent
    timestep = torch.full((len(inputs),), t, dtype=torch.int64, device=latent.device)
    result: Tensor = predictor(inputs, timestep, cond).float()
    return result


def _stack(first: Condition, second: Condition) -> Condition:
    def joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    image = joined(first.image_latent, second.image_latent)
    return Condition(
        torch.cat([first.text_embeds, second.text_embeds]),
        torch.cat([first.text_mask, second.text_mask]),
        image,
    )
