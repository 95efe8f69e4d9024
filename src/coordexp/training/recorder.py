"""What a run keeps on disk while it goes: its log, and now and then its state; and how it is asked to stop."""

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

SAVING_FRACTION = 0.02  # most of the time that a run spends on saving


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between steps; a second Ctrl-C ends the process.

    Within `stopping_at_once` the first signal already ends the work, for which a step would be long.
    """

    _watching: StopRequest | None = None  # of this process

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at_once = False

    @contextmanager
    def watching(self) -> Iterator[StopRequest]:
        """Install the handlers, and put the old ones back."""
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
            self._at_once = False  # what is being closed now is not to be interrupted again
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
    """Within the block a signal raises Interrupted; for work between steps that changes no weights and takes long.

    Not for one of several processes: the others would wait for it. They stop after the step.
    """
    request = StopRequest._watching if world().size == 1 else None
    return request._interrupting() if request else nullcontext()


class Recorder:
    """Log and states of a run on disk; of several processes only the main one writes what is not sharded."""

    def __init__(
        self, state_folder: Path, log_path: Path, start: str, least_seconds: float, resumed: ResumeState | None
    ) -> None:
        """Begin or go on; at least `least_seconds` lie between two states."""
        self._states = StateSaver(state_folder, start, resumed)
        self._least_seconds, self._saved_at = least_seconds, time.monotonic()
        self._log: TextIO | None = None
        if world().is_main:
            # Steps after the state run again and must not appear twice.
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
        """Append a row."""
        self._states.check()
        if self._log:
            rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
            line = json.dumps(rounded) + "\n"
            self._log.write(line)
            self._log.flush()
            self._digest.update(line.encode())

    def is_due(self) -> bool:
        """Whether a state should be saved now: not too often, and not for too much of the time."""
        least_seconds = max(self._least_seconds, self._states.cost_s / SAVING_FRACTION)
        return time.monotonic() - self._saved_at > least_seconds

    def save(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Begin to save the state from which `step` runs next; all processes must call it."""
        end = self._log_end()
        self._states.save(step, model, optimizer, dict(enumerate(gather(generators()))), end)
        self._saved_at = time.monotonic()

    def save_alone(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """As `save` where the other processes may be anywhere: without their generators, nothing of a sharded model."""
        if world().is_main and not is_sharded(model):
            self._states.save(step, model, optimizer, {0: generators()}, self._log_end(), alone=True)

    def _log_end(self) -> LogEnd:
        """How far the log goes, and that far it is on the disk: a state must never be ahead of it."""
        if not self._log:
            return NO_LOG
        os.fsync(self._log.fileno())
        return LogEnd(self._log.tell(), self._digest.hexdigest())
