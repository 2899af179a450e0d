"""recompute and compile: the same results; fewer activations kept, attention computed as often as said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from cvx_core import CvxError, RecipeError, resolve
from cvx_core.building import build
from cvx_core.placing import place
from cvx_core.recipe import parse
from tests.distributed import matrix
from tests.distributed.matrix import compare, recipe

FULL, SELECTIVE = {"use": "recompute"}, {"use": "recompute", "mode": "selective"}


OFFLOAD = {**FULL, "offload": True}


@pytest.mark.parametrize(
    "mode", [FULL, {**SELECTIVE, "every": 3}, OFFLOAD], ids=["full", "selective", "offload"]
)
@pytest.mark.parametrize("variant", ["1.0-t2v", "1.5-i2v"])
def test_alone(variant, mode):
    compare(variant, [mode], world=1)


@pytest.mark.parametrize("data", ["zero3", "ddp"])
def test_with_a_data_strategy(data):
    compare("1.5-i2v", [SELECTIVE if data == "zero3" else FULL, {"use": data}], world=2)


class _Attention(TorchDispatchMode):
    """Counts forward calls of attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "attention" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def _step(parallel: list[dict[str, Any]]) -> tuple[int, int]:
    """Return how often attention was computed in a step of 4 blocks, and the elements kept for backward."""
    spec = resolve(parse(recipe("1.0-t2v", parallel, "float32")))
    parts = place(build(spec), spec)
    features, draws = matrix._share(parts, spec, 0)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with _Attention() as attention, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        parts.forward_backward(features, draws)
    return attention.calls, sum(kept.values())


def test_full_keeps_little_and_computes_attention_again():
    (calls, kept), (again, left), (half, some) = (_step(p) for p in ([], [FULL], [{**FULL, "every": 2}]))
    assert (calls, again, half) == (4, 8, 6)
    assert left < some < kept
    assert left < kept / 3


def test_selective_keeps_what_attention_returned():
    assert _step([SELECTIVE])[0] == 4


def test_what_is_refused():
    data = yaml.safe_load(recipe("1.0-t2v", [FULL], "float32")) | {"task": {"use": "evaluate"}}
    del data["optimizer"]
    with pytest.raises(RecipeError, match="no backward pass"):
        resolve(parse(yaml.safe_dump(data)))


def test_full_is_compiled_as_a_whole_too():
    compiled = {"use": "compile", "backend": "aot_eager", "fullgraph": True}
    compare("1.0-t2v", [compiled, FULL], world=1, layers=2)


def test_dropout_drops_the_same_again():
    lora = {"use": "lora", "rank": 2, "dropout": 0.5}
    gradients = []
    for parallel in ([lora], [lora, FULL], [lora, SELECTIVE]):
        spec = resolve(parse(recipe("1.0-t2v", parallel, "float64", layers=2)))
        parts = place(build(spec), spec)
        matrix.randomise(parts)
        parts.predictor.train()
        torch.manual_seed(0)
        parts.forward_backward(*matrix._share(parts, spec, 0))
        gradients.append([p.grad for _, p in matrix._trainable(parts)])
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


def test_a_backend_that_torch_has_not_is_refused_before_anything_is_read():
    spec = resolve(parse(recipe("1.0-t2v", [{"use": "compile", "backend": "aot_eger"}], "float32", layers=1)))
    with pytest.raises(
        CvxError, match=r"torch has no 'aot_eger'\. Did you mean 'aot_eager'\? It has .*inductor"
    ):
        place(build(spec), spec)


@pytest.mark.matrix
def test_compiled_blocks():
    compare(
        "1.0-t2v", [{"use": "compile", "fullgraph": True}, SELECTIVE, {"use": "zero3"}], world=2, layers=2
    )
