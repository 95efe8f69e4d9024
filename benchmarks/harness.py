"""The common part of all benchmarks: table rows and their file, alternating timing, peak memory of a child, other load.

A figure is a ratio within one run, because times of different runs or machines are not comparable. Wall time also
measures other processes, so each figure also has its value by processor time, and each file records the other load.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
HEADER = ("what", "value", "from - to", "by CPU", "unit", "beside", "target", "met")
BUSY_CORES = 0.25  # used by others while measuring: wall time then says little
LOOK_SECONDS = 1.0  # before measuring


@dataclass(frozen=True, slots=True)
class Figure:
    """What some rounds gave, by the wall and by processor time: the median counts, the spread is shown."""

    rounds: Sequence[float]
    cpu_rounds: Sequence[float] = ()

    @property
    def value(self) -> float:
        """Median over the rounds."""
        return median(self.rounds)

    @property
    def by_cpu(self) -> Figure:
        """By processor time alone."""
        return Figure(self.cpu_rounds)

    def map(self, change: Callable[[float], float]) -> Figure:
        """Each round as something else: seconds as tokens a second."""
        return Figure([change(v) for v in self.rounds], [change(v) for v in self.cpu_rounds])


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `value` is None where it could not be measured, and `beside` says why; `met` needs a target."""

    name: str
    value: float | None
    unit: str
    beside: str
    target: str
    met: bool | None
    low: float | None = None  # least and largest of several rounds
    high: float | None = None
    cpu: float | None = None  # the same figure by processor time, of all threads and child processes


