"""The files of a run in progress (log and states), and the handling of signals that stop it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TextIO

from torch import nn
from torch.optim import Optimizer

from coordexp.errors import Interrupted
from coordexp.infra.signals import leave
from coordexp.training.checkpoint import NO_LOG, LogEnd, ResumeState, StateSaver, generators
from coordexp.training.distributed import LogRow, gather, is_sharded, world

SAVING_FRACTION = 0.02  # maximum fraction of its time that a run spends on saving


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag that the loop checks between steps; a second Ctrl-C ends the process.

    Within `stopping_at_once`, the first signal already interrupts the work, because it takes longer than a step.
    """

    _watching: StopRequest | None = None  # of this process

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at_once = False

    @contextmanager
    def watching(self) -> Iterator[StopRequest]:
        """Install the handlers; afterwards restore the previous ones."""
        names = (signal.SIGINT, signal.SIGTERM)
        before = {name: signal.signal(name, self._note) for name in names}
        StopRequest._watching = self
        try:
            yield self
        finally:
            StopRequest._watching = None
            for name, handler in before.items():
                signal.signal(name, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT == self.signal:
            leave(number)
        self.signal = self.signal or number
        if self._at_once:
            self._at_once = False  # the cleanup that follows must not be interrupted again
            raise Interrupted(f"stopped by signal {number}")

    @contextmanager
    def _interrupting(self) -> Iterator[None]:
        self._at_once = True
        try:
            if self.signal:
                raise Interrupted(f"stopped by signal {self.signal}")
            yield
        finally:
            self._at_once = False


def stopping_at_once() -> AbstractContextManager[None]:
    """Within the block a signal raises Interrupted; for long work between steps that does not change weights.

    With several processes it has no effect, because the others would wait for the interrupted one; they stop after the
    step.
    """
    request = StopRequest._watching if world().size == 1 else None
    return request._interrupting() if request else nullcontext()


class Recorder:
    """Log and states of a run on disk; only the main process writes what is not sharded."""

    def __init__(
        self, state_folder: Path, log_path: Path, start: str, least_seconds: float, resumed: ResumeState | None
    ) -> None:
        """Start or resume; at least `least_seconds` pass between two states."""
        self._states = StateSaver(state_folder, start, resumed)
        self._least_seconds, self._saved_at = least_seconds, time.monotonic()
        self._log: TextIO | None = None
        if world().is_main:
            # Steps after the state run again and must not appear twice in the log.
            size = resumed.log_end.log_bytes if resumed else 0
            log_path.parent.mkdir(parents=True, exist_ok=True)
            log_path.touch()
            os.truncate(log_path, size)
            self._digest = hashlib.sha256(log_path.read_bytes())
            self._log = log_path.open("a", encoding="utf-8")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._log:
                self._log.close()
        finally:
            self._states.__exit__()

    def log(self, row: LogRow) -> None:
        """Append a row to the log."""
        self._states.check()
        if self._log:
            rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
            line = json.dumps(rounded) + "\n"
            self._log.write(line)
            self._log.flush()
            self._digest.update(line.encode())

    def is_due(self) -> bool:
        """Whether a state should be saved now, given the minimum interval and SAVING_FRACTION."""
        least_seconds = max(self._least_seconds, self._states.cost_s / SAVING_FRACTION)
        return time.monotonic() - self._saved_at > least_seconds

    def save(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Start saving the state from which `step` runs next; all processes must call it."""
        end = self._log_end()
        self._states.save(step, model, optimizer, dict(enumerate(gather(generators()))), end)
        self._saved_at = time.monotonic()

    def save_alone(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Like `save`, without the other processes: their generators are missing, and a sharded model is not saved."""
        if world().is_main and not is_sharded(model):
            self._states.save(step, model, optimizer, {0: generators()}, self._log_end(), alone=True)

    def _log_end(self) -> LogEnd:
        """The end of the log, after flushing it to disk: a state must never be ahead of the log."""
        if not self._log:
            return NO_LOG
        os.fsync(self._log.fileno())
        return LogEnd(self._log.tell(), self._digest.hexdigest())
