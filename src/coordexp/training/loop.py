"""The training loop: one optimizer step after another over a `Task`, with resume, logging and a clean stop.

The task defines the data and the losses of a step. The loop owns the optimizer, schedule, precision, gradient clipping,
resume state and log. Every stage runs it, and so does the pretraining of the embedded base model.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from coordexp.config.profile import OptimConfig
from coordexp.errors import Interrupted, TrainingError
from coordexp.infra.device import training_plan
from coordexp.infra.provenance import write_json
from coordexp.training.checkpoint import ResumeState, load_state, seed_process
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
from coordexp.training.recorder import Recorder, StopRequest
from coordexp.training.schedule import Schedule, cosine_schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The loss of one forward, attached to its graph, and its log values."""

    loss: Tensor
    logs: Mapping[str, Logged]


class Task(Protocol):
    """The data and losses of a run; the losses that `micro_batches` yields add up to the loss of the step."""

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Run the forwards of one step; each loss is backpropagated before the next one is computed."""
        ...

    def items(self, step: int) -> Mapping[str, Any]:
        """The training items of one step, as JSON values for a message."""
        ...


class Callback:
    """Hooks that every process calls between steps, here no-ops. A hook must not change the results of steps."""

    def on_train_begin(self, done_steps: int) -> None:
        """The run starts, or resumes after `done_steps` steps."""

    def on_log(self, row: LogRow) -> None:
        """A step was logged; `row` is its row in the training log."""

    def on_step_end(self, done_steps: int) -> None:
        """`done_steps` steps are done, and no gradient is held."""


@dataclass(frozen=True, slots=True)
class Callbacks(Callback):
    """Several callbacks, called in order."""

    each: tuple[Callback, ...]

    def on_train_begin(self, done_steps: int) -> None:
        """Tell all of them."""
        for callback in self.each:
            callback.on_train_begin(done_steps)

    def on_log(self, row: LogRow) -> None:
        """Tell all of them."""
        for callback in self.each:
            callback.on_log(row)

    def on_step_end(self, done_steps: int) -> None:
        """Tell all of them."""
        for callback in self.each:
            callback.on_step_end(done_steps)


NO_CALLBACK = Callback()


def train(
    model: nn.Module,
    task: Task,
    optim: OptimConfig,
    state_folder: Path,
    log_path: Path,
    *,
    save_every_seconds: float,
    start: str = "",
    schedule: Schedule | None = None,
    callback: Callback = NO_CALLBACK,
    lacking: Callable[[], OSError | None] = lambda: None,
) -> None:
    """Train in place for `optim.steps` steps, resuming from `state_folder` if it holds a state.

    States are saved at most every `save_every_seconds`, less often where saving takes over SAVING_FRACTION of the time.
    `start` identifies the present weights, because frozen ones are not saved. `schedule` maps a step to the factor on
    `optim.lr`; by default a linear warm-up, then a cosine. The callback runs after every step, before a save: its files
    are never older than the state. If `lacking` reports at the end that the result cannot be written, a state is saved.

    Raises:
        Interrupted: on SIGINT or SIGTERM, after saving; the same call resumes.
        TrainingError: the loss or gradient of a step is not finite; its training items are kept in `state_folder`.
        OSError: the error that `lacking` reports, or that a state could not be written.
    """
    schedule = schedule or cosine_schedule(optim.steps, optim.warmup_steps)
    optimizer = build_optimizer(model, optim)
    peaks = [group["lr"] for group in optimizer.param_groups]
    resumed = _resumed(model, optimizer, state_folder, log_path, start)
    done = resumed.step if resumed else 0
    stopped = False
    model.train()
    with (
        StopRequest().watching() as stop,
        Recorder(state_folder, log_path, start, save_every_seconds, resumed) as disk,
    ):
        run = _Run(model, optimizer, task, optim, disk, state_folder)
        try:
            callback.on_train_begin(done)
            while done < optim.steps and not stopped:
                factor = schedule(done)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * factor
                row = _take_step(run, done, optim.lr * factor)
                done += 1
                callback.on_log(row)
                callback.on_step_end(done)
                stopped = any_process(stop.signal is not None) and done < optim.steps
                if any_process(disk.is_due()) or stopped:
                    disk.save(done, model, optimizer)
        except Interrupted as error:  # raised within `stopping_at_once`: the other processes may be anywhere
            disk.save_alone(done, model, optimizer)
            raise Interrupted(f"{error} after step {done} of {optim.steps}; run it again.") from error
        if stopped:
            why = f"signal {stop.signal}" if stop.signal else "a signal to another process"
            raise Interrupted(f"stopped by {why} after step {done} of {optim.steps}; run it again.")
        fault = lacking() if world().is_main else None
        if any_process(fault is not None):
            disk.save(optim.steps, model, optimizer)
            raise fault or OSError(errno.ENOSPC, "another process reported a full disk")


@dataclass(frozen=True, slots=True)
class _Run:
    """What every step of one call of `train` uses."""

    model: nn.Module
    optimizer: Optimizer
    task: Task
    optim: OptimConfig
    disk: Recorder
    state_folder: Path


def _take_step(run: _Run, step: int, lr: float) -> dict[str, float | str]:
    """Take one optimizer step and log it; returns the log row. Raises as `train`."""
    started, optim = time.monotonic(), run.optim
    try:
        row = _run_step(run.model, run.task, step, optim.precision)
        norm = _clipped_norm(run.model, optim.max_grad_norm)
    except TrainingError as error:
        run.disk.save_alone(step, run.model, run.optimizer)
        raise _kept_for_replay(error, run.task, step, run.state_folder) from error
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    row |= {"step": step, "lr": lr, "grad_norm": norm}
    row["time/step_s"] = seconds = time.monotonic() - started
    run.disk.log(row)
    if (step + 1) % optim.log_every == 0 or step + 1 == optim.steps:
        log.info("%s", _console_line(row, step + 1, optim.steps, seconds))
    return row


def _resumed(
    model: nn.Module, optimizer: Optimizer, state_folder: Path, log_path: Path, start: str
) -> ResumeState | None:
    """Load the saved state into model, optimizer and generators; None if there is no state."""
    state = load_state(state_folder, log_path)
    if state is None:
        seed_process(0)
        return None
    state.check_start(start)
    state.restore(model, optimizer)
    log.info("resumed at step %d from %s", state.step, state.saved.folder)
    return state


def _run_step(model: nn.Module, task: Task, step: int, precision: Literal["bf16", "fp32"]) -> LogRow:
    rows: list[Row] = []
    plan = training_plan(precision, next(model.parameters()).device)
    # Autocast caches a bfloat16 copy of each weight until the end of the step. For sharded weights, that would hold the
    # whole model in memory.
    with plan.autocast(model, keeps_copies=not is_sharded(model)):
        for micro in task.micro_batches(step):
            value = float(micro.loss.detach())
            if not math.isfinite(value):
                terms = {name: number for name, number in micro.logs.items() if name.startswith(("loss/", "raw/"))}
                raise TrainingError(f"the loss is {value}; terms: {terms}.")
            micro.loss.backward()
            rows.append({"loss/total": value, **micro.logs})
    return gathered_row(merge_rows(rows))


def _clipped_norm(model: nn.Module, limit: float) -> float:
    """Sum the gradients of all processes, clip them to the limit, and return their norm before clipping."""
    if not is_sharded(model):  # FSDP sums in the backward pass
        sum_gradients(model.parameters())
    total = nn.utils.clip_grad_norm_(model.parameters(), limit)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if not math.isfinite(norm):
        raise TrainingError(f"the gradient norm is {norm}, although the loss is finite.")
    return norm


def _kept_for_replay(error: TrainingError, task: Task, step: int, folder: Path) -> TrainingError:
    """Write the training items of the failing step next to the resume state; the returned error names the file."""
    path = folder / f"failed-process-{world().rank}.json"
    write_json(path, {"step": step, "error": str(error), "items": task.items(step)})
    return TrainingError(
        f"step {step}: {error} Its training items are in {path}, next to the state before the step, so the same "
        "command reproduces the failure. Expected finite numbers: check those images and answers, or lower the "
        "learning rate."
    )


def _console_line(row: LogRow, done: int, steps: int, seconds: float) -> str:
    eta = (steps - done) * seconds
    shown = " ".join(f"{k.split('/')[-1]} {row[k]:.3f}" for k in row if k.startswith("loss/"))
    progress = f"step {done}/{steps} ({100 * done / steps:.0f} %)"
    return f"{progress} {shown} lr {row['lr']:.2e} {seconds:.2f} s/step eta {eta:.0f} s"
