"""Bootstrap intervals of F1 and AP, compared with a new evaluation of every resample.

    PYTHONPATH=src python -m benchmarks.bootstrap [--images 5000] [--predictions 20]

Ours matches once and counts again under weights. The other builds each resample as a data set (with repeated images)
and evaluates it: COCO numbers with the fast backend, F1 with a new matching. It does this for a few resamples, and its
time is extrapolated to all of them. On these few, both must give the same numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from benchmarks.coco_like import VAL_IMAGES, names, write_results
from benchmarks.harness import Row, measured, side_by_side
from numpy.typing import NDArray

from benchmarks import harness
from coordexp.config.schema import EvalParams
from coordexp.evaluation.bootstrap import resample_weights, resampled_ap, resampled_f1
from coordexp.evaluation.coco import coco_ap
from coordexp.evaluation.f1 import match_greedily, micro_f1
from coordexp.evaluation.matched import Matched
from coordexp.evaluation.protocol import STANDARD, STANDARD_SEED, f1_thresholds
from coordexp.evaluation.table import DetectionTable, build_table
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ImageResult, read_results

CATEGORIES = [Category(i, name, "train") for i, name in enumerate(names(), 1)]
SPEED, TOLERANCE = 100.0, 1e-9


def resampled(table: DetectionTable, params: EvalParams) -> dict[str, NDArray[np.float64]]:
    """The samples of mAP and F1 from one matching, which is part of the time."""
    matched = Matched.of(table, params)
    weights_BI = resample_weights(table.n_images, params.bootstrap_resamples, STANDARD_SEED)
    samples = resampled_ap(matched.by_score, weights_BI, {"coco": list(range(len(CATEGORIES)))})
    return samples | resampled_f1(matched.by_iou, weights_BI)


def drawn_table(results: Sequence[ImageResult], weights_I: NDArray[np.int64]) -> DetectionTable:
    """A resample as a data set of its own: an image that is drawn twice is there twice."""
    images = [r for r, n in zip(results, weights_I.tolist(), strict=True) for _ in range(n)]
    return build_table([replace(r, image_id=i) for i, r in enumerate(images, 1)], CATEGORIES, STANDARD)


def evaluated(table: DetectionTable, params: EvalParams) -> tuple[float | None, float]:
    """mAP and F1 of a data set, from the start."""
    mean_ap = coco_ap(table, "faster-coco-eval").stats["mAP"]
    return mean_ap, micro_f1(match_greedily(table, min(f1_thresholds(params))), 0.5, "full")


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Seconds of all resamples both ways."""
    n_images, few = (80, 2) if arguments.quick else (arguments.images, arguments.few)
    n = 50 if arguments.quick else 1000
    params = STANDARD.model_copy(update={"bootstrap_resamples": n})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "gt_vs_pred.jsonl"
        write_results(path, n_images, arguments.predictions)
        results = list(read_results(path))
    table = build_table(results, CATEGORIES, params)
    weights_BI = resample_weights(n_images, n, STANDARD_SEED)
    drawn = iter([drawn_table(results, weights_I) for weights_I in weights_BI[:few]])
    found, samples = [], resampled(table, params)
    ways = {
        "ours": lambda: resampled(table, params),
        "one anew": lambda: found.append(evaluated(next(drawn), params)),
    }
    times = side_by_side(ways, few, warm_up=False)
    for b, (mean_ap, f1) in enumerate(found):
        assert mean_ap is not None
        assert abs(mean_ap - samples["coco.mAP"][b]) < TOLERANCE
        assert abs(f1 - samples["f1.full_50"][b]) < TOLERANCE
    what = f"{n:,} resamples of {n_images:,} images with {arguments.predictions} predictions each"
    beside = f"evaluating each resample: {times.of('one anew').value:.2f} s, from {few} of them"
    ratio = times.ratio("one anew", "ours").map(lambda one: one * n)
    return [
        measured("bootstrap: times faster", ratio, "x", beside, at_least=SPEED),
        measured("bootstrap: time", times.of("ours"), "s", what),
    ]


def options(parser: argparse.ArgumentParser) -> None:
    """How large the set is, and how often the slow way is taken."""
    parser.add_argument("--images", type=int, default=VAL_IMAGES)
    parser.add_argument("--predictions", type=int, default=20, help="per image")
    parser.add_argument("--few", type=int, default=3, help="resamples that are evaluated anew")


if __name__ == "__main__":
    harness.script("bootstrap", __doc__, measure, options)
