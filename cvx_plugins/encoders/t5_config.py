"""Fields of the T5 encoder, and their translation from and to `text_encoder/config.json`. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from cvx_core import Config, FormatError, InputPath, Problem
from cvx_core.config import Positive

XXL: Mapping[str, Any] = {
    "num_layers": 24,
    "dim": 4096,
    "num_heads": 64,
    "head_dim": 64,
    "ffn_dim": 10240,
    "vocab_size": 32128,
    "max_length": 226,
    "tokenizer": None,
}

# Field here -> key of config.json.
SAME = {
    "num_layers": "num_layers",
    "dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "ffn_dim": "d_ff",
    "vocab_size": "vocab_size",
}
# What transformers assumes where config.json is silent.
FOREIGN_DEFAULTS: Mapping[str, Any] = {
    "num_layers": 6,
    "d_model": 512,
    "num_heads": 8,
    "d_kv": 64,
    "d_ff": 2048,
    "vocab_size": 32128,
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "is_decoder": False,
    "quantization_config": None,
}
# The only value we can honour for keys that change the result and have no field here.
FIXED: Mapping[str, Any] = {
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "is_decoder": False,
    "quantization_config": None,
}
# mT5 is the same network with another vocabulary. umT5 is not: each of its layers has a position bias.
MODEL_TYPES = ("t5", "mt5")


class T5Config(Config):
    """Encoder half of T5 v1.1: gated GELU, RMS norms, one relative position bias for all layers."""

    family: ClassVar[str] = "t5"
    beside_encoding: ClassVar[tuple[str, ...]] = ("unconditional",)  # fields that change no embeddings

    num_layers: Positive = 2
    """Number of blocks."""
    dim: Positive = 64
    """Width of a token and of the embeddings returned."""
    num_heads: Positive = 4
    """Attention heads."""
    head_dim: Positive = 16
    """Width of a head; heads times width need not equal dim."""
    ffn_dim: Positive = 128
    """Width of the feed-forward layer."""
    vocab_size: Positive = 384
    """Rows of the embedding table; at least the tokenizer's number of ids."""
    max_length: Positive = 226
    """Tokens per prompt, end token included: shorter ones are padded, longer ones cut with a warning."""
    tokenizer: InputPath | Literal["bytes"] | None = "bytes"
    """Folder with `spiece.model` or `tokenizer.json`; or `bytes`: no file, for weights of your own."""
    unconditional: Literal["empty", "zeros"] = "empty"
    """What stands for no prompt: the embedding of the empty prompt (diffusers), or zeros (SAT)."""

    def check(self, spec: Any) -> Iterable[Problem]:
        """Yield a problem where no tokenizer is given: the released sizes have no default one."""
        if self.tokenizer is None:
            yield Problem(
                "tokenizer",
                "is required. Give the folder with spiece.model, `tokenizer` beside the encoder's weights; "
                "or bytes, for an encoder without released weights.",
            )

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, end token included, before any is cut. Raises FormatError."""
        from cvx_plugins.encoders.tokenizer import load_tokenizer

        if self.tokenizer is None:
            raise FormatError("text_encoder.tokenizer is missing; give the folder with spiece.model.")
        tokenize = load_tokenizer(self.tokenizer)
        return [len(tokenize(text)) for text in texts]

    @classmethod
    def recognise(cls, foreign: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return recipe fields for a transformers `config.json`, or None where it is not a T5.

        Raises FormatError for a T5 this encoder cannot compute. The tokenizer is not in the file.
        """
        if foreign.get("model_type") not in MODEL_TYPES:
            return None
        values = {**FOREIGN_DEFAULTS, **foreign}
        for key, supported in FIXED.items():
            if values[key] != supported:
                raise FormatError(
                    f"text_encoder/config.json: {key} is {values[key]!r}; "
                    f"text_encoder 't5' supports {supported!r} only."
                )
        fields = {name: values[key] for name, key in SAME.items()}
        if all(XXL[name] == value for name, value in fields.items()):
            return {"use": "t5-xxl"}
        return {"use": "t5", **fields}

    def describe(self) -> dict[str, Any]:
        """Return the transformers `config.json` of this encoder."""
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            **{key: getattr(self, name) for name, key in SAME.items()},
            **{key: value for key, value in FIXED.items() if key != "quantization_config"},
            "is_encoder_decoder": False,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }
