"""Error types and their cost in AP: the six errors of TIDE (Bolya et al. 2020, arXiv:2008.08115, section 2).

Predictions are matched as COCO does at IoU .50, by falling score. A false positive has the first type that applies:

| type | the prediction's largest IoU |
|---|---|
| localization | with an object of its label: .10 to .50 |
| classification | with an object of another label: .50 or more |
| duplicate | with an object of its label that a better-ranked prediction matches: .50 or more |
| background | with any object: under .10 |
| both | none of these: .10 to .50, with an object of another label |

An object is missed if no prediction matches it and no localization or classification error belongs to it. The cost of a
type is AP50 after an oracle fixed all errors of the type, minus AP50. Fixed localization and classification errors
become true positives if they are the best-ranked candidate of an unmatched object, and are removed otherwise;
duplicate, background and both errors are removed; missed objects are removed from the ground truth. Costs do not add up
to 1 - AP50.

Legend: P predictions, G annotated objects, K categories.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from coordexp.evaluation.average_precision import (
    CategoryMatches,
    match_categories,
    mean_ap,
    ranking_flags,
    unweighted_ap,
)
from coordexp.evaluation.categories import NO_CATEGORY
from coordexp.evaluation.table import Bools, DetectionTable, Floats, Ints, image_slices
from coordexp.geometry.boxes import pairwise_iou

HIT_IOU = 0.5
BACKGROUND_IOU = 0.1


class Cause(IntEnum):
    """The outcome of a prediction; the value is its position in tables."""

    RIGHT = 0
    CLASSIFICATION = 1
    LOCALIZATION = 2
    BOTH = 3
    DUPLICATE = 4
    BACKGROUND = 5
    NOT_JUDGED = 6  # does not count: inside a crowd region, or beyond the 100 best of its image and label


ERRORS = (Cause.CLASSIFICATION, Cause.LOCALIZATION, Cause.BOTH, Cause.DUPLICATE, Cause.BACKGROUND)


@dataclass(frozen=True, slots=True, eq=False)
class ErrorCauses:
    """The cause of each prediction, and the outcome of each object.

    `object_P` is the object that a correct prediction matches, or to which an incorrect one belongs by its cause (-1:
    none).
    """

    cause_P: Ints
    object_P: Ints
    found_G: Bools  # matched by a correct prediction
    missed_G: Bools  # neither matched, nor the object of a localization or classification error

    def count(self, cause: Cause) -> int:
        """Number of predictions with this cause."""
        return int((self.cause_P == cause).sum())


def find_causes(table: DetectionTable, by_score: list[CategoryMatches] | None = None) -> ErrorCauses:
    """The cause of every prediction of a table; `by_score` are its COCO matches, if already known."""
    right_P, judged_P = ranking_flags(table, by_score if by_score is not None else match_categories(table))
    n_gt = len(table.gt_image_G)
    cause_P = np.where(judged_P, Cause.BACKGROUND, Cause.NOT_JUDGED).astype(np.int64)
    object_P = np.full(len(right_P), -1, dtype=np.int64)
    found_G, near_G = np.zeros(n_gt, dtype=bool), np.zeros(n_gt, dtype=bool)
    slices = zip(
        image_slices(table.pred_image_P, table.n_images), image_slices(table.gt_image_G, table.n_images), strict=True
    )
    for preds, objects in slices:
        rows = np.arange(preds.start, preds.stop)[judged_P[preds]]
        columns = np.arange(objects.start, objects.stop)[~table.gt_crowd_G[objects]]
        if not len(rows) or not len(columns):
            continue
        iou_PG = pairwise_iou(table.pred_boxes_P4[rows], table.gt_boxes_G4[columns])
        same_PG = table.pred_category_P[rows][:, None] == table.gt_category_G[columns][None]
        matched_P = _matches(iou_PG, same_PG, right_P[rows], table.pred_score_P[rows])
        hit_P = matched_P >= 0
        found_G[columns[matched_P[hit_P]]] = True
        cause_P[rows[hit_P]], object_P[rows[hit_P]] = Cause.RIGHT, columns[matched_P[hit_P]]
        for p in np.flatnonzero(~hit_P).tolist():
            cause, g = _cause(iou_PG[p], same_PG[p], found_G[columns])
            cause_P[rows[p]] = cause
            object_P[rows[p]] = -1 if g is None else columns[g]
            if cause in (Cause.LOCALIZATION, Cause.CLASSIFICATION) and g is not None:
                near_G[columns[g]] = True
    return ErrorCauses(cause_P, object_P, found_G, ~found_G & ~near_G & ~table.gt_crowd_G)


def _matches(iou_PG: Floats, same_PG: Bools, right_P: Bools, score_P: Floats) -> Ints:
    """The object of each true positive of one image (else -1): by falling score, the free one with the highest IoU."""
    matched_P = np.full(len(right_P), -1, dtype=np.int64)
    free_G = np.ones(iou_PG.shape[1], dtype=bool)
    for p in np.argsort(-score_P, kind="stable").tolist():
        if right_P[p]:
            open_G = np.where(free_G & same_PG[p], iou_PG[p], -1.0)
            g = len(open_G) - 1 - int(np.argmax(open_G[::-1]))  # the last one on ties, as in pycocotools
            matched_P[p], free_G[g] = g, False
    return matched_P


def _cause(iou_G: Floats, same_G: Bools, found_G: Bools) -> tuple[Cause, int | None]:
    """The cause of one false positive, and the object to which it belongs; the tests are in TIDE's order."""
    own_G, other_G = np.where(same_G, iou_G, 0.0), np.where(same_G, 0.0, iou_G)
    used_G = np.where(found_G, own_G, 0.0)
    own, other, used = int(own_G.argmax()), int(other_G.argmax()), int(used_G.argmax())
    if BACKGROUND_IOU <= own_G[own] < HIT_IOU:
        return Cause.LOCALIZATION, own
    if other_G[other] >= HIT_IOU:
        return Cause.CLASSIFICATION, other
    if used_G[used] >= HIT_IOU:
        return Cause.DUPLICATE, used
    if iou_G.max() < BACKGROUND_IOU:
        return Cause.BACKGROUND, None
    return Cause.BOTH, int(iou_G.argmax())


