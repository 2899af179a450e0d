"""Building on meta, prompts that do not fit, initial values, and reading config.json."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from cvx_core import CvxError, FormatError, Registry
from cvx_core.placing import initialise
from cvx_plugins.encoders.t5_config import XXL, T5Config

# As the released pipelines have it, without keys of the decoder.
RELEASED = {
    "_name_or_path": "google/t5-v1_1-xxl",
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32128,
}


def build(name: str = "t5", **fields: Any) -> Any:
    component = Registry.discover().get("text_encoder", name)
    assert component.config is not None
    with torch.device("meta"):
        return component.load()(component.config(**{**component.preset, **fields}), None)


def ready(**fields: Any) -> Any:
    encoder = build(max_length=16, **fields).to_empty(device="cpu").eval().requires_grad_(False)
    initialise(encoder, seed=0)
    return encoder


@pytest.mark.parametrize("name", ["t5", "t5-xxl"])
def test_everything_is_on_meta_and_nothing_is_a_buffer(name: str) -> None:
    encoder = build(name, tokenizer="bytes")
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert list(encoder.buffers()) == []


def test_released_size_has_its_number_of_parameters() -> None:
    encoder = build("t5-xxl", tokenizer="bytes")
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 4_762_310_656


def test_embedding_table_is_one_parameter_before_and_after_placing() -> None:
    for encoder in (build(), ready()):
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
        names = [name for name, _ in encoder.named_parameters()]
        assert names.count("shared.weight") == 1
        assert not any("embed_tokens" in name for name in names)


def test_long_prompt_is_cut_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    encoder, prompt = ready(), "twenty-one characters"
    with caplog.at_level(logging.WARNING, logger="cvx"):
        ids, mask = encoder.tokenize([prompt, "short"])
        encoder.tokenize([prompt])
    assert ids[0].tolist() == [ord(c) + 3 for c in prompt[:15]] + [1]
    assert mask.sum(1).tolist() == [16, 6]
    assert [record.getMessage() for record in caplog.records] == [
        "prompt of 22 tokens cut to max_length 16: 'twenty-one characters'"
    ]


def test_prompt_that_just_fits_is_not_cut(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="cvx"):
        ids, _ = ready().tokenize(["x" * 15])
    assert ids[0].tolist() == [ord("x") + 3] * 15 + [1]
    assert not caplog.records


@pytest.mark.parametrize(
    ("prompts", "message"), [("text", "list of prompts"), (["a", None], "prompt 1 is None")]
)
def test_what_is_not_text_is_refused(prompts: Any, message: str) -> None:
    with pytest.raises(CvxError, match=message):
        ready().encode(prompts)


def test_untrained_encoder_tells_prompts_apart() -> None:
    embeds, _ = ready().encode(["a red ball", "a blue cube", ""])
    assert bool(embeds.isfinite().all())
    assert 0.3 < float(embeds.std()) < 3
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert float((embeds[first] - embeds[second]).abs().mean()) > 0.1


def test_a_prompt_embeds_alike_alone_and_in_a_batch() -> None:
    encoder = ready()
    together, mask = encoder.encode(["one", "another"])
    alone, own_mask = encoder.encode(["another"])
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-6)
    assert torch.equal(mask[1:], own_mask)
    assert together.shape == (2, 16, 64)


def test_zeros_stand_for_no_prompt_where_asked() -> None:
    embeds, mask = ready(unconditional="zeros").unconditional(2)
    assert torch.equal(embeds, torch.zeros(2, 16, 64))
    assert mask.sum(1).tolist() == [1, 1]


def test_no_prompts_give_an_empty_batch() -> None:
    ids, mask = ready().tokenize([])
    assert ids.shape == mask.shape == (0, 16)


def test_tokenizer_larger_than_the_vocabulary_is_refused(bare_folder: Path) -> None:
    with pytest.raises(CvxError, match="vocab_size is 100"):
        build(tokenizer=bare_folder, vocab_size=100)


def test_released_size_needs_a_tokenizer() -> None:
    (problem,) = T5Config(**XXL).check(None)
    assert problem.path == "tokenizer"
    assert list(T5Config().check(None)) == []
    with pytest.raises(CvxError, match="no tokenizer"):
        build("t5-xxl")


def test_released_config_names_the_preset() -> None:
    assert T5Config.recognise(RELEASED) == {"use": "t5-xxl"}
    assert T5Config.recognise({**RELEASED, "num_layers": 2}) == {
        "use": "t5",
        "num_layers": 2,
        "dim": 4096,
        "num_heads": 64,
        "head_dim": 64,
        "ffn_dim": 10240,
        "vocab_size": 32128,
    }


@pytest.mark.parametrize("foreign", [{}, {"model_type": "umt5"}, {"_class_name": "AutoencoderKL"}])
def test_other_models_are_not_recognised(foreign: dict[str, Any]) -> None:
    assert T5Config.recognise(foreign) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("feed_forward_proj", "relu"),
        ("relative_attention_num_buckets", 64),
        ("relative_attention_max_distance", 256),
        ("layer_norm_epsilon", 1e-5),
        ("is_decoder", True),
        ("quantization_config", {"load_in_8bit": True}),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(FormatError, match=key):
        T5Config.recognise({**RELEASED, key: value})


def test_description_is_recognised() -> None:
    config = T5Config(num_layers=3, dim=40, num_heads=5, head_dim=7, ffn_dim=31, vocab_size=300)
    fields = T5Config.recognise(config.describe())
    assert fields is not None
    assert fields.pop("use") == "t5"
    assert T5Config(**fields) == config
