"""What every predictor must satisfy: shapes, slots, a plan that matches its modules, and no hidden state.

Give fields that make the model small. Sizes of the inputs follow from the config's `rules()`, where it has
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from cvx_core.card import Card
from cvx_core.interfaces import Condition, Plan, Tokens
from cvx_core.placing import initialise
from cvx_core.registry import Registry
from cvx_core.testing import Suite

STRIDE = 8
"""Pixels per latent, for cards that list sizes."""


@dataclass(frozen=True)
class Subject:
    """A predictor under test: its config, and how to make it and inputs for it."""

    name: str
    fields: dict[str, Any]

    @property
    def config(self) -> Any:
        component = Registry.discover().get("predictor", self.name)
        assert component.config is not None, f"predictor {self.name!r} has no config"
        return component.config(**{**component.preset, **self.fields})

    @property
    def plan(self) -> Plan:
        return self.config.plan()

    @property
    def rules(self) -> Card:
        rules = getattr(self.config, "rules", None)
        return rules() if rules is not None else Card()

    def on_meta(self) -> Any:
        """Build the module as the core does."""
        with torch.device("meta"):
            return Registry.discover().get("predictor", self.name).load()(self.config, None)

    def make(self, seed: int = 0) -> Any:
        """Build the module with weights drawn from a seed."""
        module = self.on_meta().to_empty(device="cpu")
        initialise(module, seed)
        return module

    def inputs(self, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Condition]:
        """Return a latent that is higher than wide, where the card leaves the choice, its timesteps and
        condition."""
        rules, generator = self.rules, torch.Generator().manual_seed(seed)
        channels = rules.latent_channels or self.config.latent_channels
        text_dim = rules.text_dim or self.config.text_dim
        unit = max(rules.size_step // STRIDE, 1)
        height, width = (n // STRIDE for n in rules.sizes[0]) if rules.sizes else (5 * unit, 3 * unit)
        shape = (batch, channels, 2 * rules.patch_t, height, width)
        text = torch.randn(batch, rules.text_length or 7, text_dim, generator=generator)
        image = torch.randn(shape, generator=generator) if rules.image_latent != "none" else None
        latent = torch.randn(shape, generator=generator)
        timestep = torch.tensor([999, 20, 500, 0])[:batch]
        return latent, timestep, Condition(text, torch.ones(text.shape[:2], dtype=torch.bool), image)


def suite(name: str, **fields: Any) -> Suite:
    """Return the checks of predictor `name`, made with `fields` on top of its preset."""
    subject = Subject(name, fields)
    checks = (*_building(subject), *_predicting(subject), *_slots(subject), *_planning(subject))
    return Suite.of(name, *checks)


def _building(subject: Subject) -> tuple[Callable[[], None], ...]:
    def config_constructs_bare() -> None:
        type(subject.config)()

    def builds_on_meta_without_buffers() -> None:
        module = subject.on_meta()
        real = [name for name, p in module.named_parameters() if not p.is_meta]
        assert not real, f"allocated on a real device: {real}"
        buffers = [name for name, _ in module.named_buffers()]
        assert not buffers, f"buffers get no memory: {buffers}; compute tables when they are used"

    def weights_depend_on_the_seed_alone() -> None:
        one, same, other = (subject.make(seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert any(not torch.equal(one[key], other[key]) for key in one)
        assert all(bool(value.isfinite().all()) for value in one.values())

    def blocks_are_a_module_dict_keyed_by_index() -> None:
        module = subject.on_meta()
        assert isinstance(module.blocks, nn.ModuleDict)
        assert list(module.blocks) == [str(i) for i in range(len(module.blocks))]
        assert module.get_submodule(subject.plan.blocks) is module.blocks

    def config_survives_its_own_description() -> None:
        config: Any = subject.config
        if hasattr(config, "describe"):
            fields = type(config).recognise(config.describe())
            assert fields is not None, "recognise() does not know what describe() writes"
            component = Registry.discover().get("predictor", fields["use"])
            assert component.config is not None
            rest = {key: value for key, value in fields.items() if key != "use"}
            found: Any = component.config(**{**component.preset, **rest})
            assert found.describe() == config.describe()

    return (
        config_constructs_bare,
        builds_on_meta_without_buffers,
        weights_depend_on_the_seed_alone,
        blocks_are_a_module_dict_keyed_by_index,
        config_survives_its_own_description,
    )


def _predicting(subject: Subject) -> tuple[Callable[[], None], ...]:
    def prediction_has_the_shape_of_the_latent() -> None:
        module = subject.make()
        for batch in (1, 3):
            inputs = subject.inputs(batch)
            prediction = module(*inputs)
            assert (prediction.shape, prediction.dtype) == (inputs[0].shape, torch.float32)
            assert bool(prediction.isfinite().all())

    def half_precision_weights_give_a_half_precision_prediction() -> None:
        prediction = subject.make().bfloat16()(*_cast(subject.inputs(), torch.bfloat16))
        assert prediction.dtype == torch.bfloat16
        assert bool(prediction.isfinite().all())

    def same_input_gives_the_same_prediction() -> None:
        module, inputs = subject.make(), subject.inputs()
        first = module(*inputs)
        module(*subject.inputs(batch=1, seed=2))
        assert torch.equal(module(*inputs), first)

    def samples_of_a_batch_do_not_mix() -> None:
        module, (latent, timestep, cond) = subject.make(), subject.inputs()
        both = module(latent, timestep, cond)
        image = None if cond.image_latent is None else cond.image_latent[1:]
        alone = module(latent[1:], timestep[1:], Condition(cond.text_embeds[1:], cond.text_mask[1:], image))
        torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)

    def every_condition_matters() -> None:
        module, (latent, timestep, cond) = subject.make(), subject.inputs()
        base = module(latent, timestep, cond)
        others = {"timestep": ((timestep + 7) % 1000, cond)}
        others["text"] = (timestep, cond._replace(text_embeds=-cond.text_embeds))
        if cond.image_latent is not None:
            others["image"] = (timestep, cond._replace(image_latent=-cond.image_latent))
        for what, (t, c) in others.items():
            assert not torch.equal(module(latent, t, c), base), f"the prediction ignores the {what}"

    def a_gradient_reaches_every_parameter() -> None:
        module = subject.make()
        module(*subject.inputs()).square().mean().backward()
        without = [name for name, p in module.named_parameters() if p.grad is None]
        assert not without, f"no gradient: {without}"
        assert all(bool(p.grad.isfinite().all()) for p in module.parameters())

    return (
        prediction_has_the_shape_of_the_latent,
        half_precision_weights_give_a_half_precision_prediction,
        same_input_gives_the_same_prediction,
        samples_of_a_batch_do_not_mix,
        every_condition_matters,
        a_gradient_reaches_every_parameter,
    )


def _slots(subject: Subject) -> tuple[Callable[[], None], ...]:
    def forward_is_embed_blocks_head() -> None:
        module, inputs = subject.make(), subject.inputs()
        tokens = module.embed(*inputs)
        for block in module.blocks.values():
            tokens = block(tokens)
        assert torch.equal(module.head(tokens), module(*inputs))

    def tokens_have_the_promised_shapes() -> None:
        module, (latent, timestep, cond) = subject.make(), subject.inputs()
        tokens = module.embed(latent, timestep, cond)
        frames, rows, columns = tokens.grid
        assert tokens.video.shape[:2] == (len(latent), frames * rows * columns)
        assert tokens.text.shape[:2] == cond.text_embeds.shape[:2]
        assert tokens.temb.shape[0] == len(latent)
        for table in tokens.rope or ():
            assert (table.shape[0], table.dtype) == (tokens.video.shape[1], torch.float32)

    def outline_is_embed_without_parameters() -> None:
        """Only a predictor that has one can be cut into stages."""
        module, (latent, timestep, cond) = subject.make(), subject.inputs()
        if not hasattr(module, "outline"):
            return
        tokens = module.embed(latent, timestep, cond)
        for part in module.modules():
            for name, _ in list(part.named_parameters(recurse=False)):
                part.register_parameter(name, None)
        outline = module.outline(latent, cond)
        for got, expected in zip(outline[:3], tokens[:3], strict=True):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert outline.grid == tokens.grid
        for got, expected in zip(outline.rope or (), tokens.rope or (), strict=True):
            assert torch.equal(got, expected)

    def split_and_join_stand_around_the_blocks() -> None:
        module, inputs, seen = subject.make(), subject.inputs(), []
        expected = module(*inputs)

        def note(step: str) -> Callable[[Tokens], Tokens]:
            def slot(tokens: Tokens) -> Tokens:
                seen.append(step)
                return tokens

            return slot

        module.split, module.join = note("split"), note("join")
        for key, block in module.blocks.items():
            block.run = _noting(seen, key)
        assert torch.equal(module(*inputs), expected)
        assert seen == ["split", *module.blocks, "join"]

    def attend_gets_whole_heads() -> None:
        module, plan, shapes = subject.make(), subject.plan, []
        for owner in _matching(module, plan.attend).values():
            inner = owner.attend

            def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, inner: Any = inner) -> Tensor:
                shapes.append((q.shape[1], q.shape[-1], k.shape[-1]))
                return inner(q, k, v, mask)

            owner.attend = attend
        module(*subject.inputs())
        assert shapes, "plan.attend names no module whose `attend` is called"
        assert {heads for heads, *_ in shapes} == {plan.num_heads}
        assert all(q == k for _, q, k in shapes)

    return (
        forward_is_embed_blocks_head,
        tokens_have_the_promised_shapes,
        outline_is_embed_without_parameters,
        split_and_join_stand_around_the_blocks,
        attend_gets_whole_heads,
    )


def _planning(subject: Subject) -> tuple[Callable[[], None], ...]:
    def every_pattern_of_the_plan_matches() -> None:
        module, plan = subject.on_meta(), subject.plan
        for pattern in (*plan.attend, *plan.column, *plan.row, *plan.head):
            assert _matching(module, (pattern,)), f"plan: {pattern!r} matches no module"
        for target in plan.lora:
            ends = [name for name, _ in module.named_modules() if f".{name}".endswith(f".{target}")]
            assert ends or _matching(module, (target,)), f"plan.lora: {target!r} matches no module"

    def split_layers_are_linear_and_divide_by_heads() -> None:
        module, plan = subject.on_meta(), subject.plan
        for pattern, width in zip(plan.row, plan.row_widths, strict=bool(plan.row_widths)):
            widths = {layer.weight.shape[1] for layer in _matching(module, (pattern,)).values()}
            assert widths == {width}, f"plan.row_widths: {pattern!r} has {widths} inputs, not {width}"
        for patterns, dim in ((plan.column, 0), (plan.row, 1)):
            for name, layer in _matching(module, patterns).items():
                assert isinstance(layer, nn.Linear), f"plan: {name!r} is a {type(layer).__name__}"
                assert layer.weight.shape[dim] % plan.num_heads == 0, f"plan: {name!r} splits a head"

    return every_pattern_of_the_plan_matches, split_layers_are_linear_and_divide_by_heads


def _noting(seen: list[str], key: str) -> Callable[[Callable[[Tokens], Tokens], Tokens], Tokens]:
    def run(body: Callable[[Tokens], Tokens], tokens: Tokens) -> Tokens:
        seen.append(key)
        return body(tokens)

    return run


def _matching(module: nn.Module, patterns: tuple[str, ...]) -> dict[str, Any]:
    """Return the modules whose name matches a pattern; * stands for one component."""
    return {
        name: found
        for name, found in module.named_modules()
        for pattern in patterns
        if name.count(".") == pattern.count(".") and fnmatchcase(name, pattern)
    }


def _cast(inputs: tuple[Tensor, Tensor, Condition], dtype: torch.dtype) -> tuple[Tensor, Tensor, Condition]:
    latent, timestep, cond = inputs
    image = None if cond.image_latent is None else cond.image_latent.to(dtype)
    return latent.to(dtype), timestep, Condition(cond.text_embeds.to(dtype), cond.text_mask, image)