def error_metrics(table: DetectionTable, causes: ErrorCauses) -> dict[str, float | int | None]:
    """The `errors` area: number of predictions (or objects) of each cause, and its cost in AP50."""
    base = _ap50(table, causes, ())
    metrics: dict[str, float | int | None] = {}
    for cause in ERRORS:
        fixed = _ap50(table, causes, (cause,))
        metrics[cause.name.lower()] = causes.count(cause)
        metrics[f"{cause.name.lower()}_cost"] = None if base is None or fixed is None else fixed - base
    fixed = _ap50(table, causes, (), without_missed=True)
    metrics["missed"] = int(causes.missed_G.sum())
    metrics["missed_cost"] = None if base is None or fixed is None else fixed - base
    return metrics


def _ap50(
    table: DetectionTable, causes: ErrorCauses, fixed: Iterable[Cause], without_missed: bool = False
) -> float | None:
    """AP50 after an oracle fixed all errors of some causes."""
    category_P, hit_P = table.pred_category_P.copy(), causes.cause_P == Cause.RIGHT
    kept_P = (causes.cause_P != Cause.NOT_JUDGED) & (category_P != NO_CATEGORY)
    candidates = _best_candidates(table, causes)
    for cause in fixed:
        of_cause_P = causes.cause_P == cause
        kept_P &= ~of_cause_P
        if cause in (Cause.CLASSIFICATION, Cause.LOCALIZATION):
            best = candidates[causes.cause_P[candidates] == cause]
            kept_P[best], hit_P[best] = True, True
            category_P[best] = table.gt_category_G[causes.object_P[best]]
    asked_G = ~table.gt_crowd_G & ~causes.missed_G if without_missed else ~table.gt_crowd_G
    order = np.argsort(-table.pred_score_P, kind="stable")
    order = order[kept_P[order]]
    matches = [
        _category(order[category_P[order] == k], table, hit_P, asked_G & (table.gt_category_G == k))
        for k in range(len(table.index))
    ]
    return mean_ap(unweighted_ap(matches, table.n_images))


def _best_candidates(table: DetectionTable, causes: ErrorCauses) -> Ints:
    """For each unmatched object, its best-ranked localization or classification error: the one that an oracle fixes."""
    fixable_P = np.isin(causes.cause_P, (Cause.CLASSIFICATION, Cause.LOCALIZATION))
    rows = np.flatnonzero(fixable_P)
    rows = rows[~causes.found_G[causes.object_P[rows]]]
    rows = rows[np.argsort(-table.pred_score_P[rows], kind="stable")]
    _, first = np.unique(causes.object_P[rows], return_index=True)
    return rows[first]


def _category(pred_D: Ints, table: DetectionTable, hit_P: Bools, asked_G: Bools) -> CategoryMatches:
    """The ranking of one category at TIDE's only threshold."""
    return CategoryMatches(
        pred_D=pred_D,
        image_D=table.pred_image_P[pred_D],
        tp_TD=hit_P[pred_D][None],
        ignored_TD=np.zeros((1, len(pred_D)), dtype=bool),
        iou_D=np.zeros(len(pred_D)),
        gt_image_G=table.gt_image_G[asked_G],
    )
