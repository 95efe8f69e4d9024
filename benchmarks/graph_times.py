"""The time of a `dvc repro` with nothing to do.

    PYTHONPATH=src python -m benchmarks.graph_times

`dvc status` first checks that nothing is to be done, because a benchmark must not start an hour of training. A cold
`make demo` and an A/B run take minutes in a fresh clone and are timed by hand (README has the commands).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks.harness import Row, measured, run_child, side_by_side, unmeasured

from benchmarks import harness

SECONDS = 3.0
BY_HAND = (
    ("graph: make demo, cold", "by hand: time make demo, in a fresh clone", "<= 12 min"),
    ("graph: an A/B run", "by hand: time dvc exp run -S softce_weight=0.2, after make demo", "<= half of the training"),
)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Median seconds of a `dvc repro` that runs nothing."""
    dvc = shutil.which("dvc") or str(Path(sys.executable).with_name("dvc"))
    name, target = "graph: dvc repro, nothing to do", f"<= {SECONDS:g} s"
    by_hand = [unmeasured(what, how, goal) for what, how, goal in BY_HAND]
    if arguments.quick:
        return [measured("graph: dvc --version", run_child([dvc, "--version"]).figure, "s"), *by_hand]
    if run_child([dvc, "status", "--quiet"], allowed=(0, 1)).code:
        return [unmeasured(name, "needs an up-to-date graph: run dvc repro", target), *by_hand]
    commands = {"repro": [dvc, "repro"], "version": [dvc, "--version"]}
    times = side_by_side({name: lambda c=command: run_child(c) for name, command in commands.items()}, rounds=3)
    beside = f"dvc --version: {times.of('version').value:.2f} s"
    return [measured(name, times.of("repro"), "s", beside, at_most=SECONDS), *by_hand]


if __name__ == "__main__":
    harness.script("graph_times", __doc__, measure)
