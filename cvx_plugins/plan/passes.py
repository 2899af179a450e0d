"""What a microbatch takes in a stage: activations, their peak, operations. Computed on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input

from cvx_core.interfaces import Condition, Deps, Parts
from cvx_core.spec import Spec
from cvx_core.strategy import Stage
from cvx_parallel.collectives import FirstOf
from cvx_parallel.pipeline import accumulate
from cvx_plugins.plan.layout import Layout, dtype_of, module_of, predictor_of
from cvx_plugins.plan.live import Live, dropped_gradients
from cvx_plugins.plan.stand_ins import stand_in


@dataclass(frozen=True)
class Pass:
    """kept: bytes between forward and backward pass; peak: bytes at most, in either; flops: of both.

    arriving, leaving: bytes of the tokens that other stages send and get. Of a backward pass that is split,
    to_inputs, to_weights: bytes at most in either part; between: those kept from one to the other. Neither
    parameters nor their gradients are among them, nor what a kernel or a collective holds for itself; the
    copies that gloo makes of what it is given are, where the recipe says `device: cpu`.
    """

    kept: int
    peak: int
    flops: int
    arriving: int = 0
    leaving: int = 0
    to_inputs: int = 0
    between: int = 0
    to_weights: int = 0


class Passes:
    """Passes of the first rank of a layout along tp and cp, for any stage."""

    tables: int
    """Bytes that the predictor keeps from its first call on, such as tables of positions."""

    def __init__(self, layout: Layout, sample: Sample):
        self.layout, self.sample = layout, sample
        zero = layout.strategies.get("layerzero")
        self.dtype: torch.dtype = getattr(torch, getattr(zero, "param_dtype", None) or "", layout.dtype)
        self._predictor, _ = predictor_of(layout.spec, self.dtype)
        latent, condition = sample.latent(1, self.dtype)
        with torch.no_grad(), Live() as live:
            self._predictor.embed(latent, _timestep(1), condition)
        self.tables = live.now
        self.outline = self._predictor.outline(latent, condition)
        on_cpu = layout.spec.run.device == "cpu"
        groups = {axis: FirstOf(layout.size(axis), on_cpu) for axis in ("tp", "cp", "ring", "ulysses")}
        sequence = bool(getattr(layout.strategies.get("tp"), "sequence", False))
        stand_in(self._predictor, layout.plan, groups, sequence)
        parts = Parts(predictor=self._predictor, trains="predictor")
        for choice in layout.spec.parallel:
            if choice.config.stage == Stage.RUN:
                choice.build(Deps(layout.spec)).apply(parts)
        self._predictor.train()
        self._is_split = getattr(layout.strategies.get("pp"), "schedule", "") == "zero-bubble"
        self._every = int(getattr(layout.strategies.get("recompute"), "every", 1))
        self._known = sample.known.setdefault(self._depends_on(), {})

    def _depends_on(self) -> str:
        """Return what tells passes of the same sample apart; a strategy of data alone does not."""
        layout = self.layout
        spec, sizes = layout.spec, [layout.size(axis) for axis in ("tp", "cp", "ring", "ulysses")]
        modules = [spec.choices.get(section) for section in ("predictor", "adapter")]
        used = [
            choice
            for choice in spec.parallel
            if choice.config.stage == Stage.RUN or choice.name in ("tp", "cp", "pp", "layerzero")
        ]
        return repr((modules, used, sizes, layout.dtype, self.dtype, spec.run.device))

    def of(self, blocks: int, first: bool, last: bool, rows: int) -> Pass:
        """Return the pass of a stage of so many blocks; first: it embeds; last: it computes the loss.

        Blocks are alike, so that of many the first few are run, and the others take what one more takes.
        """
        key = (blocks, first, last, rows)
        if key not in self._known:
            few = 2 * self._every + blocks % self._every
            if blocks <= few + self._every:
                self._known[key] = self._run(blocks, first, last, rows)
            else:
                less, more = (self.of(n, first, last, rows) for n in (few, few + self._every))
                times = (blocks - few) // self._every
                pairs = ((a, b) for a, b in zip(_values(less), _values(more), strict=True))
                self._known[key] = Pass(*(a + (b - a) * times for a, b in pairs))
        return self._known[key]

    def _run(self, blocks: int, first: bool, last: bool, rows: int) -> Pass:
        names = list(self._predictor.blocks)[:blocks]
        live = Live(self.layout.size("ring"))
        with dropped_gradients(self._predictor), live:
            arrived = [] if first else self._arrived(rows)
            outputs = self._forward(names, arrived, last, rows)
            found = Pass(live.now, 0, 0, _bytes(arrived), 0 if last else _bytes(outputs))
            outputs = [out for out in outputs if out.requires_grad]
            grads = [torch.empty_like(out) if out.ndim else torch.ones_like(out) for out in outputs]
            if outputs and self._is_split and arrived:
                found = _split(found, live, (outputs, grads, arrived, self._weights(names, last)))
            elif outputs:
                del arrived
                torch.autograd.backward(outputs, grads)
        return replace(found, peak=live.peak, flops=live.flops)

    def _weights(self, names: Sequence[str], last: bool) -> list[Tensor]:
        """Return what is trained of a stage that is not the first."""
        plan = self.layout.plan
        modules = [f"{plan.blocks}.{name}" for name in names] + (list(plan.head) if last else [])
        inside = tuple(f"{module}." for module in modules)
        named = self._predictor.named_parameters()
        return [p for name, p in named if p.requires_grad and name.startswith(inside)]

    def _arrived(self, rows: int) -> list[Tensor]:
        """Return tokens as they come from another rank: video, text and temb."""
        outline = self._predictor.split(self._predictor.outline(*self.sample.latent(rows, self.dtype)))
        return [
            torch.empty(t.shape, dtype=self.dtype, device="meta", requires_grad=True)
            for t in (outline.video, outline.text, outline.temb)
        ]

    def _forward(
        self, names: Sequence[str], arrived: Sequence[Tensor], last: bool, rows: int
    ) -> list[Tensor]:
        """Return what a stage passes on, or the loss. arrived: what the one before did; the first embeds."""
        predictor = self._predictor
        latent, condition = self.sample.latent(rows, self.dtype)
        if arrived:
            outline = predictor.split(predictor.outline(latent, condition))
            tokens = outline._replace(video=arrived[0], text=arrived[1], temb=arrived[2])
        else:
            tokens = predictor.split(predictor.embed(latent, _timestep(rows), condition))
        for name in names:
            tokens = predictor.blocks[name](tokens)
        if not last:
            return [tokens.video, tokens.text, tokens.temb]
        prediction = predictor.head(predictor.join(tokens))
        target = torch.empty_like(prediction, dtype=torch.float32)
        error = F.mse_loss(prediction.float(), target, reduction="none")
        return [error.flatten(1).mean(1).mean()]


def _timestep(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64, device="meta")


def _values(found: Pass) -> tuple[int, ...]:
    return astuple(found)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _split(found: Pass, live: Live, given: tuple[list[Tensor], ...]) -> Pass:
    """Do a backward pass in two parts, as a pipeline does that splits them; return what both take.

    given: outputs, their gradients, inputs and weights.
    """
    outputs, grads, inputs, weights = given
    # torch's hint asks for an iterator of parameters; it takes a list of tensors.
    gradients, parts = stage_backward_input(outputs, grads, inputs, weights)  # type: ignore[arg-type]
    del gradients, outputs, grads, inputs
    to_inputs, between = live.peak, live.now
    live.peak = live.now
    accumulate(weights, parts)
    to_weights, live.peak = live.peak, max(live.peak, to_inputs)
    return replace(found, to_inputs=to_inputs, between=between, to_weights=to_weights)


class Sample:
    """The geometry of a recipe's rows, and what encoding one takes.

    known: passes of such rows that were computed, by what else they depend on, and by stage.
    """

    def __init__(self, spec: Spec):
        self._spec, self._dtype = spec, dtype_of(spec)
        self.known: dict[str, dict[tuple[int, bool, bool, int], Pass]] = {}
        self._modules = {
            section: module_of(spec, section, self._dtype)
            for section in ("text_encoder", "autoencoder")
            if section in spec.choices and section not in spec.unbuilt
        }

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Channels, frames, rows and columns of a latent, padded to whole patches."""
        video, card = self._spec.video, self._spec.card
        strides = getattr(self._modules.get("autoencoder"), "compression", (4, 8, 8))
        frames = (video.frames - 1) // strides[0] + 1
        frames += card.padding(frames)
        channels = card.latent_channels
        assert channels is not None, "the predictor's card states no latent channels"
        return channels, frames, video.height // strides[1], video.width // strides[2]

    def latent(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Condition]:
        """Return what a predictor is given, on meta."""
        card, config = self._spec.card, self._spec.config("text_encoder")
        length = card.text_length or config.max_length
        latent = torch.empty(rows, *self.shape, dtype=dtype, device="meta")
        text = torch.empty(rows, length, card.text_dim or config.dim, dtype=dtype, device="meta")
        image = torch.empty_like(latent) if card.image_latent != "none" else None
        return latent, Condition(text, torch.ones(rows, length, dtype=torch.bool, device="meta"), image)

    @property
    def autoencoder(self) -> Any:
        """The autoencoder on meta; None where the recipe has none."""
        return self._modules.get("autoencoder")

    @property
    def clips(self) -> list[tuple[int, ...]]:
        """Shapes (1,3,F,H,W) of what is encoded of a row: its video, and its first frame if given."""
        video = self._spec.video
        frames = [video.frames] if self._spec.card.image_latent == "none" else [video.frames, 1]
        return [(1, 3, count, video.height, video.width) for count in frames]

    @property
    def encoder_bytes(self) -> int:
        """Bytes of the parameters of both encoders."""
        return sum(p.nbytes for module in self._modules.values() for p in module.parameters())

    @cached_property
    def encoding(self) -> Pass:
        """What encoding the video of one row takes: nothing is kept."""
        if self.autoencoder is None:
            return Pass(0, 0, 0)
        live = Live()
        with torch.no_grad(), live:
            self.autoencoder.moments(torch.empty(self.clips[0], dtype=self._dtype, device="meta"))
        return Pass(0, live.peak, live.flops)
