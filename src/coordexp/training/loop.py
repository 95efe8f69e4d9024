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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from coordexp.config.files import write_text
from coordexp.errors import Interrupted, TrainingError
from coordexp.training.checkpoint import load_state, save_state
from coordexp.training.optimizers import build_optimizer
from coordexp.training.schedule import Schedule

log = logging.getLogger(__name__)

LogRow = dict[str, float | str]  # of one step: numbers by name, and the channel as a letter


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The loss of one forward, still attached to its graph, and plain numbers to log."""

    loss: Tensor
    logs: LogRow


class Task(Protocol):
    """What is trained. `micro_batches` yields losses whose sum is the loss of the step."""

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Run the forwards of one step; each loss is back-propagated before the next is computed."""
        ...


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


def train(model: nn.Module, task: Task, settings: LoopSettings, state_folder: Path, log_path: Path) -> None:
    """Train in place for `settings.steps` steps, resuming from `state_folder` if it holds a state.

    Raises:
        Interrupted: on SIGINT or SIGTERM, after saving; the same call goes on from there.
        TrainingError: when the loss of a step is not finite.
    """
    optimizer = build_optimizer(model, settings.optimizer, settings.lr, settings.weight_decay, settings.row_lr_factor)
    peaks = [group["lr"] for group in optimizer.param_groups]
    first = 0
    if (state := load_state(state_folder)) is not None:
        state.restore(model, optimizer)
        first = state.step
        log.info("resumed at step %d of %d from %s", first, settings.steps, state_folder)
    _truncate_log(log_path, first)
    model.train()
    device_type = next(model.parameters()).device.type
    saved_at = time.monotonic()
    with StopRequest().watching() as stop, log_path.open("a", encoding="utf-8") as out:
        for step in range(first, settings.steps):
            started = time.monotonic()
            factor = settings.schedule(step)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            with torch.autocast(device_type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
                row = _run_step(task, step)
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row |= {"step": step, "lr": settings.lr * factor, "grad_norm": norm}
            row["time/step_s"] = seconds = time.monotonic() - started
            out.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
            out.flush()
            if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                log.info("%s", _console_line(row, step + 1, settings.steps, seconds))
            if stop.signal is not None and step + 1 < settings.steps:
                _save(state_folder, step + 1, model, optimizer, out)
                raise Interrupted(
                    f"stopped by signal {stop.signal} after step {step + 1} of {settings.steps}; run it again."
                )
            if time.monotonic() - saved_at > settings.save_every_seconds:
                _save(state_folder, step + 1, model, optimizer, out)
                saved_at = time.monotonic()


def _save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, log_file: TextIO) -> None:
    os.fsync(log_file.fileno())  # a state must never be ahead of the log that it goes on with
    save_state(folder, step, model, optimizer)


def _run_step(task: Task, step: int) -> LogRow:
    total = 0.0
    row: LogRow = {}
    for micro in task.micro_batches(step):
        value = float(micro.loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"loss of step {step} is {value}; terms: {micro.logs}. Lower the learning rate or inspect the pack."
            )
        micro.loss.backward()
        total += value
        row |= micro.logs
    return {"loss/total": total, **row}


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
