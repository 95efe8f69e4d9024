"""Comparison of two evaluations of the same images: paired differences of metrics, and the most changed images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coordexp.errors import DataError
from coordexp.evaluation.bootstrap import resample_weights
from coordexp.evaluation.effect import LEVEL, Effect, effect
from coordexp.evaluation.evaluator import Evaluation
from coordexp.evaluation.measures import MEASURES, Statistic
from coordexp.evaluation.registry import view
from coordexp.evaluation.table import Floats, Ints


def compare(a: Evaluation, b: Evaluation) -> dict[str, dict[str, float] | None]:
    """The paired difference a - b of the headline metrics over the same images, resample by resample.

    Returns:
        metric -> `delta` (of the point values), `lo` and `hi` (95 % interval), `p_superior` (fraction of resamples in
        which a is better, ties counted half); None for a metric that is undefined on either side.

    Raises:
        DataError: the sides differ in images or ground truth, or in the seed or number of resamples.
    """
    shown = ("delta", "lo", "hi", "p_superior")
    effects = {key: paired_effect([a], [b], key) for key in view("compared", a.params)}
    return {
        key: None if found is None else {name: getattr(found, name) for name in shown} for key, found in effects.items()
    }


def paired_effect(
    ours: Sequence[Evaluation], theirs: Sequence[Evaluation], key: str, level: float = LEVEL
) -> Effect | None:
    """The effect ours - theirs on one metric; both lists have one evaluation per seed, in the same order.

    None if the metric is undefined on either side; raises DataError like `compare`.
    """
    for evaluation in (*ours, *theirs):
        _check_pairable(evaluation, theirs[0])
    return reading_effect([reading(e, key) for e in ours], [reading(e, key) for e in theirs], level)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """One number of one run, and (B,) the same number in each bootstrap resample of the images."""

    value: float
    samples_B: Floats
    n_images: int


def reading(evaluation: Evaluation, key: str) -> Reading | None:
    """A metric or measure of an evaluation; None if it is undefined.

    Raises:
        KeyError: there is neither a metric nor a measure of that name.
    """
    if key in MEASURES:
        return _measured(evaluation, MEASURES[key].statistic(evaluation.table))
    value, n_images = evaluation.value(key), evaluation.table.n_images
    if value is None:
        return None
    if key in evaluation.samples:
        return Reading(value, evaluation.samples[key], n_images)
    name = key.partition(".")[2]  # a metric without stored resamples is the mean of its per-image values
    values_I = np.array([row[name] for row in evaluation.per_image], np.float64)
    return Reading(value, _weights(evaluation) @ values_I / len(values_I), n_images)


def _measured(evaluation: Evaluation, statistic: Statistic) -> Reading | None:
    n_images = evaluation.table.n_images
    value = float(statistic(np.ones((1, n_images)))[0])
    return None if np.isnan(value) else Reading(value, statistic(_weights(evaluation)), n_images)


def _weights(evaluation: Evaluation) -> Ints:
    return resample_weights(evaluation.table.n_images, evaluation.params.bootstrap_resamples, evaluation.seed)


def reading_effect(
    ours: Sequence[Reading | None], theirs: Sequence[Reading | None] | float, level: float = LEVEL
) -> Effect | None:
    """The effect of readings compared with other readings, paired by seed and resample, or with a number."""
    others = [Reading(theirs, np.zeros(1) + theirs, 0)] * len(ours) if isinstance(theirs, float | int) else theirs
    pairs = [(a, b) for a, b in zip(ours, others, strict=True) if a is not None and b is not None]
    if len(pairs) < len(ours):
        return None
    # Differences are formed within a resample, where both sides have the same images: their common variation cancels.
    return effect(
        np.array([a.value - b.value for a, b in pairs]), np.stack([a.samples_B - b.samples_B for a, b in pairs]), level
    )


def _check_pairable(a: Evaluation, b: Evaluation) -> None:
    ids_a, ids_b = set(a.table.image_ids_I.tolist()), set(b.table.image_ids_I.tolist())
    if ids_a != ids_b:
        only = sorted(ids_a ^ ids_b)
        raise DataError(
            f"The two evaluations hold different images: {len(only)} ids are in one only, for example {only[0]}. "
            "A paired comparison needs the same images on both sides; decode both on the same split."
        )
    names = ("gt_image_G", "gt_boxes_G4", "gt_category_G", "gt_crowd_G")
    if not all(np.array_equal(getattr(a.table, name), getattr(b.table, name)) for name in names):
        raise DataError("The two evaluations annotate the same images differently; use one version of the data.")
    draws_a, draws_b = ((e.seed, e.params.bootstrap_resamples) for e in (a, b))
    if draws_a != draws_b:
        raise DataError(
            f"Bootstrap (seed, resamples) is {draws_a} on one side, {draws_b} on the other; use the same for both."
        )


def most_changed_images(a: Evaluation, b: Evaluation, n: int) -> list[dict[str, Any]]:
    """The n images whose F1 (category names included, IoU 0.5) differs most between a and b, in falling order."""
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
