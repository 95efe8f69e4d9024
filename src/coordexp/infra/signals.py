"""How a stage ends on SIGTERM and Ctrl-C: with exit code 75, and a mark that the same command goes on.

Before anything was done it ends at once, in the middle of heavy imports too. At work the first signal is an exception,
which closes what is open; training turns it into a stop after the step instead (training/recorder.py). A second Ctrl-C
ends the process there and then: what is on disk is whole at any time, and servers and workers end with it. (A second
SIGTERM means nothing: launchers pass on one of their own beside the Ctrl-C that reaches all processes of a terminal.)
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from coordexp.errors import EXIT_INTERRUPTED
from coordexp.infra.resume import mark, resume_root

_STOPS = (signal.SIGINT, signal.SIGTERM)


def leave(number: int, _frame: FrameType | None = None) -> NoReturn:
    """End the process now."""
    with suppress(OSError):  # a disk that is full, or not ours to write to
        mark(resume_root())
    sys.stderr.write(f"interrupted: ended at once by signal {number}; run the same command again.\n")
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


def leave_on_signals() -> None:
    """From here on a signal ends the process at once: before it has begun."""
    for number in _STOPS:
        _handle(number, leave)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Within the block the first signal raises KeyboardInterrupt, and a Ctrl-C after it ends the process."""
    before = {number: signal.getsignal(number) for number in _STOPS}
    for number in _STOPS:
        _handle(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    _handle(signal.SIGINT, leave)
    _handle(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _handle(number: int, handler: signal._HANDLER) -> None:
    """Set a handler, unless who started this process wants the signal ignored, as shells do for jobs in background."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)
