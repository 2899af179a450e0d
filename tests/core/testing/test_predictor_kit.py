"""The predictor kit passes an honest predictor and catches broken ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvx_core import Component, Config, Plan, Registry
from cvx_core.interfaces import Condition, Tokens
from cvx_core.testing import predictor

PLAN = Plan(blocks="layers", num_heads=2, attend=("layers.*",), column=("layers.*.q",), lora=("q",))


class ToyConfig(Config):
    family: ClassVar[str] = "toy"
    latent_channels: int = 4
    text_dim: int = 8

    def plan(self) -> Plan:
        return PLAN


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention
        self.run: Callable[..., Tokens] = lambda body, tokens: body(tokens)

    def forward(self, tokens: Tokens) -> Tokens:
        return self.run(self.body, tokens)

    def body(self, tokens: Tokens) -> Tokens:
        x = torch.cat((tokens.text, tokens.video + tokens.temb[:, None]), dim=1)
        q = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        mixed = self.attend(q, q, q, None).transpose(1, 2).flatten(2)
        return tokens._replace(video=tokens.video + mixed[:, tokens.text.shape[1] :])


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleDict({str(i): ToyBlock() for i in range(2)})
        self.split = self.join = lambda tokens: tokens

    @property
    def blocks(self) -> nn.ModuleDict:
        return self.layers

    def embed(self, latent: Tensor, timestep: Tensor, cond: Condition) -> Tokens:
        temb = (timestep[:, None] / torch.arange(1, 9)).sin().to(latent.dtype)
        video = self.into(latent.flatten(2).transpose(1, 2))
        return Tokens(video, cond.text_embeds, temb, None, tuple(latent.shape[2:]))

    def head(self, tokens: Tokens) -> Tensor:
        return self.out(tokens.video).transpose(1, 2).unflatten(2, tokens.grid)

    def forward(self, latent: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        tokens = self.split(self.embed(latent, timestep, cond))
        for block in self.layers.values():
            tokens = block(tokens)
        return self.head(self.join(tokens))


class WithBuffer(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(3))


class WithDeadWeight(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


class WithNumberedList(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"block{i}": ToyBlock() for i in range(2)})


class Timeless(Toy):
    def embed(self, latent: Tensor, timestep: Tensor, cond: Condition) -> Tokens:
        return super().embed(latent, torch.zeros_like(timestep), cond)


class BatchNormed(Toy):
    def head(self, tokens: Tokens) -> Tensor:
        return super().head(tokens._replace(video=tokens.video - tokens.video.mean(dim=0)))


class WithWrongOutline(Toy):
    def outline(self, latent: Tensor, cond: Condition) -> Tokens:
        empty = latent.new_empty(len(latent), 1, 8)
        return Tokens(empty, cond.text_embeds, empty[:, 0], None, tuple(latent.shape[2:]))


class WithHungryOutline(Toy):
    def outline(self, latent: Tensor, cond: Condition) -> Tokens:
        return self.embed(latent, torch.zeros(len(latent)), cond)


class Unsplit(Toy):
    def forward(self, latent: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        tokens = self.embed(latent, timestep, cond)
        for block in self.layers.values():
            tokens = block(tokens)
        return self.head(tokens)


class Remembering(Toy):
    calls = 0

    def head(self, tokens: Tokens) -> Tensor:
        self.calls += 1
        return super().head(tokens) + self.calls


BROKEN = [
    (WithBuffer, PLAN, "builds_on_meta_without_buffers"),
    (WithDeadWeight, PLAN, "a_gradient_reaches_every_parameter"),
    (WithNumberedList, PLAN, "blocks_are_a_module_dict_keyed_by_index"),
    (Timeless, PLAN, "every_condition_matters"),
    (BatchNormed, PLAN, "samples_of_a_batch_do_not_mix"),
    (WithWrongOutline, PLAN, "outline_is_embed_without_parameters"),
    (WithHungryOutline, PLAN, "outline_is_embed_without_parameters"),
    (Unsplit, PLAN, "split_and_join_stand_around_the_blocks"),
    (Remembering, PLAN, "same_input_gives_the_same_prediction"),
    (Toy, replace(PLAN, row=("layers.*.out",)), "every_pattern_of_the_plan_matches"),
    (Toy, replace(PLAN, num_heads=3), "attend_gets_whole_heads"),
    (Toy, replace(PLAN, num_heads=3), "split_layers_are_linear_and_divide_by_heads"),
]


def failures(monkeypatch: pytest.MonkeyPatch, model: type[Toy], plan: Plan) -> set[str]:
    """Return the checks of the kit that fail for a predictor."""
    component = Component("predictor", "toy", ToyConfig, f"{__name__}:build")
    monkeypatch.setattr(Component, "load", lambda self: lambda cfg, deps: model())
    monkeypatch.setattr(ToyConfig, "plan", lambda self: plan)
    monkeypatch.setattr(Registry, "discover", lambda: Registry([component]))
    failed = set()
    for name, check in predictor.suite("toy").checks.items():
        try:
            check()
        except Exception:
            failed.add(name.removeprefix("toy."))
    return failed


def test_an_honest_predictor_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(monkeypatch, Toy, PLAN) == set()


@pytest.mark.parametrize(("model", "plan", "check"), BROKEN)
def test_a_broken_predictor_is_caught(
    monkeypatch: pytest.MonkeyPatch, model: type[Toy], plan: Plan, check: Any
) -> None:
    assert check in failures(monkeypatch, model, plan)
