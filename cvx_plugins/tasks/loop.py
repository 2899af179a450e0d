"""The optimisation loop: accumulate, clip, step, log, save, resume. Knows neither model nor loss."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from cvx_core import device as devices
from cvx_core.collecting import Collecting
from cvx_core.errors import CvxError
from cvx_core.interfaces import Batch, Parts, Work
from cvx_core.random import Draws, keyed_seed
from cvx_core.spec import Spec
from cvx_io import resume
from cvx_io.loader import Cursor, Loader
from cvx_io.progress import progress
from cvx_io.saver import Saver
from cvx_parallel.gradients import shrink, total_norm
from cvx_plugins.tasks import LoopConfig, checkpoint, guards
from cvx_plugins.tasks.ema import Ema
from cvx_plugins.tasks.groups import grouped
from cvx_plugins.tasks.record import Record, write_facts
from cvx_plugins.tasks.schedule import lr_scale
from cvx_plugins.tasks.validation import Validation

log = logging.getLogger("cvx")
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # names, so that another layout can resume
_TRAINED = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True, strict=False)
StepFunction = Callable[[Work], Tensor]
"""Returns the loss of this rank's rows; leaves gradients of loss / accumulate."""
Stream = Callable[[Iterator[Work]], Iterator[Work]]
Drawn = Callable[[Work], Sequence[str]]
"""Says what was drawn for each row of a batch, such as its timestep."""
SKIPS = 10
"""Steps in a row that may be left out where the recipe does not say."""
MOST_RANKS = 4096


class Done(NamedTuple):
    """The batches of one step: the cursor after them, their mean loss, their rows, those of all ranks, why no
    step can be made of them, and themselves without what they hold.
    """

    cursor: Cursor
    loss: float
    rows: list[str]
    fault: str | None
    works: list[Work]


