"""Start-up time of the command line: `coordexp --help`, `evaluate` on ten images, `predict` on one image.

    PYTHONPATH=src python -m benchmarks.startup

Each runs in its own process, compared with an empty interpreter; for `predict`, which loads torch and transformers, the
figure is in CPU seconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.coco_like import write_results
from benchmarks.harness import Row, measured, run_child, side_by_side
from PIL import Image

from benchmarks import harness

ROUNDS = 5
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
        picture = Path(folder) / "grey.png"
        Image.new("RGB", (128, 128), "grey").save(picture)
        asked = [*command, "predict", str(picture), "--checkpoint", str(CHECKPOINT)]
        contestants["predict"] = lambda: run_child(asked)
        times = side_by_side(contestants, 1 if arguments.quick else ROUNDS, warm_up=not arguments.quick)
    beside, cpu = f"an empty interpreter: {times.of('nothing').value:.3f} s", times.of("predict").by_cpu
    return [
        measured("start-up: coordexp --help", times.of("help"), "s", beside, at_most=HELP_SECONDS),
        measured("start-up: coordexp evaluate, 10 images", times.of("evaluate"), "s", beside, at_most=EVALUATE_SECONDS),
        measured("start-up: coordexp predict, 1 picture", cpu, "CPU s", "whole process", at_most=PREDICT_CPU_SECONDS),
    ]


if __name__ == "__main__":
    harness.script("startup", __doc__, measure)
