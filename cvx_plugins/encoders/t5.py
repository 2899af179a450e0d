"""The T5 text encoder: tokenizer, transformers' encoder stack, and CogVideoX's conventions around them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvx_core import CvxError
from cvx_plugins.encoders.t5_config import T5Config
from cvx_plugins.encoders.tokenizer import END, PAD, Tokenizer, load_tokenizer

log = logging.getLogger("cvx")


class WideLinear(nn.Linear):
    """A linear layer that computes float16 weights in float32 and returns float32.

    T5's feed-forward outputs pass float16's 65504. The wide output also makes the residual stream float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map (...,in) to (...,out)."""
        if self.weight.dtype != torch.float16:
            return super().forward(input)
        return F.linear(input.float(), self.weight.float())


class T5(nn.Module):
    """Prompts to embeddings.

    Parameters are named as in transformers' T5EncoderModel, the embedding table once. As in CogVideoX the
    encoder gets no attention mask: padding is attended to, and the mask returned is for consumers.
    """

    aliases: ClassVar[Mapping[str, str]] = {"encoder.embed_tokens.weight": "shared.weight"}

    def __init__(self, cfg: T5Config, tokenizer: Tokenizer):
        """Make the network. Raises CvxError where the tokenizer has more ids than vocab_size."""
        super().__init__()
        if tokenizer.size > cfg.vocab_size:
            raise CvxError(
                f"text_encoder: tokenizer {str(cfg.tokenizer)!r} has {tokenizer.size} ids, but vocab_size is "
                f"{cfg.vocab_size}. Raise vocab_size, or give the tokenizer these weights were trained with."
            )
        self.cfg, self.tokenizer = cfg, tokenizer
        self.shared, self.encoder = _network(cfg)
        self._cut_prompts: set[str] = set()

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings (B,L,D) in the weights' dtype and the mask (B,L) of real tokens, L = max_length.

        A prompt that is too long is cut, with a warning the first time. Raises CvxError for a prompt that is
        not text.
        """
        ids, mask = self.tokenize(prompts)
        device = self.shared.weight.device
        return self(ids.to(device)), mask.to(device)

    def unconditional(self, count: int) -> tuple[Tensor, Tensor]:
        """Return what stands for "no prompt", `count` times; zeros keep the empty prompt's mask."""
        if self.cfg.unconditional == "empty":
            embeds, mask = self.encode([""])
            return embeds.expand(count, -1, -1), mask.expand(count, -1)
        weight = self.shared.weight
        mask = self.tokenize([""])[1].to(weight.device).expand(count, -1)
        return weight.new_zeros(count, self.cfg.max_length, self.cfg.dim), mask

    def forward(self, ids: Tensor) -> Tensor:
        """Embed token ids (B,L) int64 as (B,L,D)."""
        states: Tensor = self.encoder(input_ids=ids).last_hidden_state
        return states.to(self.shared.weight.dtype)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids (B,L) int64, padded to max_length, and the mask of real tokens, on the CPU."""
        if isinstance(prompts, str):
            raise CvxError(
                f"text_encoder: got the text {prompts!r}; expected a list of prompts, [{prompts!r}]."
            )
        rows = [self._ids(index, prompt) for index, prompt in enumerate(prompts)]
        length = self.cfg.max_length
        padded = [row + [PAD] * (length - len(row)) for row in rows]
        ids = torch.tensor(padded, dtype=torch.int64, device="cpu").view(len(rows), length)
        lengths = torch.tensor([len(row) for row in rows], device="cpu")
        return ids, torch.arange(length, device="cpu") < lengths[:, None]

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Draw T5's initial values, under which even an untrained encoder tells prompts apart.

        Source: Raffel et al. 2020, mesh-tensorflow: queries absorb the scale of the dot product.
        """
        if len(shape) < 2:
            return None
        std = shape[1] ** -0.5
        if name == "shared.weight":
            std = 1.0
        elif name.endswith("relative_attention_bias.weight"):
            std = self.cfg.dim**-0.5
        elif name.endswith("SelfAttention.q.weight"):
            std *= self.cfg.head_dim**-0.5
        return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)

    def _ids(self, index: int, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise CvxError(f"text_encoder: prompt {index} is {prompt!r}; expected text, '' for no prompt.")
        ids, length = self.tokenizer(prompt), self.cfg.max_length
        if len(ids) <= length:
            return ids
        if prompt not in self._cut_prompts:
            self._cut_prompts.add(prompt)
            log.warning("prompt of %d tokens cut to max_length %d: %r", len(ids), length, prompt)
        return [*ids[: length - 1], END]


def _network(cfg: T5Config) -> tuple[nn.Embedding, nn.Module]:
    """Return the embedding table and transformers' encoder stack, which share one embedding module."""
    from transformers import T5Config as ForeignConfig
    from transformers import T5EncoderModel

    model: Any = T5EncoderModel(ForeignConfig(**cfg.describe()))
    model.encoder.set_input_embeddings(model.shared)
    for block in model.encoder.block:
        feed_forward = block.layer[-1].DenseReluDense
        feed_forward.wo = WideLinear(cfg.ffn_dim, cfg.dim, bias=False)
    return model.shared, model.encoder


def build(cfg: T5Config, _deps: Any) -> T5:
    """Make the encoder of a config.

    Raises CvxError without a tokenizer, FormatError where it cannot be read.
    """
    if cfg.tokenizer is None:
        raise CvxError(
            "text_encoder: no tokenizer. Set tokenizer to a folder with spiece.model, or to bytes."
        )
    return T5(cfg, load_tokenizer(cfg.tokenizer))
