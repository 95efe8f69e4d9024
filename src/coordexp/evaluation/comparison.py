"""Is A better than B? The paired difference of two evaluations, and the images that changed most."""

from __future__ import annotations

from typing import Any

import numpy as np

from coordexp.errors import DataError
from coordexp.evaluation.bootstrap import difference
from coordexp.evaluation.evaluator import Evaluation
from coordexp.evaluation.registry import view


def compare(a: Evaluation, b: Evaluation) -> dict[str, dict[str, float] | None]:
    """The paired difference a - b of the headline metrics over the same images, resample by resample.

    Returns:
        metric -> `delta` (of the point values), `lo` and `hi` (95 % interval), `p_superior` (probability that a is
        better, ties counted half); None for a metric that is undefined on either side.

    Raises:
        DataError: the two sides differ in images, in ground truth, or in the bootstrap's seed or number of resamples.
    """
    _check_pairable(a, b)
    compared: dict[str, dict[str, float] | None] = {}
    for key in view("compared", a.settings):
        value_a, value_b = a.value(key), b.value(key)
        if value_a is None or value_b is None:
            compared[key] = None
        else:
            compared[key] = difference(a.samples[key], b.samples[key], value_a - value_b)
    return compared


def _check_pairable(a: Evaluation, b: Evaluation) -> None:
    ids_a, ids_b = set(a.table.image_ids_I.tolist()), set(b.table.image_ids_I.tolist())
    if ids_a != ids_b:
        only = sorted(ids_a ^ ids_b)
        raise DataError(
            f"The two evaluations hold different images: {len(only)} ids are in one only, for example {only[0]}. "
            "A paired comparison needs identical image lists; decode both on the same split."
        )
    names = ("gt_image_G", "gt_boxes_G4", "gt_category_G", "gt_crowd_G")
    if not all(np.array_equal(getattr(a.table, name), getattr(b.table, name)) for name in names):
        raise DataError("The two evaluations annotate the same images differently; use one version of the data.")
    draws_a, draws_b = ((e.settings.seed, e.settings.bootstrap_resamples) for e in (a, b))
    if draws_a != draws_b:
        raise DataError(
            f"Bootstrap (seed, resamples) is {draws_a} on one side, {draws_b} on the other; use one setting."
        )


def most_changed_images(a: Evaluation, b: Evaluation, n: int) -> list[dict[str, Any]]:
    """The n images whose F1 (names included, IoU 0.5) differs most between a and b, largest difference first."""
    _check_pairable(a, b)
    rows = [
        {
            "image_id": row_a["image_id"],
            "image": row_a["image"],
            "f1_full_50_a": row_a["f1_full_50"],
            "f1_full_50_b": row_b["f1_full_50"],
            "delta": row_a["f1_full_50"] - row_b["f1_full_50"],
        }
        for row_a, row_b in zip(a.per_image, b.per_image, strict=True)
    ]
    return sorted(rows, key=lambda row: -abs(row["delta"]))[:n]
