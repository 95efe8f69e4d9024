"""The COCO numbers for a quarter of val2017 compared with pycocotools, and the time of `coordexp evaluate`.

    PYTHONPATH=src python -m benchmarks.coco_evaluation [--images 1250] [--predictions 100]

Both start from arrays or lists in memory. The twelve numbers must be the same, and so must the AP of the bootstrap.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.coco_like import VAL_IMAGES, names, write_results
from benchmarks.harness import Row, measured, run_child, side_by_side
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks import harness
from coordexp.evaluation.average_precision import match_categories, mean_ap, unweighted_ap
from coordexp.evaluation.coco import STAT_NAMES, coco_ap, detection_dataset, ground_truth_dataset
from coordexp.evaluation.protocol import STANDARD
from coordexp.evaluation.table import DetectionTable, build_table
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import read_results

SPEED, TOLERANCE = 5.0, 1e-9
ROUNDS = 3


def load_table(results: Path) -> DetectionTable:
    """The arrays of a results file."""
    categories = [Category(i, name, "train") for i, name in enumerate(names(), 1)]
    return build_table(list(read_results(results)), categories, STANDARD)


def pycocotools_stats(truth: COCO, found: COCO) -> list[float]:
    """The usual three calls."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats.tolist()


def as_coco(dataset: dict) -> COCO:
    """A pycocotools data set from memory."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dataset
        coco.createIndex()
    return coco


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Times of ours and theirs, and of the command with all metrics and intervals."""
    n_images, n_predictions = (60, 20) if arguments.quick else (arguments.images, arguments.predictions)
    what = f"{n_images:,} images, {n_images * n_predictions:,} predictions"
    with TemporaryDirectory() as folder:
        results = Path(folder) / "gt_vs_pred.jsonl"
        write_results(results, n_images, n_predictions)
        table = load_table(results)
        truth, found = as_coco(ground_truth_dataset(table)), as_coco(detection_dataset(table))
        stats = coco_ap(table, "faster-coco-eval").stats
        expected = dict(zip(STAT_NAMES, pycocotools_stats(truth, found), strict=True))
        largest = max(abs(stats[key] - expected[key]) for key in STAT_NAMES)
        own = mean_ap(unweighted_ap(match_categories(table), table.n_images))
        assert largest < TOLERANCE, (stats, expected)
        assert own is not None
        assert abs(own - expected["mAP"]) < TOLERANCE, (own, expected["mAP"])
        contestants = {
            "ours": lambda: coco_ap(table, "faster-coco-eval"),
            "own AP": lambda: unweighted_ap(match_categories(table), table.n_images),
            "pycocotools": lambda: pycocotools_stats(truth, found),
        }
        times = side_by_side(contestants, 1 if arguments.quick else ROUNDS, warm_up=False)
        out = str(Path(folder) / "metrics.json")
        command = run_child([sys.executable, "-m", "coordexp.cli", "evaluate", str(results), "--out", out])
    beside = f"pycocotools {times.of('pycocotools').value:.1f} s; {what}"
    ratio, own_ratio = times.ratio("pycocotools", "ours"), times.ratio("pycocotools", "own AP")
    return [
        measured("COCO evaluation: times faster", ratio, "x", beside, at_least=SPEED),
        measured("COCO evaluation: largest difference", largest, "", "pycocotools, 12 numbers", at_most=TOLERANCE),
        measured("own AP (for resampling): times faster", own_ratio, "x", beside),
        measured("coordexp evaluate: time", command.figure, "s", f"all metrics and intervals, once; {what}"),
        measured("coordexp evaluate: peak memory", command.peak_gib, "GiB", what),
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """How large the set is."""
    parser.add_argument("--images", type=int, default=VAL_IMAGES // 4)
    parser.add_argument("--predictions", type=int, default=100, help="per image")


if __name__ == "__main__":
    harness.script("coco_evaluation", __doc__, measure, options)
