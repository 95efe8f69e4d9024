"""How long the command line takes to answer: `coordexp --help`, and `coordexp evaluate` on ten images.

    PYTHONPATH=src python -m benchmarks.startup

Each in a process of its own, as a user starts it, beside an interpreter that does nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.coco_like import write_results
from benchmarks.harness import Row, run_child, side_by_side

from benchmarks import harness

ROUNDS = 7
HELP_SECONDS, EVALUATE_SECONDS = 0.3, 1.5


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Median seconds of both commands."""
    command = [sys.executable, "-m", "coordexp.cli"]
    with TemporaryDirectory() as folder:
        results, out = Path(folder) / "gt_vs_pred.jsonl", Path(folder) / "metrics.json"
        write_results(results, n_images=10, n_predictions=8)
        contestants = {
            "nothing": lambda: run_child([sys.executable, "-c", ""]),
            "help": lambda: run_child([*command, "--help"]),
            "evaluate": lambda: run_child([*command, "evaluate", str(results), "--out", str(out)]),
        }
        times = side_by_side(contestants, rounds=1 if arguments.quick else ROUNDS, warm_up=not arguments.quick)
    beside = f"an empty interpreter: {times.of('nothing'):.3f} s"
    seconds = [
        ("--help", times.of("help"), HELP_SECONDS),
        ("evaluate, 10 images", times.of("evaluate"), EVALUATE_SECONDS),
    ]
    return [
        Row(f"start-up: coordexp {name}", value, "s", beside, f"<= {limit} s", value <= limit)
        for name, value, limit in seconds
    ]


if __name__ == "__main__":
    harness.script("startup", __doc__, measure)
