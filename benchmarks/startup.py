"""How long the command line takes to answer: `coordexp --help`, `evaluate` on ten images, `predict` of one picture.

    PYTHONPATH=src python -m benchmarks.startup

Each in a process of its own, as a user starts it, beside an interpreter that does nothing; of `predict`, which loads
torch and transformers, the CPU seconds.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.coco_like import write_results
from benchmarks.harness import Row, run_child, side_by_side
from PIL import Image

from benchmarks import harness

ROUNDS = 7
HELP_SECONDS, EVALUATE_SECONDS, PREDICT_CPU_SECONDS = 0.3, 1.5, 3.0
CHECKPOINT = Path("models/tiny-base")


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Median seconds of the commands."""
    command = [sys.executable, "-m", "coordexp.cli"]
    with TemporaryDirectory() as folder:
        results, out = Path(folder) / "gt_vs_pred.jsonl", Path(folder) / "metrics.json"
        write_results(results, n_images=10, n_predictions=8)
        contestants = {
            "nothing": lambda: run_child([sys.executable, "-c", ""]),
            "help": lambda: run_child([*command, "--help"]),
            "evaluate": lambda: run_child([*command, "evaluate", str(results), "--out", str(out)]),
        }
        rounds = 1 if arguments.quick else ROUNDS
        times = side_by_side(contestants, rounds, warm_up=not arguments.quick)
        picture = Path(folder) / "grey.png"
        Image.new("RGB", (128, 128), "grey").save(picture)
        asked = [*command, "predict", str(picture), "--checkpoint", str(CHECKPOINT)]
        cpu = side_by_side({"predict": lambda: run_child(asked)}, rounds, not arguments.quick, children_cpu).of(
            "predict"
        )
    beside = f"an empty interpreter: {times.of('nothing'):.3f} s"
    seconds = [
        ("--help", times.of("help"), HELP_SECONDS),
        ("evaluate, 10 images", times.of("evaluate"), EVALUATE_SECONDS),
    ]
    rows = [
        Row(f"start-up: coordexp {name}", value, "s", beside, f"<= {limit} s", value <= limit)
        for name, value, limit in seconds
    ]
    target, met = f"<= {PREDICT_CPU_SECONDS} CPU s", cpu <= PREDICT_CPU_SECONDS
    return [*rows, Row("start-up: coordexp predict, 1 picture", cpu, "CPU s", "to the end of the process", target, met)]


def children_cpu() -> float:
    """Processor seconds of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    harness.script("startup", __doc__, measure)
