"""A progress bar on a terminal, with log lines above it. Without a terminal nothing is drawn."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from coordexp.infra.printable import raw_stderr


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that reports how many of `total` items are done; shows a bar if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    # rich redirects stdout through its console, here stderr: correct only if both are the terminal.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=Console(file=raw_stderr()), transient=True, redirect_stdout=redirect) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, completed=done)


class StdoutHandler(logging.StreamHandler[TextIO]):
    """Logs to the current `sys.stdout`: rich replaces it while a bar is shown, to write above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The stream of the next line."""
        return sys.stdout
