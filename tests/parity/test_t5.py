"""The text encoder against transformers' T5EncoderModel with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cvx_core import Registry

transformers = pytest.importorskip("transformers")

SIZES = {"num_layers": 2, "dim": 48, "num_heads": 3, "head_dim": 8, "ffn_dim": 80, "max_length": 40}
PROMPTS = ["", "a cat", "a much longer prompt: \u4f60\u597d"]


def pair(dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Any, nn.Module]:
    """Return our encoder, built on meta and loaded by name, and transformers', with the same weights."""
    component = Registry.discover().get("text_encoder", "t5")
    assert component.config is not None
    config = component.config(**{**SIZES, **fields})
    torch.manual_seed(0)
    oracle = transformers.T5EncoderModel(transformers.T5Config(**config.describe())).eval()
    with torch.device("meta"):
        ours = component.load()(config, None)
    ours = ours.to_empty(device="cpu").eval()
    state = {name: p.detach() * 1.5 for name, p in oracle.named_parameters()}
    oracle.load_state_dict(state, strict=False)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(state.pop(name))
    assert not state
    return ours.to(dtype), _lower(oracle, dtype)


def _lower(oracle: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast as from_pretrained does: in float16 the feed-forward outputs stay float32."""
    for name, parameter in oracle.named_parameters():
        wide = dtype == torch.float16 and name.endswith("wo.weight")
        parameter.data = parameter.data.to(dtype).float() if wide else parameter.data.to(dtype)
    return oracle


@torch.no_grad()
def reference(oracle: nn.Module, ids: Tensor) -> Tensor:
    """Embed as the CogVideoX pipelines do: padded, without an attention mask, cast to the weights' dtype."""
    return oracle(ids)[0].to(oracle.shared.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_are_equal(dtype: torch.dtype) -> None:
    ours, oracle = pair(dtype)
    ids, _ = ours.tokenize(PROMPTS)
    with torch.no_grad():
        embeds, mask = ours.encode(PROMPTS)
    assert embeds.dtype == dtype
    torch.testing.assert_close(embeds, reference(oracle, ids), rtol=0, atol=1e-6)
    assert mask.sum(1).tolist() == [1, 6, 29]


def test_no_prompt_is_the_empty_prompt() -> None:
    ours, oracle = pair()
    with torch.no_grad():
        embeds, mask = ours.unconditional(3)
    empty = torch.zeros(1, 40, dtype=torch.int64)
    empty[:, 0] = 1
    torch.testing.assert_close(embeds, reference(oracle, empty).expand(3, -1, -1), rtol=0, atol=1e-6)
    assert mask.sum(1).tolist() == [1, 1, 1]


def test_float16_survives_what_overflows_it() -> None:
    ours, _ = pair()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("wo.weight"):
                parameter.mul_(3e4)
        full, _ = ours.encode(PROMPTS)
        half, _ = ours.to(torch.float16).encode(PROMPTS)
    assert bool(half.isfinite().all())
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)


def test_parameter_names_are_those_of_transformers() -> None:
    ours, oracle = pair()
    names = set(oracle.state_dict())
    assert {name for name, _ in ours.named_parameters()} | set(ours.aliases) == names
    assert all(target in names for target in ours.aliases.values())


@pytest.mark.parametrize("name", ["t5", "t5-xxl"])
def test_described_config_is_transformers_own(name: str) -> None:
    component = Registry.discover().get("text_encoder", name)
    assert component.config is not None
    config = component.config(**component.preset)
    described = config.describe()
    loaded = transformers.T5Config(**described)
    assert {key: getattr(loaded, key) for key in described} == described
    assert type(config).recognise(loaded.to_dict()) == type(config).recognise(described)
