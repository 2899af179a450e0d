"""WaveDiT: a small video predictor that mixes tokens with attention along each axis of the clip in turn.

The whole package. What cvx needs of it: a torch-free manifest on top, and one factory that is called when a
recipe asks for the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cvx_core import Card, Component, Config, Plan, hookimpl
from cvx_io.rename import Names, Rename

if TYPE_CHECKING:
    from torch import nn


class WaveDiTConfig(Config):
    """Sizes of the model."""

    family: ClassVar[str] = "acme-wavedit"

    num_layers: int = 3
    """Blocks; block i attends along time, rows or columns as i modulo 3 is 0, 1 or 2."""
    num_heads: int = 4
    """Attention heads."""
    head_dim: int = 16
    """Width of a head."""
    latent_channels: int = 16
    """Channels of a latent."""
    text_dim: int = 4096
    """Width of a text token."""

    def plan(self) -> Plan:
        """Say where strategies find blocks, attention and the layers to split."""
        return Plan(
            blocks="layers",
            num_heads=self.num_heads,
            attend=("layers.*.attn",),
            column=("layers.*.attn.to_q", "layers.*.attn.to_k", "layers.*.attn.to_v", "layers.*.up"),
            row=("layers.*.attn.out", "layers.*.down"),
            lora=("to_q", "to_k", "to_v", "out"),
        )

    def rules(self) -> Card:
        """Say what a recipe around this model must respect."""
        return Card(frames_step=4, size_step=8, latent_channels=self.latent_channels, text_dim=self.text_dim)

    def describe(self) -> Mapping[str, Any]:
        """Return what is written as config.json beside exported weights."""
        return {"_class_name": "AcmeWaveDiT", **self.model_dump()}

    @classmethod
    def recognise(cls, foreign: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the recipe fields of such a config.json; None where it is another model's."""
        if foreign.get("_class_name") != "AcmeWaveDiT":
            return None
        return {"use": "acme-wavedit", **{k: v for k, v in foreign.items() if not k.startswith("_")}}


# The author's own training code calls a block "net.layer3"; such files are read through this table.
NATIVE = Names(rules=(Rename("net.layer{i}.{rest}", "layers.{i}.{rest}"), Rename("net.{rest}", "{rest}")))


@hookimpl
def cvx_components() -> Iterable[Component]:
    """Yield the model and its names table."""
    yield Component(
        "predictor",
        "acme-wavedit",
        WaveDiTConfig,
        "acme_wavedit:build",
        summary="axis-wise attention, one module",
    )
    yield Component("names", "acme-wavedit:acme-pack", None, "acme_wavedit:NATIVE")


def build(cfg: WaveDiTConfig, _deps: Any) -> nn.Module:
    """Return the model; torch is imported here, because a recipe asked for it."""
    from math import log

    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from cvx_core.interfaces import Condition, Tokens

    width = cfg.num_heads * cfg.head_dim

    def sinusoid(position: Tensor) -> Tensor:
        """Return (..., width): cosines and sines of a position at geometric frequencies (Vaswani et al.
        2017).
        """
        steps = torch.arange(width // 2, device=position.device)
        angle = position[..., None].float() * torch.exp(-log(10000) * steps / (width // 2))
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
            self.out = nn.Linear(width, width)
            self.attend = lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                layer(x).unflatten(-1, (-1, cfg.head_dim)).transpose(1, 2)
                for layer in (self.to_q, self.to_k, self.to_v)
            )
            return self.out(self.attend(q, k, v, None).transpose(1, 2).flatten(2))

    class Block(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.axis = index % 3
            self.norm, self.norm_up = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = Attention()
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.modulation = nn.Linear(width, 2 * width)
            self.run = lambda body, tokens: body(tokens)

        def forward(self, tokens: Tokens) -> Tokens:
            return self.run(self.body, tokens)

        def body(self, tokens: Tokens) -> Tokens:
            shift, scale = self.modulation(F.silu(tokens.temb))[:, None].chunk(2, dim=-1)
            x = tokens.video + self.mix(self.norm(tokens.video) * (1 + scale) + shift, tokens)
            return tokens._replace(video=x + self.down(F.gelu(self.up(self.norm_up(x)))))

        def mix(self, x: Tensor, tokens: Tokens) -> Tensor:
            """Attend along one axis; every line of it sees the text as well."""
            lines = x.unflatten(1, tokens.grid).movedim(1 + self.axis, 3)
            shape = lines.shape
            lines = lines.reshape(-1, *shape[3:])
            text = tokens.text.repeat_interleave(lines.shape[0] // len(x), dim=0)
            mixed = self.attn(torch.cat([text, lines], dim=1))[:, text.shape[1] :]
            return mixed.reshape(shape).movedim(3, 1 + self.axis).flatten(1, 3)

    class WaveDiT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Linear(cfg.latent_channels, width)
            self.text = nn.Linear(cfg.text_dim, width)
            self.time = nn.Linear(width, width)
            self.layers = nn.ModuleDict({str(i): Block(i) for i in range(cfg.num_layers)})
            self.norm = nn.LayerNorm(width)
            self.unpatch = nn.Linear(width, cfg.latent_channels)
            self.split = self.join = lambda tokens: tokens

        @property
        def blocks(self) -> nn.ModuleDict:
            return self.layers

        def embed(self, latent: Tensor, timestep: Tensor, cond: Condition) -> Tokens:
            _, _, frames, height, width_ = latent.shape
            video = self.patch(latent.permute(0, 2, 3, 4, 1))
            for dim, size in enumerate((frames, height, width_)):
                table = sinusoid(torch.arange(size, device=latent.device)).to(video.dtype)
                video = video + table.view(*(size if d == dim else 1 for d in range(3)), -1)
            temb = self.time(sinusoid(timestep).to(latent.dtype))
            return Tokens(
                video.flatten(1, 3), self.text(cond.text_embeds), temb, None, (frames, height, width_)
            )

        def head(self, tokens: Tokens) -> Tensor:
            return self.unpatch(self.norm(tokens.video)).unflatten(1, tokens.grid).permute(0, 4, 1, 2, 3)

        def forward(self, latent: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
            tokens = self.split(self.embed(latent, timestep, cond))
            for block in self.layers.values():
                tokens = block(tokens)
            return self.head(self.join(tokens))

    return WaveDiT()
