"""The training loop: one optimizer step after another over a `Task`, with resume, logging and a clean stop.

What a step trains on and which losses it takes is the task's business; the loop owns optimizer, schedule, precision,
gradient clipping, the resume state and the log. Every stage, and the pretraining of the embedded base model, runs it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from coordexp.errors import Interrupted, TrainingError
from coordexp.infra.files import write_text
from coordexp.infra.provenance import write_json
from coordexp.training.checkpoint import load_state, save_state
from coordexp.training.distributed import (
    Logged,
    LogRow,
    Row,
    any_process,
    gathered_row,
    is_sharded,
    merge_rows,
    sum_gradients,
    world,
)
from coordexp.training.optimizers import build_optimizer
from coordexp.training.schedule import Schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The loss of one forward, still attached to its graph, and what to log of it."""

    loss: Tensor
    logs: Mapping[str, Logged]


class Task(Protocol):
    """What is trained. `micro_batches` yields losses whose sum is the loss of the step."""

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Run the forwards of one step; each loss is back-propagated before the next is computed."""
        ...

    def items(self, step: int) -> Mapping[str, Any]:
        """What one step trains on, for a message: JSON values."""
        ...


class Watch(Protocol):
    """What looks at the model between two steps; it may not change what the steps compute. Main process only."""

    def resume(self, done_steps: int) -> None:
        """So many steps are done: the run starts, or goes on."""
        ...

    def after(self, done_steps: int) -> None:
        """So many steps are done, and no gradient is held."""
        ...


class Unwatched:
    """Nobody looks."""

    def resume(self, done_steps: int) -> None:
        """Nothing to forget."""

    def after(self, done_steps: int) -> None:
        """Nothing to see."""


UNWATCHED = Unwatched()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How long and how fast; learning rate is the peak of `schedule`."""

    steps: int
    schedule: Schedule
    lr: float
    optimizer: str
    weight_decay: float
    row_lr_factor: float
    max_grad_norm: float
    precision: str  # "bf16" (autocast) or "fp32"
    log_every: int
    save_every_seconds: float


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def watching(self) -> Iterator[StopRequest]:
        """Install the handlers, and put the old ones back."""
        names = (signal.SIGINT, signal.SIGTERM)
        before = {name: signal.signal(name, self._note) for name in names}
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.signal = number