def measured(
    name: str,
    figure: Figure | float,
    unit: str,
    beside: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """A measured figure and whether it keeps its limit, if it has one."""
    if not isinstance(figure, Figure):
        figure = Figure([figure])
    value, cpu = figure.value, median(figure.cpu_rounds) if figure.cpu_rounds else None
    low, high = (min(figure.rounds), max(figure.rounds)) if len(figure.rounds) > 1 else (None, None)
    target, met = "", None
    if at_least is not None:
        target, met = f">= {at_least:,.12g} {unit}".rstrip(), value >= at_least
    elif at_most is not None:
        target, met = f"<= {at_most:,.12g} {unit}".rstrip(), value <= at_most
    return Row(name, value, unit, beside, target, met, low, high, cpu)


def unmeasured(name: str, why: str, target: str = "") -> Row:
    """The row of a figure that this machine cannot give, such as "needs a GPU"."""
    return Row(name, None, "", why, target, None)


def machine() -> dict[str, Any]:
    """What the figures depend on, without anything that says whose machine it is."""
    info = {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _line_of("/proc/cpuinfo", "model name") or platform.machine(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    torch = sys.modules.get("torch")  # what did not load it, did not use a GPU
    if torch is not None and torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def _line_of(path: str, key: str) -> str:
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


class OtherLoad:
    """How many cores other processes use: `before` over a moment, `during` since then."""

    def __init__(self, look_seconds: float) -> None:
        self._start = _clocks()
        time.sleep(look_seconds)
        self.before, self._start = _cores_of_others(self._start), _clocks()

    @property
    def during(self) -> float | None:
        """Cores since the look; None where the system does not say."""
        return _cores_of_others(self._start)

    def sentence(self) -> str:
        """For the terminal."""
        if self.before is None or self.during is None:
            return "how much other processes use, this system does not say"
        busy = "; wall time says little: read the figures by CPU" if self.during > BUSY_CORES else ""
        cores = len(os.sched_getaffinity(0))
        return f"other processes used {self.before:.1f} of {cores} cores before and {self.during:.1f} during{busy}"


def _clocks() -> tuple[float, float, float | None]:
    """Wall seconds, processor seconds of this process and its ended children, and those of the whole machine."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return time.perf_counter(), cpu_seconds(), None
    user, nice, system, _idle, _waiting, *interrupts = map(int, stat.read_text().splitlines()[0].split()[1:8])
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), cpu_seconds(), busy


def _cores_of_others(since: tuple[float, float, float | None]) -> float | None:
    wall, own, machine_busy = (None if a is None else a - b for a, b in zip(_clocks(), since, strict=True))
    return None if machine_busy is None or not wall else max(0.0, (machine_busy - own) / wall)


def cpu_seconds() -> float:
    """Processor seconds of this process and of its child processes that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def save(name: str, rows: Sequence[Row], folder: Path = RESULTS, load: OtherLoad | None = None) -> None:
    """Write the rows, the machine they were measured on and its other load, and print them."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    if load is not None:
        content["machine"]["cores_of_others"] = {"before": load.before, "during": load.during}
    text = json.dumps(content, indent=1, default=np.generic.item)
    (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
    print(table(rows))


def load(name: str, folder: Path = RESULTS) -> list[Row]:
    """The rows that `save` wrote."""
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return [Row(**row) for row in content["rows"]]


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    from tabulate import tabulate

    shown = {True: "yes", False: "NO", None: ""}
    cells = [
        [r.name, _number(r.value), _spread(r), _number(r.cpu, ""), r.unit, r.beside, r.target, shown[r.met]]
        for r in rows
    ]
    widths = [34, None, None, None, 12, 48, 24]
    aligned = ("left", "right", "right", "right")
    return tabulate(cells, HEADER, disable_numparse=True, colalign=aligned, maxcolwidths=widths)


def _spread(shown: Row) -> str:
    return "" if shown.low is None else f"{_number(shown.low)} - {_number(shown.high)}"


def _number(value: float | None, absent: str = "-") -> str:
    if value is None:
        return absent
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def script(
    name: str,
    doc: str | None,
    measure: Callable[[argparse.Namespace], list[Row]],
    add_options: Callable[[argparse.ArgumentParser], object] | None = None,
) -> None:
    """The command line of a benchmark: options, then `measure`, then the table and its file."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it works, measures nothing")
    parser.add_argument("--out", type=Path, help="folder of the result file  [default: benchmarks/results, or none]")
    if add_options:
        add_options(parser)
    arguments = parser.parse_args()
    load = OtherLoad(0.0 if arguments.quick else LOOK_SECONDS)
    rows = measure(arguments)
    if arguments.quick and arguments.out is None:
        print(table(rows))
    else:
        save(name, rows, arguments.out or RESULTS, load)
    print(load.sentence())


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each contestant in each round, by the wall and by processor time."""

    wall: Mapping[str, Sequence[float]]
    cpu: Mapping[str, Sequence[float]]

    def of(self, name: str) -> Figure:
        """Seconds."""
        return Figure(self.wall[name], self.cpu[name])

    def ratio(self, slow: str, fast: str) -> Figure:
        """How many times `slow` takes what `fast` takes, by rounds, in each of which both ran."""
        by_wall, by_cpu = (
            [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True) if b] for seconds in (self.wall, self.cpu)
        )
        return Figure(by_wall, by_cpu)


def side_by_side(contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: bool = True) -> Times:
    """Time the contestants in turns, so that a slow minute of the machine is everybody's.

    On a busy machine the processor time of one thread repeats; that of several counts those that spin, too.
    """
    if warm_up:
        for run in contestants.values():
            run()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            found[name].append(timed(run)[:2])
    wall, cpu = ({name: [pair[clock] for pair in pairs] for name, pairs in found.items()} for clock in (0, 1))
    return Times(wall, cpu)


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds by wall and processors, and the result of one call; no garbage of an earlier one is collected within."""
    gc.collect()
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = run()
    return time.perf_counter() - wall, cpu_seconds() - cpu, result


# A process begins with the peak memory of the one that starts it: a small one in between keeps ours out of the figure.
_LAUNCH = """
import os, sys, time
started = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
seconds = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
print("=", os.waitstatus_to_exitcode(status), usage.ru_maxrss, *seconds, flush=True)
"""


@dataclass(frozen=True, slots=True)
class ChildRun:
    """What a child process took."""

    seconds: float
    cpu_seconds: float
    peak_gib: float  # resident memory at its highest
    output: str
    code: int

    @property
    def figure(self) -> Figure:
        """Seconds of the one run."""
        return Figure([self.seconds], [self.cpu_seconds])


def run_child(command: Sequence[str], allowed: Sequence[int] = (0,)) -> ChildRun:
    """Run a command to its end; `allowed` are the exit codes that are no failure.

    Raises:
        subprocess.CalledProcessError: it failed; what it said on standard error is shown.
    """
    launched = [sys.executable, "-IS", "-c", _LAUNCH, *command]
    done = subprocess.run(launched, stdout=subprocess.PIPE, text=True, check=True)
    output, _, figures = done.stdout.rpartition("=")
    code, kib, seconds, cpu = figures.split()
    if int(code) not in allowed:
        raise subprocess.CalledProcessError(int(code), list(command), output)
    return ChildRun(float(seconds), float(cpu), int(kib) / 2**20, output, int(code))
