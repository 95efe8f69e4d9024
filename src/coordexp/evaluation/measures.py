"""Measures for questions, in addition to the metrics: each is a function of the image weights.

A bootstrap resample is a vector of image weights, so it needs no new matching, and every measure has a paired interval.
A measure depends on one set of predictions alone, so stored answers are sufficient.

Legend: I images, B resamples, M matched pairs, S = 4 M coordinates of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from coordexp.evaluation.f1 import match_greedily
from coordexp.evaluation.table import Bools, DetectionTable, Floats, Ints
from coordexp.geometry.bins import NUM_BINS
from coordexp.geometry.boxes import paired_iou_giou

Statistic = Callable[[Floats | Ints], Floats]  # image weights (B, I) -> value (B,), NaN if undefined
LEAST_IOU = 0.1  # minimum of a class-agnostic pair: below it, the object counts as missed rather than misplaced
CROWDED = 10  # minimum number of objects in a crowded image
NEAR_BINS = 0.1  # maximum distance from a boundary between two bins, or from the center of a bin


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure; `better` is the direction of improvement."""

    meaning: str
    unit: str
    better: Literal["higher", "lower", "neither"]
    statistic: Callable[[DetectionTable], Statistic]


def ratio(numerator_I: Floats | Ints, denominator_I: Floats | Ints) -> Statistic:
    """The ratio of two weighted sums over images."""

    def statistic(weights_BI: Floats | Ints) -> Floats:
        weights = np.asarray(weights_BI, np.float64)
        top, bottom = weights @ numerator_I, weights @ denominator_I
        return np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)

    return statistic


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Predictions matched one to one with objects by IoU, class-agnostic."""

    image_M: Ints
    iou_M: Floats
    giou_M: Floats
    pred_bins_M4: Floats
    true_bins_M4: Floats
    n_images: int

    @classmethod
    def of(cls, table: DetectionTable) -> _Pairs:
        found = match_greedily(table, LEAST_IOU)
        pred_M4, gt_M4 = table.pred_boxes_P4[found.pred_M], table.gt_boxes_G4[found.gt_M]
        scale_M4 = NUM_BINS / np.tile(table.sizes_wh_I2[found.image_M], (1, 2))
        iou_M, giou_M = paired_iou_giou(pred_M4, gt_M4)
        return cls(found.image_M, iou_M, giou_M, pred_M4 * scale_M4, gt_M4 * scale_M4, table.n_images)

    def mean(self, values_M: Floats | Bools) -> Statistic:
        """The mean over pairs."""
        n_I = np.bincount(self.image_M, minlength=self.n_images)
        return ratio(np.bincount(self.image_M, weights=values_M, minlength=self.n_images), n_I)


def matched_ious(table: DetectionTable) -> Floats:
    """(M,) IoU of each matched pair, for figures of their distribution."""
    return _Pairs.of(table).iou_M


def _iou(table: DetectionTable, above: float | None = None) -> Statistic:
    pairs = _Pairs.of(table)
    return pairs.mean(pairs.iou_M if above is None else pairs.iou_M >= above)


def _giou_loss(table: DetectionTable) -> Statistic:
    pairs = _Pairs.of(table)
    return pairs.mean(1 - pairs.giou_M)


def _bin_error(table: DetectionTable) -> Statistic:
    pairs = _Pairs.of(table)
    return pairs.mean(np.abs(pairs.pred_bins_M4 - pairs.true_bins_M4).mean(axis=1))


def _boundary_excess(table: DetectionTable) -> Statistic:
    """Mean error of coordinates near a boundary between bins, minus that of coordinates near the center of a bin."""
    pairs = _Pairs.of(table)
    image_S = np.repeat(pairs.image_M, 4)
    error_S = np.abs(pairs.pred_bins_M4 - pairs.true_bins_M4).reshape(-1)
    from_centre_S = np.abs(pairs.true_bins_M4 - np.round(pairs.true_bins_M4)).reshape(-1)
    sides = []
    for chosen_S in (from_centre_S > 0.5 - NEAR_BINS, from_centre_S < NEAR_BINS):
        n_I = np.bincount(image_S[chosen_S], minlength=table.n_images)
        sides.append(ratio(np.bincount(image_S[chosen_S], error_S[chosen_S], minlength=table.n_images), n_I))
    near, central = sides
    return lambda weights_BI: near(weights_BI) - central(weights_BI)


def _crowded_recall(table: DetectionTable) -> Statistic:
    found_I = match_greedily(table, 0.5).counts(0.5, "full")[:, 0]
    crowded_I = table.n_gt_I >= CROWDED
    return ratio(found_I * crowded_I, table.n_gt_I * crowded_I)


def _count_error(table: DetectionTable) -> Statistic:
    return ratio(np.abs(table.n_pred_I - table.n_gt_I), np.ones(table.n_images))


def _stops(table: DetectionTable, early: bool) -> Statistic:
    excess_I = table.n_pred_I - table.n_gt_I
    stops_I = excess_I < 0 if early else excess_I > 0
    return ratio(stops_I.astype(np.float64), np.ones(table.n_images))


MEASURES = {
    "geometry.iou": Measure("mean IoU of matched boxes, names ignored", "0..1", "higher", _iou),
    **{
        f"geometry.iou_{round(100 * u)}": Measure(
            f"fraction of matched boxes with IoU >= {u:g}", "0..1", "higher", partial(_iou, above=u)
        )
        for u in (0.75, 0.9)
    },
    "geometry.giou_loss": Measure("mean 1 - GIoU of matched boxes", "0..2", "lower", _giou_loss),
    "geometry.bin_error": Measure("mean error of the coordinates of matched boxes", "bins", "lower", _bin_error),
    "geometry.boundary_excess": Measure(
        f"error of coordinates within {NEAR_BINS:g} bin of a boundary between bins, minus within {NEAR_BINS:g} of a "
        "centre",
        "bins", "lower", _boundary_excess,
    ),
    "set.crowded_recall": Measure(
        f"recall, names included, IoU .50, of images with {CROWDED} objects or more", "0..1", "higher", _crowded_recall
    ),
    "set.count_error_abs": Measure("|predictions - objects|, mean over images", "objects", "lower", _count_error),
    "set.stops_early": Measure(
        "images with fewer predictions than objects", "0..1", "lower", partial(_stops, early=True)
    ),
    "set.stops_late": Measure(
        "images with more predictions than objects", "0..1", "lower", partial(_stops, early=False)
    ),
}  # fmt: skip
