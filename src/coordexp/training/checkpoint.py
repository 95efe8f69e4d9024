"""What a training run goes on from after a stop: its state, one file that is replaced whole, and the log up to it."""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from torch.optim import Optimizer

from coordexp.errors import CheckpointError
from coordexp.infra.files import replacing, write_text
from coordexp.training.distributed import LogRow, is_sharded, world
from coordexp.training.sharding import own_rows, whole_weights

STATE_NAME = "state.pt"


@dataclass(frozen=True, slots=True)
class ResumeState:
    """Where training stood: the next step to run, weights, optimizer, and the random generators (CPU, each GPU)."""

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    torch_rng: torch.Tensor
    cuda_rng: list[torch.Tensor]

    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Put everything back to where it stood."""
        sharded = is_sharded(model)
        model.load_state_dict(own_rows(model.state_dict(), self.model) if sharded else self.model)
        optimizer.load_state_dict(self.optimizer)
        torch.set_rng_state(self.torch_rng)
        if self.cuda_rng and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.cuda_rng)


def save_state(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Replace the resume state of a run, whole or not at all. The main process writes; a sharded model needs all here.

    Raises:
        OSError: the disk is full or not writable; the state before this one is still there.
    """
    state = {
        "step": step,
        "model": whole_weights(model) if is_sharded(model) else model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    if not world().is_main:
        return
    with replacing(folder / STATE_NAME) as temporary, temporary.open("wb") as out:
        try:
            torch.save(state, out)
        except RuntimeError as error:
            # torch's writer notices at its end that bytes are missing, and hides why.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def load_state(folder: Path) -> ResumeState | None:
    """The resume state of a run, or None if there is none. Tensors only: nothing in it is executed.

    Raises:
        CheckpointError: the file is damaged; it was written whole, so the disk or another program changed it.
    """
    path = folder / STATE_NAME
    if not path.is_file():
        return None
    try:
        return ResumeState(**torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, TypeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: the resume state cannot be read ({error}). Expected what an interrupted run saved; delete "
            f"{folder} to start this stage at step 0."
        ) from error


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


class Recorder:
    """Log and resume state of a run on disk; of several processes only the main one writes."""

    def __init__(self, state_folder: Path, log_path: Path, first_step: int) -> None:
        self._state_folder = state_folder
        self._log: TextIO | None = None
        if world().is_main:
            _truncate_log(log_path, first_step)
            self._log = log_path.open("a", encoding="utf-8")

    def __enter__(self) -> Recorder:
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


def _truncate_log(path: Path, first_step: int) -> None:
    """Keep the rows before `first_step`: steps after the last saved state run again and must not appear twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return
    complete = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in complete if json.loads(line)["step"] < first_step]
    write_text(path, "".join(kept))
