"""A bar on a terminal for what takes long, and a log that stays readable above it. Anywhere else nothing is drawn."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from coordexp.infra.printable import raw_stderr


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives what says how many of `total` are done; meanwhile a bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    # rich sends stdout through its own console, here stderr: right only where both are the terminal.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=Console(file=raw_stderr()), transient=True, redirect_stdout=redirect) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, completed=done)


class StdoutHandler(logging.StreamHandler[TextIO]):
    """Logs to what `sys.stdout` is at the time: while a bar is shown, that writes above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Where the next line goes."""
        return sys.stdout