class Loop:
    """One training run of one module."""

    def __init__(
        self,
        config: LoopConfig,
        parts: Parts,
        spec: Spec,
        module: nn.Module,
        drawn: Drawn = lambda work: [""] * len(work.batch.rows),
        validation: Validation | None = None,
    ):
        assert parts.make_optimizer is not None
        self._config, self._spec, self._module, self._device = config, spec, module, parts.device
        self._loaded, self._mesh, self._before_update = parts.loaded, parts.mesh, parts.before_update
        self._after_backward, self._mark, self._trains = parts.after_backward, parts.mark, parts.trains
        self._named = [(name, p) for name, p in module.named_parameters() if name in parts.trainable]
        self._params = [p for _, p in self._named]
        groups = getattr(spec.config("optimizer"), "groups", ())
        self._optimizer = parts.make_optimizer(grouped(self._named, groups, parts.elsewhere))
        # An optimizer may keep gradients elsewhere than at the parameters.
        self._with_gradient = getattr(self._optimizer, "with_gradient", lambda param: param)
        for group in self._optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self._ema = Ema(config.ema, self._named) if config.ema is not None else None
        self._folder = spec.output / "checkpoints"
        self._describe = partial(checkpoint.facts, parts, spec)
        self._facts = self._describe()
        self._validation = validation
        self._drawn, self._changed, self._skipped, self._in_a_row = drawn, True, 0, 0

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
            Collecting() as collecting,
        ):
            if self._validation is not None:
                self._validation.begin(step)
            self._validate(step, records)
            while step < last and not self._agreed(stopping()):
                began = time.perf_counter()
                saver.check()
                done = self._accumulate(stream, step, step_function, loader)
                cursor, rows = done.cursor, done.rows
                norm, fault = self._update(step, done)
                step += 1
                if self._ema is not None:
                    self._ema.update(step)
                if step % config.log_every == 0 or step == last or fault is not None:
                    exact: dict[str, Any] = {
                        "loss": done.loss,
                        "lr": self._lr(),
                        "grad_norm": norm,
                        "rows": rows,
                    }
                    if fault is not None:
                        exact = {"skipped": fault, "lr": self._lr(), "rows": rows}
                    if records is not None:
                        records.write(step, exact, self._speed(began, len(rows)))
                bar.step(f"loss {done.loss:.4f}")
                if config.save_every is not None and step % config.save_every == 0:
                    saved = self._save(saver, step, cursor, loader)
                try:
                    self._validate(step, records)
                except Exception:
                    if saved != step:  # what was trained is kept, whatever has failed
                        self._save(saver, step, cursor, loader)
                    raise
                collecting.step()
            if step == last:
                self._agreed(False)  # what the last step did
            if saved != step:
                self._save(saver, step, cursor, loader)
            self._mark("")
        if self._skipped and self._mesh.is_first:
            log.warning("%d steps were left out; log.jsonl says which and why", self._skipped)
        if self._ema is not None and self._ema.is_exported and step == config.steps:
            self._ema.put_in_place()
        return step == config.steps

    def _validate(self, step: int, records: Record | None) -> None:
        """Validate where that is due, with the average of the weights where there is one."""
        if self._validation is None or not self._validation.is_due(step):
            return
        self._mark(f"validation after step {step}")
        with self._ema.for_a_while() if self._ema is not None else nullcontext():
            result = self._validation(step, "average" if self._ema is not None else "trained")
        if records is not None:
            records.validated(step, *result)

    def _start_records(self, step: int) -> Record | None:
        """Write what the run is, and open its record; on the first rank only."""
        if not self._mesh.is_first:
            return None
        write_facts(self._spec, self._loaded, self._device, self._mesh.degrees.world, step)
        return Record(self._spec, step, self._config.trackers)

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
    ) -> Done:
        """Run the batches of one optimizer step. Raises CvxError where a loss is not finite, unless such
        steps are left out.
        """
        total, rows, faults, works = 0.0, [], [], []
        for k in range(self._config.accumulate):
            self._mark(f"step {step + 1} (data)")
            work = next(stream)
            self._mark(f"step {step + 1}")
            own = self._run(step_function, work, k)
            loss = float(self._mean(own.clone()))
            if not math.isfinite(loss):
                again = partial(self._run, step_function, work, k)
                seen = guards.look(work, self._module, again, self._rows_of([work]))
                told = guards.told(None if math.isfinite(float(own)) else seen, self._mesh)
                faults.append(f"the loss is {loss}: {told}")
                self._refuse(step, faults[0])
            total += loss / self._config.accumulate
            rows += [row.id for row in loader.rows_before(work.cursor)]
            works.append(Work(work.cursor, Batch(work.batch.rows, work.batch.prompts), work.draws))
        return Done(work.cursor, total, rows, faults[0] if faults else None, works)

    def _rows_of(self, works: Sequence[Work]) -> tuple[str, ...]:
        """Return this rank's rows, with their files and what was drawn for each."""
        return tuple(
            guards.named(row, drawn)
            for work in works
            for row, drawn in zip(work.batch.rows, self._drawn(work), strict=True)
        )

    def _run(self, step_function: StepFunction, work: Work, k: int) -> Tensor:
        """Run batch k of a step; return this rank's loss."""
        self._before_update(k == self._config.accumulate - 1)
        # Dropout draws from torch's own generator; so what it drops is the same after a resume.
        place = self._mesh.place("loss")
        devices.seed(self._device, keyed_seed(work.draws.seed, "torch", work.draws.number, place))
        return step_function(work)

    def _refuse(self, step: int, fault: str) -> None:
        """End the run at a step that cannot be made, unless such steps are left out."""
        if self._config.non_finite == "stop":
            raise CvxError(
                f"step {step + 1}: {fault}. Nothing of this step was kept; lower optimizer.lr, look at these "
                "clips, or leave out such steps with task.non_finite: skip."
            )

    def _skip(self, step: int, fault: str) -> None:
        """Count a step that is left out. Raises CvxError where there are too many in a row."""
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        if self._mesh.is_first:
            log.warning("step %d is left out, number %d of this run: %s", step + 1, self._skipped, fault)
        if self._in_a_row > (limit := self._config.skip_limit or SKIPS):
            raise CvxError(
                f"step {step + 1}: {limit + 1} steps in a row had to be left out, more than "
                f"task.skip_limit allows; the last one: {fault}. Lower optimizer.lr, or look at the weights."
            )

    def _agreed(self, stop: bool) -> bool:
        """Return whether any rank was asked to stop: all stop after the same step.

        Raises CvxError, on all ranks, where the step before changed no parameter on any.
        """
        changed = self._changed
        if self._mesh.degrees.world > 1:
            both = torch.tensor(stop + MOST_RANKS * changed, dtype=torch.float32)  # one message for both
            dist.all_reduce(both)
            changed, stop = bool(both >= MOST_RANKS), bool(both % MOST_RANKS > 0)
        if not changed:
            raise CvxError(
                "the last step changed no parameter, so nothing is learned. Its updates may be too small for "
                f"the weights' precision, or the learning rate, {self._lr():g}, is 0: raise optimizer.lr, or "
                "keep the weights in float32."
            )
        return stop

    def _mean(self, loss: Tensor) -> Tensor:
        """Return the mean of a loss over the ranks that read different rows."""
        if (group := self._mesh.group("batch")) is not None:
            dist.all_reduce(loss, group=group)
            loss = loss / self._mesh.size("batch")
        return loss

    def _update(self, step: int, done: Done) -> tuple[float | None, str | None]:
        """Clip, step and clear the gradients; return the norm before clipping, or why nothing was done."""
        fault = done.fault
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_scale(step, self._config)
        self._after_backward()
        gradients = [self._with_gradient(param) for param in self._params]
        total = total_norm(gradients, self._mesh)
        norm = float(total)
        if fault is None and not math.isfinite(norm):
            named = [(name, holder) for (name, _), holder in zip(self._named, gradients, strict=True)]
            fault = guards.bad_gradients(named, self._rows_of(done.works), self._mesh)
            self._refuse(step, fault)
        if fault is not None:
            self._optimizer.zero_grad(set_to_none=True)
            self._changed = True
            self._skip(step, fault)
            return None, fault
        if norm == 0.0:
            raise CvxError(
                f"step {step + 1}: every gradient is zero, so nothing would be learned. Is all of it frozen?"
            )
        if self._config.grad_clip is not None:
            shrink(gradients, self._config.grad_clip, total)
        changed = guards.Changed(self._params, self._optimizer)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._changed, self._in_a_row = bool(changed), 0
        return norm, None

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

    def _state(self, ema: Ema | None, options: StateDictOptions = _TRAINED) -> dict[str, Any]:
        """Return what the run trains and keeps, by name; filling it is not enough for the optimizer."""
        model, optimizer = get_state_dict(self._module, self._optimizer, options=options)
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
        has_base = checkpoint.check_base(path, manifest, self._facts, self._trains)
        chosen = _FLAT if has_base else _TRAINED
        state = self._state(self._ema if averaged else None, chosen)
        resume.restore(path, state, self._mesh, left=() if self._ema is not None else ("ema",))
        set_state_dict(
            self._module,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=chosen,
        )
        if has_base:
            self._facts = self._describe()  # the frozen weights may be others than the recipe's
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
