"""What every benchmark shares: a row of the table, its file, clocks that take turns, and a child's peak memory.

A figure is a ratio from one run: times of different runs, or machines, are not comparable.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
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
Clock = Callable[[], float]
HEADER = ("what", "value", "unit", "beside", "target", "met")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `value` is None where it could not be measured, and `beside` says why; `met` needs a target."""

    name: str
    value: float | None
    unit: str
    beside: str
    target: str
    met: bool | None


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


def save(name: str, rows: Sequence[Row], folder: Path = RESULTS) -> None:
    """Write the rows and the machine they were measured on, and print them."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    text = json.dumps(content, indent=1, default=np.generic.item)
    (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
    print(table(rows))


def load(name: str, folder: Path = RESULTS) -> list[Row]:
    """The rows that `save` wrote."""
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return [Row(**row) for row in content["rows"]]


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    from tabulate import tabulate  # a GPU machine, which only takes the clocks from here, may lack it

    shown = {True: "yes", False: "NO", None: ""}
    cells = [[r.name, _number(r.value), r.unit, r.beside, r.target, shown[r.met]] for r in rows]
    widths = [38, None, 14, 54, 30]
    return tabulate(cells, HEADER, disable_numparse=True, colalign=("left", "right"), maxcolwidths=widths)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
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
    rows = measure(arguments)
    if arguments.quick and arguments.out is None:
        print(table(rows))
    else:
        save(name, rows, arguments.out or RESULTS)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each contestant in each round."""

    seconds: Mapping[str, Sequence[float]]

    def of(self, name: str) -> float:
        """Median seconds."""
        return median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times `slow` takes what `fast` takes: the median over rounds, in each of which both ran."""
        return median(a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True))


def side_by_side(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: bool = True, clock: Clock = time.perf_counter
) -> Times:
    """Time the contestants in turns, so that a slow minute of the machine is everybody's.

    On a busy machine `time.process_time` of one thread repeats; of several it counts those that spin, too.
    """
    if warm_up:
        for run in contestants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            seconds[name].append(timed(run, clock)[0])
    return Times(seconds)


def timed(run: Callable[[], Any], clock: Clock = time.perf_counter) -> tuple[float, Any]:
    """Seconds by the clock and the result of one call; no garbage of an earlier one is collected within."""
    gc.collect()
    started = clock()
    result = run()
    return clock() - started, result


# A process begins with the peak memory of the one that starts it: a small one in between keeps ours out of the figure.
_LAUNCH = """
import os, sys, time
started = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print("=", os.waitstatus_to_exitcode(status), usage.ru_maxrss, time.perf_counter() - started, flush=True)
"""


@dataclass(frozen=True, slots=True)
class ChildRun:
    """What a child process took."""

    seconds: float
    peak_gib: float  # resident memory at its highest
    output: str
    code: int


def run_child(command: Sequence[str], allowed: Sequence[int] = (0,)) -> ChildRun:
    """Run a command to its end; `allowed` are the exit codes that are no failure.

    Raises:
        subprocess.CalledProcessError: it failed; what it said on standard error is shown.
    """
    launched = [sys.executable, "-IS", "-c", _LAUNCH, *command]
    done = subprocess.run(launched, stdout=subprocess.PIPE, text=True, check=True)
    output, _, figures = done.stdout.rpartition("=")
    code, kib, seconds = figures.split()
    if int(code) not in allowed:
        raise subprocess.CalledProcessError(int(code), list(command), output)
    return ChildRun(float(seconds), int(kib) / 2**20, output, int(code))
