"""Two evaluations of the same images: paired differences of their metrics, and the images that changed most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coordexp.errors import DataError
from coordexp.evaluation.bootstrap import resample_weights
from coordexp.evaluation.effect import LEVEL, Effect, effect
from coordexp.evaluation.evaluator import Evaluation
from coordexp.evaluation.registry import view
from coordexp.evaluation.table import Floats


def compare(a: Evaluation, b: Evaluation) -> dict[str, dict[str, float] | None]:
    """The paired difference a - b of the headline metrics over the same images, resample by resample.

    Returns:
        metric -> `delta` (of the point values), `lo` and `hi` (95 % interval), `p_superior` (probability that a is
        better, ties counted half); None for a metric that is undefined on either side.

    Raises:
        DataError: the two sides differ in images, in ground truth, or in the bootstrap's seed or number of resamples.
    """
    shown = ("delta", "lo", "hi", "p_superior")
    effects = {key: paired_effect([a], [b], key) for key in view("compared", a.params)}
    return {
        key: None if found is None else {name: getattr(found, name) for name in shown} for key, found in effects.items()
    }


def paired_effect(
    ours: Sequence[Evaluation], theirs: Sequence[Evaluation], key: str, level: float = LEVEL
) -> Effect | None:
    """The effect ours - theirs on one metric; both list their evaluations seed by seed in the same order.

    None if the metric is undefined on either side; raises DataError like `compare`.
    """
    for evaluation in (*ours, *theirs):
        _check_pairable(evaluation, theirs[0])
    pairs = list(zip(ours, theirs, strict=True))
    values = [(a.value(key), b.value(key)) for a, b in pairs]
    deltas = [a - b for a, b in values if a is not None and b is not None]
    if len(deltas) < len(pairs):
        return None
    return effect(np.array(deltas), np.stack([_samples(a, key) - _samples(b, key) for a, b in pairs]), level)


def _samples(evaluation: Evaluation, key: str) -> Floats:
    """A metric in each resample, (B,); one that is not kept is the mean of its per-image values."""
    if key in evaluation.samples:
        return evaluation.samples[key]
    name = key.partition(".")[2]
    values_I = np.array([row[name] for row in evaluation.per_image], np.float64)
    weights_BI = resample_weights(len(values_I), evaluation.params.bootstrap_resamples, evaluation.seed)
    return weights_BI @ values_I / len(values_I)


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
    draws_a, draws_b = ((e.seed, e.params.bootstrap_resamples) for e in (a, b))
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
