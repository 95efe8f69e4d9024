"""Set behavior of predictions: duplicates, omissions, over-generation, order, and boxes that cover the whole image.

Legend: I images, P predictions. Names are compared after normalization, whether or not they map to a category.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from coordexp.config.schema import EvalParams
from coordexp.evaluation.f1 import GreedyMatches
from coordexp.evaluation.protocol import iou_key
from coordexp.evaluation.table import Bools, DetectionTable, Floats, Ints, image_slices
from coordexp.geometry.boxes import area, paired_iou, pairwise_intersection

GIANT_SHARE = 0.9  # minimum fraction of the image's area, and of the area of each covered object
GT_COUNT_BUCKETS = ((0, 0), (1, 1), (2, 3), (4, 6), (7, 12), (13, 25), (26, None))


def set_metrics(
    table: DetectionTable, matches: GreedyMatches, duplicates: Duplicates, params: EvalParams
) -> dict[str, float | None]:
    """The `set` area of the metrics; rates are None if their denominator is 0."""
    dup_pairs = {u: duplicates.per_image(u) for u in params.duplicate_ious}
    excess_I = table.n_pred_I - table.n_gt_I
    missed_I = matches.counts(0.5, "loc")[:, 2]
    violations_I, steps_I = order_violations(table)
    metrics: dict[str, float | None] = {
        f"dup_pairs_{iou_key(u)}": float(pairs_I.mean()) for u, pairs_I in dup_pairs.items()
    }
    return metrics | {
        "dup_image_rate": float((dup_pairs[min(dup_pairs)] > 0).mean()),
        "count_error_mean": float(excess_I.mean()),
        "omission_rate": _ratio(missed_I, table.n_gt_I),
        "over_generation_rate": _ratio(np.maximum(excess_I, 0), table.n_pred_I),
        "order_violation_rate": _ratio(violations_I, steps_I),
        "giant_box_rate": float(giant_images(table).mean()),
    }


def _ratio(numerator_I: Ints, denominator_I: Ints) -> float | None:
    total = int(denominator_I.sum())
    return int(numerator_I.sum()) / total if total else None


@dataclass(frozen=True, slots=True, eq=False)
class Duplicates:
    """Overlapping pairs of predictions of one image and one name, as rows of the DetectionTable; first < second."""

    n_images: int
    image_D: Ints
    first_D: Ints
    second_D: Ints
    iou_D: Floats

    def per_image(self, iou: float) -> Ints:
        """(I,) number of pairs with IoU >= `iou`."""
        return np.bincount(self.image_D[self.iou_D >= iou], minlength=self.n_images)


def find_duplicates(table: DetectionTable, min_iou: float) -> Duplicates:
    """All pairs of one image and one name with IoU >= `min_iou`."""
    order = np.lexsort((table.pred_name_P, table.pred_image_P))  # stable: keeps generation order within a name
    image, name, boxes = (c[order] for c in (table.pred_image_P, table.pred_name_P, table.pred_boxes_P4))
    row = np.arange(len(order))
    firsts, seconds, ious = [row[:0]], [row[:0]], [np.empty(0)]
    # Compare each prediction with the one `step` positions later, as long as some name occurs that often in an image.
    for step in range(1, len(order)):
        row = row[row + step < len(order)]
        row = row[(image[row] == image[row + step]) & (name[row] == name[row + step])]
        if not len(row):
            break
        iou = paired_iou(boxes[row], boxes[row + step])
        close = iou >= min_iou
        firsts.append(row[close])
        seconds.append(row[close] + step)
        ious.append(iou[close])
    first, second = order[np.concatenate(firsts)], order[np.concatenate(seconds)]
    return Duplicates(table.n_images, table.pred_image_P[first], first, second, np.concatenate(ious))


def first_of_duplicates(n_pred: int, duplicates: Duplicates, iou: float) -> Bools:
    """(P,) the predictions that NMS in generation order keeps: all without a kept earlier duplicate."""
    keep_P = np.ones(n_pred, dtype=bool)
    close = duplicates.iou_D >= iou
    pairs = sorted(zip(duplicates.second_D[close].tolist(), duplicates.first_D[close].tolist(), strict=True))
    for second, first in pairs:  # sorted by the later one, so that every earlier one is already decided
        if keep_P[first]:
            keep_P[second] = False
    return keep_P


def order_violations(table: DetectionTable) -> tuple[Ints, Ints]:
    """(I,) neighbors in generation order whose (y1, x1) decreases, and (I,) all neighbors, per image."""
    y1_P, x1_P = table.pred_boxes_P4[:, 1], table.pred_boxes_P4[:, 0]
    neighbours = table.pred_image_P[1:] == table.pred_image_P[:-1]
    decreasing = (y1_P[1:] < y1_P[:-1]) | ((y1_P[1:] == y1_P[:-1]) & (x1_P[1:] < x1_P[:-1]))
    image = table.pred_image_P[1:]
    counted = [np.bincount(image[flag], minlength=table.n_images) for flag in (neighbours & decreasing, neighbours)]
    return counted[0], counted[1]


def giant_images(table: DetectionTable) -> Bools:
    """(I,) whether one box covers 90 % of the image and 90 % of each of at least two objects."""
    image_area_I = table.sizes_wh_I2.prod(axis=1).astype(np.float64)
    wide_P = area(table.pred_boxes_P4) >= GIANT_SHARE * image_area_I[table.pred_image_P]
    gt_slices = image_slices(table.gt_image_G, table.n_images)
    giant_I = np.zeros(table.n_images, dtype=bool)
    for row in np.flatnonzero(wide_P):
        image = table.pred_image_P[row]
        objects = table.gt_boxes_G4[gt_slices[image]][~table.gt_crowd_G[gt_slices[image]]]
        covered = pairwise_intersection(table.pred_boxes_P4[row : row + 1], objects)[0] >= GIANT_SHARE * area(objects)
        giant_I[image] |= covered.sum() >= 2
    return giant_I


def omission_by_gt_count(matches: GreedyMatches) -> list[dict[str, Any]]:
    """Omission rate and count error by the number of objects in the image, for the buckets with images."""
    missed_I, excess_I = matches.counts(0.5, "loc")[:, 2], matches.n_pred_I - matches.n_gt_I
    rows = []
    for low, high in GT_COUNT_BUCKETS:
        inside_I = (matches.n_gt_I >= low) & (matches.n_gt_I <= (np.inf if high is None else high))
        if inside_I.any():
            rows.append(
                {
                    "n_gt": f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}",
                    "n_images": int(inside_I.sum()),
                    "omission_rate": _ratio(missed_I[inside_I], matches.n_gt_I[inside_I]),
                    "count_error_mean": float(excess_I[inside_I].mean()),
                }
            )
    return rows


def mean_matched_iou(matches: GreedyMatches, iou: float) -> Floats:
    """(I,) mean IoU of an image's matches at a threshold; NaN for an image without matches."""
    matched_M, n_images = matches.at(iou), len(matches.n_gt_I)
    n_I = np.bincount(matches.image_M[matched_M], minlength=n_images)
    sum_I = np.bincount(matches.image_M[matched_M], weights=matches.iou_M[matched_M], minlength=n_images)
    return np.divide(sum_I, n_I, out=np.full(n_images, np.nan), where=n_I > 0)
