"""Progress of a running `dvc exp run`, read line by line from its output; records the time of each stage."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

SAID_EVERY_SECONDS = 30.0  # for a log; a terminal shows every change
_STARTED = re.compile(r"Running stage '([^']+)'")
_PASSED = re.compile(r"Stage '[^']+' (?:is cached|didn't change)|(?:Updating|Generating) lock file ")
_COUNTED = re.compile(r"\b(?:step (\d+)/(\d+)|generated (\d+) of (\d+) images)\b")


@dataclass(slots=True)
class Progress:
    """The state of a run according to its output; `say` gets a plain line at intervals."""

    name: str
    estimates: Mapping[str, float]  # seconds by stage, measured in earlier runs
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=dict)  # by finished stage
    stage: str = ""
    counted: str = ""
    done: float | None = None  # fraction of the running stage, once it reports one
    _since: float = 0.0
    _said: float = 0.0

    def read(self, line: str) -> None:
        """Process one line of output from DVC or a stage."""
        if found := _STARTED.search(line):
            self.finish_stage()
            self.stage, self.counted, self.done, self._since = found[1], "", None, self.clock()
            self._say()
        elif _PASSED.search(line):
            self.finish_stage()
        elif found := _COUNTED.search(line):
            done, total = (number for number in found.groups() if number)
            self.counted = f"{'step' if found[1] else 'image'} {done} of {total}"
            self.done = int(done) / max(1, int(total))
            if self.clock() - self._said >= SAID_EVERY_SECONDS:
                self._say()

    def finish_stage(self) -> None:
        """Record the end of the running stage, if there is one."""
        if self.stage:
            self.seconds[self.stage] = round(self.clock() - self._since, 1)
            self.stage, self.done = "", None

    def words(self) -> str:
        """One line with the running stage, its progress, the elapsed time and the expected time."""
        if not self.stage:
            return f"{self.name}: DVC is preparing or saving the run"
        estimate = self.estimates.get(self.stage)
        elapsed = duration(self.clock() - self._since) + (f" of about {duration(estimate)}" if estimate else "")
        return ", ".join(part for part in (f"{self.name}: {self.stage}", self.counted, elapsed) if part)

    def _say(self) -> None:
        self._said = self.clock()
        if not sys.stderr.isatty():
            self.say(self.words())

    def shown(self) -> AbstractContextManager[object]:
        """A context in which a terminal shows a progress bar of the running stage."""
        if not sys.stderr.isatty():
            return nullcontext()
        from rich.console import Console
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        def line() -> Table:
            shown = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=1.0, completed=self.done or 0.0, width=30, pulse=self.done is None)
            shown.add_row(bar, self.words())
            return shown

        return Live(console=Console(stderr=True), get_renderable=line, refresh_per_second=4, transient=True)


def duration(seconds: float) -> str:
    """A time in at most five characters: 45s, 3m20s, 12m, 2h05m, 130h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{hours}h{left:02}m" if hours < 10 else f"{hours}h"
    if minutes:
        return f"{minutes}m{rest:02}s" if minutes < 10 else f"{minutes}m"
    return f"{rest}s"


def total(times: Sequence[float | None]) -> str:
    """The sum of the measured times; mentions unmeasured ones."""
    known = [seconds for seconds in times if seconds is not None]
    if not known:
        return "an unknown time" if times else "no time"
    return duration(sum(known)) + ("" if len(known) == len(times) else " plus stages without a measured time")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended."""

    code: int
    output: str
    stopped: bool  # by a signal to this process


def stream(command: list[str], root: Path, log: Path, progress: Progress, environment: Mapping[str, str]) -> Ended:
    """Run a program to its end; every line of its output goes to `log` and `progress`.

    On SIGINT, wait until the stage has saved its state. A terminal sends the signal to all processes; a signal to this
    process alone is passed on.
    """
    lines: list[str] = []
    stopped = False
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8") as file,  # written in place, so that `tail -f` can follow it
        subprocess.Popen(
            command,
            cwd=root,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
        progress.shown(),
    ):
        assert process.stdout
        while True:
            try:
                for line in process.stdout:
                    lines.append(line)
                    file.write(line)
                    file.flush()
                    progress.read(line)
                break
            except KeyboardInterrupt:
                stopped = True
                progress.say(f"{progress.name}: stopping; the stage saves its state first")
                if not sys.stdin.isatty():
                    _interrupt_below(process.pid)
    if process.returncode == 0:
        progress.finish_stage()
    return Ended(process.returncode, "".join(lines), stopped)


def _interrupt_below(pid: int) -> None:
    """Send SIGINT to a process and all of its descendants."""
    waiting = [pid]
    while waiting:
        pid = waiting.pop()
        children = Path(f"/proc/{pid}/task/{pid}/children")
        try:
            waiting += map(int, children.read_text(encoding="ascii").split())
            os.kill(pid, signal.SIGINT)
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
