"""The optimisation loop: accumulate, clip, step, log, save, resume. Knows neither model nor loss."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from cvx_core import device as devices
from cvx_core.errors import CvxError
from cvx_core.interfaces import ParamGroup, Parts, Work
from cvx_core.random import Draws, keyed
from cvx_core.spec import Spec
from cvx_io import resume
from cvx_io.loader import Cursor, Loader
from cvx_io.progress import progress
from cvx_io.saver import Saver
from cvx_parallel.gradients import clip
from cvx_plugins.tasks import LoopConfig, checkpoint
from cvx_plugins.tasks.ema import Ema
from cvx_plugins.tasks.record import Record, write_facts
from cvx_plugins.tasks.schedule import lr_scale

log = logging.getLogger("cvx")
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # names, so that another layout can resume
StepFunction = Callable[[Work], Tensor]
"""Returns the loss of this rank's rows; leaves gradients of loss / accumulate."""
Stream = Callable[[Iterator[Work]], Iterator[Work]]


class Loop:
    """One training run of one module."""

    def __init__(self, config: LoopConfig, parts: Parts, spec: Spec, module: nn.Module):
        assert parts.make_optimizer is not None
        self._config, self._spec, self._module, self._device = config, spec, module, parts.device
        self._loaded, self._mesh, self._before_update = parts.loaded, parts.mesh, parts.before_update
        self._after_backward, self._mark, self._trains = parts.after_backward, parts.mark, parts.trains
        self._named = [(name, p) for name, p in module.named_parameters() if name in parts.trainable]
        self._optimizer = parts.make_optimizer([ParamGroup(self._named, {})])
        for group in self._optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self._ema = Ema(config.ema, self._named) if config.ema is not None else None
        self._folder = spec.output / "checkpoints"
        self._facts = checkpoint.facts(parts, spec)

    def run(self, loader: Loader, step_function: StepFunction, encode: Stream | None = None) -> bool:
        """Train up to `steps` or `stop_at`. Returns whether `steps` was reached; saves in every case.

        Where it was, and an average of the weights is to be exported, the module holds that on return.
        encode: what batches go through on their way to the step, which may read ahead.
        """
        config = self._config
        step, cursor = self._resume(loader)
        last = config.stop_at or config.steps
        records = self._start_records(step)
        works = islice(
            self._works(loader, cursor, step * config.accumulate, records),
            max(last - step, 0) * config.accumulate,
        )
        stream = encode(works) if encode is not None else works
        saved = step
        saver = Saver(self._folder, config.keep, self._mesh, config.async_save)
        with (
            records or nullcontext(),
            progress("train", last, step) as bar,
            _stop_requested() as stopping,
            saver,
        ):
            while step < last and not self._agreed(stopping()):
                began = time.perf_counter()
                saver.check()
                cursor, loss, rows = self._accumulate(stream, step, step_function, loader)
                norm = self._update(step)
                step += 1
                if self._ema is not None:
                    self._ema.update(step)
                if step % config.log_every == 0 or step == last:
                    exact = {"loss": loss, "lr": self._lr(), "grad_norm": norm, "rows": rows}
                    if records is not None:
                        records.write(step, exact, self._speed(began, len(rows)))
                bar.step(f"loss {loss:.4f}")
                if config.save_every is not None and step % config.save_every == 0:
                    saved = self._save(saver, step, cursor, loader)
            if saved != step:
                self._save(saver, step, cursor, loader)
            self._mark("")
        if self._ema is not None and self._ema.is_exported and step == config.steps:
            self._ema.put_in_place()
        return step == config.steps

    def _start_records(self, step: int) -> Record | None:
        """Write what the run is, and open its record; on the first rank only."""
        if not self._mesh.is_first:
            return None
        write_facts(self._spec, self._loaded, self._device, self._mesh.degrees.world, step)
        return Record(self._spec, step, self._config.tensorboard)

    def _works(self, loader: Loader, cursor: Cursor, number: int, records: Record | None) -> Iterator[Work]:
        for after, batch in loader.iterate(cursor):
            if records is not None:
                records.look(batch)
            rows = tuple(loader.rank + i * loader.world for i in range(len(batch.rows)))
            draws = Draws(self._spec.run.seed, number, rows, loader.rank, loader.world)
            yield Work(after, batch, draws)
            number += 1

    def _accumulate(
        self, stream: Iterator[Work], step: int, step_function: StepFunction, loader: Loader
    ) -> tuple[Cursor, float, list[str]]:
        """Run the batches of one optimizer step; return the cursor after them, their mean loss and their
        rows, those of all ranks.
        """
        total, rows = 0.0, []
        for k in range(self._config.accumulate):
            self._mark(f"step {step + 1} (data)")
            work = next(stream)
            self._mark(f"step {step + 1}")
            self._before_update(k == self._config.accumulate - 1)
            # Dropout draws from torch's own generator; so what it drops is the same after a resume.
            place = self._mesh.place("loss")
            torch.manual_seed(keyed(work.draws.seed, "torch", work.draws.number, place).initial_seed())
            own = step_function(work)
            loss = float(self._mean(own.clone()))
            names = [row.id for row in loader.rows_before(work.cursor)]
            if not math.isfinite(loss):
                names = self._not_finite(own, names)
                raise CvxError(
                    f"step {step + 1}: the loss is {loss} on rows {', '.join(names)}. "
                    "Nothing of this step was kept; lower optimizer.lr, or look at these clips."
                )
            total += loss / self._config.accumulate
            rows += names
        return work.cursor, total, rows

    def _agreed(self, stop: bool) -> bool:
        """Return whether any rank was asked to stop: all stop after the same step."""
        if self._mesh.degrees.world == 1:
            return stop
        asked = torch.tensor(float(stop))
        dist.all_reduce(asked)
        return bool(asked > 0)

    def _not_finite(self, loss: Tensor, names: list[str]) -> list[str]:
        """Return, of the rows of all ranks, those of the ranks whose own loss is not finite."""
        world = self._mesh.size("batch")
        if (group := self._mesh.group("batch")) is None:
            return names
        losses = [torch.zeros_like(loss) for _ in range(world)]
        dist.all_gather(losses, loss, group=group)
        bad = [rank for rank, value in enumerate(losses) if not math.isfinite(float(value))]
        return [name for rank in bad for name in names[rank::world]]

    def _mean(self, loss: Tensor) -> Tensor:
        """Return the mean of a loss over the ranks that read different rows."""
        if (group := self._mesh.group("batch")) is not None:
            dist.all_reduce(loss, group=group)
            loss = loss / self._mesh.size("batch")
        return loss

    def _update(self, step: int) -> float:
        """Clip, step and clear the gradients; return the norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_scale(step, self._config)
        self._after_backward()
        norm = float(clip([p for _, p in self._named], self._config.grad_clip, self._mesh))
        if not math.isfinite(norm):
            bad = [name for name, p in self._named if p.grad is not None and not torch.isfinite(p.grad).all()]
            raise CvxError(
                f"step {step + 1}: {len(bad)} gradients are not finite, first {bad[0]!r}. Lower the lr."
            )
        if norm == 0.0:
            raise CvxError(
                f"step {step + 1}: every gradient is zero, so nothing would be learned. Is all of it frozen?"
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def _speed(self, began: float, rows: int) -> dict[str, float]:
        devices.synchronize(self._device)
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "rows_per_second": rows / seconds,
            "peak_memory_gb": devices.peak_memory(self._device) / 1e9,
        }

    def _save(self, saver: Saver, step: int, cursor: Cursor, loader: Loader) -> int:
        self._mark(f"saving step {step}")
        held = {"cursor": asdict(cursor), "data": loader.fingerprint(), "ema": self._ema is not None}
        saver.save(step, self._state(self._ema), {**held, **self._facts})
        return step

    def _state(self, ema: Ema | None) -> dict[str, Any]:
        """Return all tensors of the run, by name; filling them is not enough for the optimizer."""
        model, optimizer = get_state_dict(self._module, self._optimizer, options=_FLAT)
        averages = {"ema": ema.average} if ema is not None else {}
        return {"model": model, "optimizer": optimizer, **averages}

    def _resume(self, loader: Loader) -> tuple[int, Cursor]:
        """Restore the checkpoint that the recipe asks for; return the step and where the data goes on."""
        path = resume.find(self._folder, self._config.resume, self._mesh)
        if path is None:
            return 0, Cursor()
        manifest = resume.read_manifest(path)
        stated = self._stated_options()
        averaged = bool(manifest.get("ema"))
        state = self._state(self._ema if averaged else None)
        resume.restore(path, state, self._mesh, left=() if self._ema is not None else ("ema",))
        set_state_dict(
            self._module,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_FLAT,
        )
        for group, options in zip(self._optimizer.param_groups, stated, strict=True):
            group.update(options)
        log.info("resumed from %s", path)
        if self._ema is not None and not averaged:
            self._ema.restart()
            log.warning("task.ema: %s holds no average, so it starts from the weights there", path.name)
        elif averaged and self._ema is None:
            log.warning("task.ema: the average that %s holds is given up", path.name)
        cursor = Cursor(**manifest["cursor"])
        new_epoch = manifest["data"] != loader.fingerprint()
        checkpoint.tell(manifest, self._facts, self._trains, new_epoch)
        if new_epoch:
            cursor = Cursor(cursor.epoch + 1)
            log.warning("the rows or their order changed: data goes on with a new epoch, %d", cursor.epoch)
        return int(manifest["step"]), cursor

    def _stated_options(self) -> list[dict[str, Any]]:
        """Return what the recipe says of each parameter group, which holds over what a checkpoint says."""
        names = {"initial_lr", *type(self._spec.config("optimizer")).model_fields}
        groups = self._optimizer.param_groups
        return [{name: value for name, value in group.items() if name in names} for group in groups]


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Turn a first interrupt or termination into a request to stop; a second one acts at once."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        log.info("stopping after this step; the run is saved. Once more stops at once.")
        signal.signal(number, before[number])

    try:
        for stop in (signal.SIGINT, signal.SIGTERM):
            before[stop] = signal.signal(stop, note)
    except ValueError:  # not in the main thread: signals are the caller's business
        pass
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
