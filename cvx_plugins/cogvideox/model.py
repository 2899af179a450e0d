"""The CogVideoX transformer (Yang et al. 2024, arXiv 2408.06072), every released variant.

Text and video tokens go through the same blocks and share every weight but the modulation. Parameters have
the names they have in diffusers' CogVideoXTransformer3DModel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cvx_core.interfaces import Condition, Tokens
from cvx_plugins.cogvideox.names import FREQUENCIES, POSITIONS
from cvx_plugins.cogvideox.positions import Grid, Rope, Tables, for_text_too, rotate, sinusoid
from cvx_plugins.cogvideox.predictor_config import CogVideoXConfig

Gates = tuple[Tensor, Tensor]


def build(cfg: CogVideoXConfig, _deps: Any = None) -> CogVideoX:
    """Make the model; on the meta device it allocates nothing."""
    return CogVideoX(cfg)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v; q, k, v: (B,N,L+S,K), text first."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def run(body: Callable[[Tokens], Tokens], tokens: Tokens) -> Tokens:
    """Call a block's body."""
    return body(tokens)


def whole(tokens: Tokens) -> Tokens:
    """Keep all tokens here."""
    return tokens


class CogVideoX(nn.Module):
    """Predicts v from a noisy latent, its timestep, the text and, for image to video, the image's latent."""

    def __init__(self, cfg: CogVideoXConfig):
        super().__init__()
        self.cfg = cfg
        self.tables = Tables(cfg)
        self.patch_embed = PatchEmbed(cfg)
        self.time_embedding = TimeEmbedding(cfg.width, cfg.temb_dim)
        if cfg.ofs_dim is not None:
            self.ofs_embedding = TimeEmbedding(cfg.ofs_dim, cfg.ofs_dim)
        self.transformer_blocks = nn.ModuleDict({str(i): Block(cfg) for i in range(cfg.num_layers)})
        self.norm_final = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.norm_out = OutputNorm(cfg)
        self.proj_out = nn.Linear(cfg.width, cfg.latent_channels * (cfg.patch_t or 1) * cfg.patch**2)
        self.split: Callable[[Tokens], Tokens] = whole
        self.join: Callable[[Tokens], Tokens] = whole

    @property
    def aliases(self) -> Mapping[str, None]:
        """Tables that the model computes, and that files may hold."""
        fixed = [POSITIONS] if self.cfg.positions == "sincos" else []
        return dict.fromkeys((*fixed, *FREQUENCIES))

    @property
    def blocks(self) -> nn.ModuleDict:
        return self.transformer_blocks

    def forward(self, latent: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """Return the prediction (B,C,T,h,w) for latent (B,C,T,h,w) at timestep (B,), in the weights' dtype.

        The text's mask is not used: the models are trained to read the padding too.
        """
        tokens = self.split(self.embed(latent, timestep, cond))
        for block in self.blocks.values():
            tokens = block(tokens)
        return self.head(self.join(tokens))

    def embed(self, latent: Tensor, timestep: Tensor, cond: Condition) -> Tokens:
        """Return the tokens that enter the first block. Raises ValueError where a shape does not fit."""
        cfg, dtype = self.cfg, self.patch_embed.proj.weight.dtype
        latent = self._with_image(latent, cond.image_latent)
        temb = self.time_embedding(sinusoid(timestep, cfg.width).to(dtype))
        if cfg.ofs_dim is not None:
            ofs = torch.full((1,), cfg.ofs, device=latent.device)
            temb = temb + self.ofs_embedding(sinusoid(ofs, cfg.ofs_dim).to(dtype))
        video, text, grid = self.patch_embed(latent.to(dtype), cond.text_embeds.to(dtype))
        if (fixed := self.tables.fixed(grid, video)) is not None:
            video = video + fixed
        return Tokens(video, text, temb, self.tables.rope(grid, video.device), grid)

    def outline(self, latent: Tensor, cond: Condition) -> Tokens:
        """Return tokens as `embed` would, tables included, but without values: it uses no parameter."""
        cfg, (batch, length) = self.cfg, cond.text_embeds.shape[:2]
        grid = self.patch_embed.grid_of(latent, length)
        empty = latent.new_empty(())
        video = empty.expand(batch, math.prod(grid), cfg.width)
        text, temb = empty.expand(batch, length, cfg.width), empty.expand(batch, cfg.temb_dim)
        return Tokens(video, text, temb, self.tables.rope(grid, latent.device), grid)

    def head(self, tokens: Tokens) -> Tensor:
        """Return the prediction (B,C,T,h,w) of the tokens that left the last block."""
        video = self.proj_out(self.norm_out(self.norm_final(tokens.video), tokens.temb))
        (t, h, w), o, p = tokens.grid, self.cfg.patch_t or 1, self.cfg.patch
        pattern = "b (t h w) (c o p q) -> b c (t o) (h p) (w q)"
        return rearrange(video, pattern, t=t, h=h, w=w, o=o, p=p, q=p)

    def _with_image(self, latent: Tensor, image_latent: Tensor | None) -> Tensor:
        if (image_latent is not None) != self.cfg.image_condition:
            raise ValueError(
                f"got {'no' if image_latent is None else 'an'} image_latent, but the model has "
                f"image_condition={self.cfg.image_condition}. Only image-to-video variants take one."
            )
        return latent if image_latent is None else torch.cat((latent, image_latent.to(latent.dtype)), dim=1)

    @staticmethod
    def initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Start what adaLN-Zero (Peebles & Xie 2022, arXiv 2212.09748) starts at zero near it, at std 0.02.

        Blocks are then near the identity and the prediction near zero, but every parameter has a gradient
        from the first step, which exact zeros deny it. Time embeddings and the learned table start alike.
        """
        near_zero = ("norm1.linear", "norm2.linear", "norm_out.linear", "proj_out", "pos_embedding")
        embedding = ("time_embedding.", "ofs_embedding.")
        if name.endswith("bias") or not (
            name.startswith(embedding) or name.removesuffix(".weight").endswith(near_zero)
        ):
            return None
        return torch.randn(shape, generator=generator) * 0.02


class PatchEmbed(nn.Module):
    """Embeds latents by patches and text by tokens; adds the learned position table, where there is one."""

    def __init__(self, cfg: CogVideoXConfig):
        super().__init__()
        self.cfg = cfg
        channels = cfg.latent_channels * (2 if cfg.image_condition else 1)
        self.proj: nn.Conv2d | nn.Linear
        if cfg.patch_t is None:
            self.proj = nn.Conv2d(channels, cfg.width, cfg.patch, stride=cfg.patch)
        else:
            self.proj = nn.Linear(channels * cfg.patch_t * cfg.patch**2, cfg.width)
        self.text_proj = nn.Linear(cfg.text_dim, cfg.width)
        if cfg.positions == "rotary+learned":
            rows = cfg.text_length + math.prod(cfg.sample_grid)
            self.pos_embedding = nn.Parameter(torch.empty(1, rows, cfg.width))

    def forward(self, latent: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Grid]:
        """Return video tokens (B,S,D), text tokens (B,L,D) and the patch grid, or raise as `grid_of` does."""
        grid = self.grid_of(latent, text.shape[1])
        o, p = self.cfg.patch_t or 1, self.cfg.patch
        patches = rearrange(latent, "b c (t o) (h p) (w q) -> b (t h w) (c o p q)", o=o, p=p, q=p)
        if isinstance(self.proj, nn.Linear):
            video = self.proj(patches)
        else:  # with stride = size, a linear map of patches too; written so, tokens come out in order
            video = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        text = self.text_proj(text)
        if self.cfg.positions == "rotary+learned":
            length = text.shape[1]
            text = text + self.pos_embedding[:, :length]
            video = video + self.pos_embedding[:, length : length + video.shape[1]]
        return video, text, grid

    def grid_of(self, latent: Tensor, text_length: int) -> Grid:
        """Return the patch grid. Raises ValueError where patches or the learned table do not fit."""
        cfg, (frames, height, width) = self.cfg, latent.shape[2:]
        patch_t = cfg.patch_t or 1
        if frames % patch_t:
            raise ValueError(
                f"latent has {frames} frames, which patches of {patch_t} frames do not divide. "
                f"Put card.padding({frames}) = {-frames % patch_t} frames in front."
            )
        if height % cfg.patch or width % cfg.patch:
            raise ValueError(
                f"latent is {height}x{width}; height and width must be multiples of {cfg.patch}."
            )
        grid = (frames // patch_t, height // cfg.patch, width // cfg.patch)
        if cfg.positions == "rotary+learned":
            most, *size = cfg.sample_grid
            if list(grid[1:]) != size or grid[0] > most or text_length != cfg.text_length:
                raise ValueError(
                    f"got {frames} frames of {height}x{width} latents and {text_length} text tokens; "
                    f"the learned table is of up to {most} frames of {cfg.sample_height}x{cfg.sample_width} "
                    f"and {cfg.text_length} text tokens. Keep to them, or use a variant without such a table."
                )
        return grid


class TimeEmbedding(nn.Module):
    """Two linear layers on a sinusoid."""

    def __init__(self, width: int, temb_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, temb_dim)
        self.linear_2 = nn.Linear(temb_dim, temb_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Block(nn.Module):
    """Joint attention and a feed-forward layer over text and video, each modulated, gated and added."""

    def __init__(self, cfg: CogVideoXConfig):
        super().__init__()
        self.norm1 = Modulation(cfg)
        self.attn1 = Attention(cfg)
        self.norm2 = Modulation(cfg)
        self.ff = FeedForward(cfg.width)
        self.run: Callable[[Callable[[Tokens], Tokens], Tokens], Tokens] = run

    def forward(self, tokens: Tokens) -> Tokens:
        return self.run(self.body, tokens)

    def body(self, tokens: Tokens) -> Tokens:
        """Return the tokens with both streams updated."""
        x, gates = self.norm1(tokens)
        tokens = add_gated(tokens, gates, self.attn1(x, tokens.rope))
        x, gates = self.norm2(tokens)
        return add_gated(tokens, gates, self.ff(x))


class Modulation(nn.Module):
    """A layer norm shared by both streams, then shift and scale of each, given by the time embedding."""

    def __init__(self, cfg: CogVideoXConfig):
        super().__init__()
        self.linear = nn.Linear(cfg.temb_dim, 6 * cfg.width)
        self.norm = nn.LayerNorm(cfg.width, cfg.norm_eps)

    def forward(self, tokens: Tokens) -> tuple[Tensor, Gates]:
        """Return the normed sequence (B,L+S,D), text first, and the gates of video and text, each (B,1,D)."""
        modulation = self.linear(F.silu(tokens.temb)).chunk(6, dim=-1)
        shift, scale, gate, text_shift, text_scale, text_gate = modulation
        text, video = self.gain_bias(text_shift, text_scale), self.gain_bias(shift, scale)
        normed = []
        for sample in range(
            len(gate)
        ):  # with a gain and bias per sample, modulating costs no pass over tokens
            for x, (gain, bias) in ((tokens.text, text), (tokens.video, video)):
                normed.append(
                    F.layer_norm(x[sample], x.shape[-1:], gain[sample], bias[sample], self.norm.eps)
                )
        return torch.cat(normed).unflatten(0, (len(gate), -1)), (gate.unsqueeze(1), text_gate.unsqueeze(1))

    def gain_bias(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return w (1 + scale) and b (1 + scale) + shift, (B,D), for the norm's own weight w and bias b."""
        scale = 1 + scale
        return self.norm.weight * scale, torch.addcmul(shift, self.norm.bias, scale)


class Attention(nn.Module):
    """Full attention over text and video; queries and keys are normed per head, then rotated for video."""

    def __init__(self, cfg: CogVideoXConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.norm_q = nn.LayerNorm(cfg.head_dim, cfg.qk_norm_eps)
        self.norm_k = nn.LayerNorm(cfg.head_dim, cfg.qk_norm_eps)
        self.to_q = nn.Linear(cfg.width, cfg.width)
        self.to_k = nn.Linear(cfg.width, cfg.width)
        self.to_v = nn.Linear(cfg.width, cfg.width)
        self.to_out = nn.ModuleList([nn.Linear(cfg.width, cfg.width)])
        self.attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = attend

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        """Return what attention adds to a sequence x (B,L+S,D)."""
        out = self.attend(*self.heads(x, rope), None)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, each (B,N,L+S,K); N follows from the layers' width, which may be a shard."""
        q, k, v = (to(x).unflatten(-1, (-1, self.head_dim)) for to in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            rope = for_text_too(rope, x.shape[1])
            q, k = rotate(q, rope), rotate(k, rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleDict({"0": Gelu(width, 4 * width), "2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](self.net["0"](x))


class Gelu(nn.Module):
    """A linear layer and the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class OutputNorm(nn.Module):
    """The last layer norm, modulated by the time embedding."""

    def __init__(self, cfg: CogVideoXConfig):
        super().__init__()
        self.linear = nn.Linear(cfg.temb_dim, 2 * cfg.width)
        self.norm = nn.LayerNorm(cfg.width, cfg.out_norm_eps)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


def add_gated(tokens: Tokens, gates: Gates, x: Tensor) -> Tokens:
    """Add gate * x to both streams; x (B,L+S,D), text first; gates of video and text."""
    text, video = x.tensor_split((tokens.text.shape[1],), dim=1)
    return tokens._replace(
        video=torch.addcmul(tokens.video, gates[0], video), text=torch.addcmul(tokens.text, gates[1], text)
    )
