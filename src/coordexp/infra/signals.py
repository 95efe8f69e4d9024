"""How a stage ends on SIGTERM and Ctrl-C: with exit code 75, and a mark that the same command resumes it.

Before the work starts, also during heavy imports, a signal ends the process at once. During the work, the first signal
raises an exception, which closes open resources; training instead stops after the current step (training/recorder.py).
A second Ctrl-C ends the process immediately. That is safe: files on disk are complete at any time, and servers and
workers end with the process. A second SIGTERM is ignored, because launchers forward one of their own in addition to the
Ctrl-C that reaches all processes of a terminal.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import NoReturn

from coordexp.errors import EXIT_INTERRUPTED
from coordexp.infra.resume import mark, resume_root

_STOPS = (signal.SIGINT, signal.SIGTERM)


def leave(number: int, _frame: FrameType | None = None) -> NoReturn:
    """End the process immediately."""
    with suppress(OSError):  # the disk is full or not writable
        mark(resume_root())
    sys.stderr.write(f"interrupted: ended at once by signal {number}; run the same command again to resume.\n")
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


def leave_on_signals() -> None:
    """From now on, a signal ends the process at once: the work has not started."""
    for number in _STOPS:
        _handle(number, leave)


def interrupted_by_signals() -> AbstractContextManager[None]:
    """Within the block, the first signal raises KeyboardInterrupt, and a later Ctrl-C ends the process."""
    return _handled_by(_interrupt)


def ended_by_signals() -> AbstractContextManager[None]:
    """Within the block, a signal ends the process as if it had no handler.

    For library calls that wait for other processes: Python would run a handler only when the call returns.
    """
    return _handled_by(signal.SIG_DFL)


@contextmanager
def _handled_by(handler: signal._HANDLER) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _STOPS}
    for number in _STOPS:
        _handle(number, handler)
    try:
        yield
    finally:
        for number, kept in before.items():
            signal.signal(number, kept)


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    _handle(signal.SIGINT, leave)
    _handle(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _handle(number: int, handler: signal._HANDLER) -> None:
    """Set a handler, unless the parent process ignores the signal, as shells do for background jobs."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)