class _Recorder:
    """Log and resume state of a run on disk; of several processes only the main one writes."""

    def __init__(self, state_folder: Path, log_path: Path, first_step: int) -> None:
        self._state_folder = state_folder
        self._log: TextIO | None = None
        if world().is_main:
            _truncate_log(log_path, first_step)
            self._log = log_path.open("a", encoding="utf-8")

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log:
            self._log.close()

    def log(self, row: LogRow) -> None:
        """Append a row."""
        if self._log:
            rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
            self._log.write(json.dumps(rounded) + "\n")
            self._log.flush()

    def save(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Save the state from which `step` runs next; if the model is sharded, all processes must call this."""
        if self._log:
            os.fsync(self._log.fileno())  # a state must never be ahead of the log that it goes on with
        if self._log or is_sharded(model):
            save_state(self._state_folder, step, model, optimizer)


def train(
    model: nn.Module,
    task: Task,
    settings: LoopSettings,
    state_folder: Path,
    log_path: Path,
    watch: Watch = UNWATCHED,
) -> None:
    """Train in place for `settings.steps` steps, resuming from `state_folder` if it holds a state.

    `watch` is asked after every step, before a state is saved: what it saw of a step is never behind the state.

    Raises:
        Interrupted: on SIGINT or SIGTERM, after saving; the same call goes on from there.
        TrainingError: the loss or gradient of a step is not finite; what it trained on is kept in `state_folder`.
    """
    optimizer = build_optimizer(model, settings.optimizer, settings.lr, settings.weight_decay, settings.row_lr_factor)
    peaks = [group["lr"] for group in optimizer.param_groups]
    first = 0
    if (state := load_state(state_folder)) is not None:
        state.restore(model, optimizer)
        first = state.step
        log.info("resumed at step %d of %d from %s", first, settings.steps, state_folder)
    model.train()
    watch.resume(first)
    saved_at = time.monotonic()
    with StopRequest().watching() as stop, _Recorder(state_folder, log_path, first) as disk:
        for step in range(first, settings.steps):
            started = time.monotonic()
            factor = settings.schedule(step)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            try:
                row = _run_step(model, task, step, settings.precision)
                norm = _clipped_norm(model, settings.max_grad_norm)
            except TrainingError as error:
                if not is_sharded(model):  # the other processes, which hold their part of it, may be anywhere
                    disk.save(step, model, optimizer)
                raise _kept_for_replay(error, task, step, state_folder) from error
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row |= {"step": step, "lr": settings.lr * factor, "grad_norm": norm}
            row["time/step_s"] = seconds = time.monotonic() - started
            disk.log(row)
            if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                log.info("%s", _console_line(row, step + 1, settings.steps, seconds))
            watch.after(step + 1)
            if any_process(stop.signal is not None) and step + 1 < settings.steps:
                disk.save(step + 1, model, optimizer)
                why = f"signal {stop.signal}" if stop.signal else "a signal to another process"
                raise Interrupted(f"stopped by {why} after step {step + 1} of {settings.steps}; run it again.")
            if any_process(time.monotonic() - saved_at > settings.save_every_seconds):
                disk.save(step + 1, model, optimizer)
                saved_at = time.monotonic()


def _run_step(model: nn.Module, task: Task, step: int, precision: str) -> LogRow:
    rows: list[Row] = []
    device_type = next(model.parameters()).device.type
    # Autocast keeps its copy of each weight to the end of the step, which would undo what sharding saves.
    keeps_copies = not is_sharded(model)
    with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=keeps_copies):
        for micro in task.micro_batches(step):
            value = float(micro.loss.detach())
            if not math.isfinite(value):
                terms = {name: number for name, number in micro.logs.items() if name.startswith(("loss/", "raw/"))}
                raise TrainingError(f"the loss is {value}; terms: {terms}.")
            micro.loss.backward()
            rows.append({"loss/total": value, **micro.logs})
    return gathered_row(merge_rows(rows))


def _clipped_norm(model: nn.Module, limit: float) -> float:
    """Sum the gradients of all processes, scale them down to the limit, and return their norm before."""
    if not is_sharded(model):  # otherwise the backward pass did
        sum_gradients(model.parameters())
    total = nn.utils.clip_grad_norm_(model.parameters(), limit)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if not math.isfinite(norm):
        raise TrainingError(f"the norm of the gradient is {norm}, though the loss is finite.")
    return norm


def _kept_for_replay(error: TrainingError, task: Task, step: int, folder: Path) -> TrainingError:
    """Put what the failing step trained on beside the resume state; the new error says where."""
    path = folder / f"failed-process-{world().rank}.json"
    write_json(path, {"step": step, "error": str(error), "items": task.items(step)})
    return TrainingError(
        f"step {step}: {error} What it trained on is in {path}, beside the state before it, so that the same command "
        "meets it again. Expected finite numbers: look at those images and answers, or lower the learning rate."
    )


def _truncate_log(path: Path, first_step: int) -> None:
    """Keep the rows before `first_step`: steps after the last saved state run again and must not appear twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return
    complete = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in complete if json.loads(line)["step"] < first_step]
    write_text(path, "".join(kept))


def _console_line(row: LogRow, done: int, steps: int, seconds: float) -> str:
    eta = (steps - done) * seconds
    shown = " ".join(f"{k.split('/')[-1]} {row[k]:.3f}" for k in row if k.startswith("loss/"))
    share = f"{100 * done / steps:.0f} %"
    return f"step {done}/{steps} ({share}) {shown} lr {row['lr']:.2e} {seconds:.2f} s/step eta {eta:.0f} s"
