"""What every names table must satisfy: on a whole model it is a bijection, in names and in values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvx_core.interfaces import Deps
from cvx_core.registry import Registry
from cvx_core.testing import Suite
from cvx_core.testing.format import as_tensors

State = dict[str, Tensor]


def suite(
    name: str,
    example_state: Mapping[str, tuple[int, ...]] | None = None,
    *,
    predictor: str = "",
    autoencoder: str = "",
    **fields: Any,
) -> Suite:
    """Return the checks of the table `name` ("family:format").

    example_state: {canonical name: shape} of one model; without it, the parameters of the predictor or
    autoencoder named, made with `fields` on top of its preset. Rules act on dim 0 only, so the others are
    shrunk to 1 and a model of any size is cheap.
    """

    def table() -> Any:
        return Registry.discover().get("names", name).load()

    def state() -> State:
        kind, component = ("predictor", predictor) if predictor else ("autoencoder", autoencoder)
        return numbered(example_state or parameter_shapes(kind, component, fields))

    def forward(foreign: State) -> State:
        return dict(table().read(as_tensors(foreign)).read())

    def backward(canonical: State) -> State:
        return dict(table().write(as_tensors(canonical)).read())

    def every_tensor_has_one_place() -> None:
        canonical = state()
        foreign = backward(canonical)
        assert sum(map(torch.numel, foreign.values())) == sum(map(torch.numel, canonical.values()))
        made = [name for step in table().plan_reverse(canonical).steps for name in step.sources]
        assert sorted(made) == sorted(canonical)

    def reading_undoes_writing() -> None:
        canonical = state()
        assert_same(forward(backward(canonical)), canonical)

    def writing_undoes_reading() -> None:
        foreign = backward(state())
        assert_same(backward(forward(foreign)), foreign)

    def order_does_not_matter() -> None:
        canonical = state()
        backwards = backward(dict(reversed(canonical.items())))
        assert_same(backwards, backward(canonical))
        assert_same(forward(dict(reversed(backwards.items()))), canonical)

    def shapes_are_known_without_data() -> None:
        canonical = state()
        foreign = backward(canonical)
        assert table().plan(foreign).index(as_tensors(foreign).index) == as_tensors(canonical).index
        assert table().plan_reverse(canonical).index(as_tensors(canonical).index) == as_tensors(foreign).index

    def any_one_tensor_can_be_read_alone() -> None:
        canonical = state()
        rules, foreign = table(), as_tensors(backward(canonical))
        for key in canonical:
            assert_same(dict(rules.read(foreign).read([key])), {key: canonical[key]})

    return Suite.of(
        name,
        every_tensor_has_one_place,
        reading_undoes_writing,
        writing_undoes_reading,
        order_does_not_matter,
        shapes_are_known_without_data,
        any_one_tensor_can_be_read_alone,
    )


def parameter_shapes(kind: str, name: str, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return {parameter: shape} of a component built on meta."""
    component = Registry.discover().get(kind, name)
    assert component.config is not None
    with torch.device("meta"):
        module = component.load()(component.config(**{**component.preset, **fields}), Deps())
    return {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}


def numbered(shapes: Mapping[str, tuple[int, ...]]) -> State:
    """Return a state in which every row of every tensor has a value of its own."""
    state, start = {}, 0
    for name, shape in shapes.items():
        thin = (*shape[:1], *(1 for _ in shape[1:]))
        rows = math.prod(thin)
        state[name] = torch.arange(start, start + rows).reshape(thin)
        start += rows
    return state


def assert_same(got: State, expected: State) -> None:
    """Assert that two states have the same names, shapes and values."""
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different, f"{len(different)} tensors differ, first {different[0]!r}"
