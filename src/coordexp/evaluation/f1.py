"""Precision, recall and F1 from a greedy one-to-one matching by IoU alone.

All pairs of an image with IoU >= u are considered in order of falling IoU (ties by prediction, then by object); each
prediction and each object is used once. `loc` counts every pair. `full` uses the same pairs, but a pair whose names
disagree counts as one false positive and one false negative, so a prediction with the correct name can lose its object
to one with an incorrect name.

Crowd regions are not objects: an unmatched prediction does not count if at least a fraction u of it lies inside one.

Legend: I images, G objects, P predictions, M matched pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from coordexp.config.schema import EvalParams
from coordexp.evaluation.protocol import COCO_IOUS, f1_thresholds, iou_key
from coordexp.evaluation.table import Bools, DetectionTable, Floats, Ints, image_slices
from coordexp.geometry.boxes import Boxes, area, pairwise_intersection, pairwise_iou
from coordexp.matching.summary import f1_from_counts

Mode = Literal["loc", "full"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True, eq=False)
class GreedyMatches:
    """Matched pairs of a data set at the lowest threshold, by falling IoU within an image.

    Greedy matching by falling IoU has the prefix property: for every higher u, the pairs with IoU >= u are the matching
    at u.
    """

    n_gt_I: Ints
    n_pred_I: Ints  # all predictions, including those inside crowd regions
    image_M: Ints
    pred_M: Ints  # row in the DetectionTable
    gt_M: Ints
    iou_M: Floats
    same_name_M: Bools
    pred_image_P: Ints
    crowd_share_P: Floats  # largest fraction of the prediction's area inside one crowd region

    def at(self, iou: float) -> Bools:
        """(M,) whether each pair is a match at a threshold."""
        return self.iou_M >= iou

    def counts(self, iou: float, mode: Mode) -> Ints:
        """(I, 3) true positives, false positives and false negatives of each image."""
        n_images = len(self.n_gt_I)
        matched_M = self.at(iou)
        hit_M = matched_M & self.same_name_M if mode == "full" else matched_M
        tp_I = np.bincount(self.image_M[hit_M], minlength=n_images)
        judged_I = np.bincount(self.pred_image_P[self.judged(iou)], minlength=n_images)
        return np.stack([tp_I, judged_I - tp_I, self.n_gt_I - tp_I], axis=1)

    def judged(self, iou: float) -> Bools:
        """(P,) whether each prediction counts: all do except unmatched ones inside a crowd region."""
        judged_P = self.crowd_share_P < iou
        judged_P[self.pred_M[self.at(iou)]] = True
        return judged_P


def greedy_pairs(iou_PG: Floats, min_iou: float) -> tuple[Ints, Ints]:
    """Match one image: rows and columns of the matched pairs, by falling IoU (ties by row, then column)."""
    rows, columns = np.nonzero(iou_PG >= min_iou)
    order = np.argsort(-iou_PG[rows, columns], kind="stable")
    free_rows, free_columns = np.ones(iou_PG.shape[0], dtype=bool), np.ones(iou_PG.shape[1], dtype=bool)
    taken: list[tuple[int, int]] = []
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if free_rows[row] and free_columns[column]:
            free_rows[row] = free_columns[column] = False
            taken.append((row, column))
    pairs = np.array(taken, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def match_greedily(table: DetectionTable, min_iou: float) -> GreedyMatches:
    """Match every image of the table, for counting at any threshold from `min_iou` upward."""
    pred_slices = image_slices(table.pred_image_P, table.n_images)
    gt_slices = image_slices(table.gt_image_G, table.n_images)
    crowd_share_P = np.zeros(len(table.pred_image_P))
    preds, gts, ious = [], [], []
    for in_pred, in_gt in zip(pred_slices, gt_slices, strict=True):
        boxes_P4, crowd_G = table.pred_boxes_P4[in_pred], table.gt_crowd_G[in_gt]
        if not len(boxes_P4) or not len(crowd_G):
            continue
        if crowd_G.any():
            crowd_share_P[in_pred] = _crowd_share(boxes_P4, table.gt_boxes_G4[in_gt][crowd_G])
        objects = np.flatnonzero(~crowd_G) + in_gt.start
        iou_PG = pairwise_iou(boxes_P4, table.gt_boxes_G4[objects])
        rows, columns = greedy_pairs(iou_PG, min_iou)
        preds.append(rows + in_pred.start)
        gts.append(objects[columns])
        ious.append(iou_PG[rows, columns])
    none = np.empty(0, dtype=np.int64)
    pred_M, gt_M = np.concatenate([none, *preds]), np.concatenate([none, *gts])
    return GreedyMatches(
        n_gt_I=table.n_gt_I,
        n_pred_I=table.n_pred_I,
        image_M=table.pred_image_P[pred_M],
        pred_M=pred_M,
        gt_M=gt_M,
        iou_M=np.concatenate([np.empty(0), *ious]),
        same_name_M=table.pred_category_P[pred_M] == table.gt_category_G[gt_M],
        pred_image_P=table.pred_image_P,
        crowd_share_P=crowd_share_P,
    )


def _crowd_share(boxes_P4: Boxes, crowds_C4: Boxes) -> Floats:
    share_P = pairwise_intersection(boxes_P4, crowds_C4).max(axis=1)
    own_P = area(boxes_P4)
    return np.divide(share_P, own_P, out=np.zeros_like(share_P), where=own_P > 0)


def named_in_image(table: DetectionTable) -> Bools:
    """(P,) whether a prediction's category is annotated in its image: the scope `annotated`.

    Counting only these corresponds to prompts that list the image's own categories; counting all is the full
    vocabulary.
    """
    n_categories = len(table.index)
    present = np.unique(table.gt_image_G * n_categories + table.gt_category_G)
    mapped_P = table.pred_category_P >= 0
    return mapped_P & np.isin(table.pred_image_P * n_categories + table.pred_category_P, present)


def image_f1(counts_I3: NDArray) -> Floats:
    """(I,) F1 of each image's own counts; an image without objects has 1 if there is no prediction, otherwise 0."""
    counts_I3 = np.asarray(counts_I3)
    empty_I = (counts_I3 == 0).all(axis=-1)
    return np.where(empty_I, 1.0, np.nan_to_num(f1_from_counts(counts_I3)))


def precision_recall(counts: NDArray) -> tuple[float | None, float | None]:
    """Precision and recall of summed tp, fp, fn; None without predictions, or without annotations."""
    tp, fp, fn = (float(v) for v in counts)
    return tp / (tp + fp) if tp + fp else None, tp / (tp + fn) if tp + fn else None


def category_counts(table: DetectionTable, matches: GreedyMatches, iou: float) -> Ints:
    """(K, 3) true positives (name included), false positives and false negatives of each category."""
    n_categories = len(table.index)
    hit_M = matches.at(iou) & matches.same_name_M
    tp_K = np.bincount(table.gt_category_G[matches.gt_M[hit_M]], minlength=n_categories)
    named_P = matches.judged(iou) & (table.pred_category_P >= 0)
    n_pred_K = np.bincount(table.pred_category_P[named_P], minlength=n_categories)
    n_gt_K = np.bincount(table.gt_category_G[~table.gt_crowd_G], minlength=n_categories)
    return np.stack([tp_K, n_pred_K - tp_K, n_gt_K - tp_K], axis=1)


def f1_metrics(
    table: DetectionTable, matches: GreedyMatches, annotated: GreedyMatches, params: EvalParams
) -> dict[str, float | int | None]:
    """The `f1` area of the metrics, for all predictions (scope `all`) and for the scope `annotated`.

    F1 is micro-averaged, except for keys with `macro` (the mean over images of each image's F1) and `class_macro` (the
    mean over the categories that have objects).
    """
    full_I3, loc_I3 = matches.counts(0.5, "full"), matches.counts(0.5, "loc")
    precision, recall = precision_recall(full_I3.sum(axis=0))
    tp, fp, fn = full_I3.sum(axis=0).tolist()
    n_matched = int(loc_I3[:, 0].sum())
    metrics: dict[str, float | int | None] = {"precision_50": precision, "recall_50": recall}
    for mode in MODES:
        for iou in f1_thresholds(params):
            key = f"{mode}_{iou_key(iou)}"
            metrics[key] = micro_f1(matches, iou, mode)
            metrics[f"{key}_macro"] = macro_f1(matches, iou, mode)
            metrics[f"{key}_annotated"] = micro_f1(annotated, iou, mode)
        metrics[f"{mode}_mean"] = mean_f1(matches, mode)
        metrics[f"{mode}_mean_macro"] = _mean([macro_f1(matches, iou, mode) for iou in COCO_IOUS])
        metrics[f"{mode}_mean_annotated"] = mean_f1(annotated, mode)
    counts_K3 = category_counts(table, matches, 0.5)
    present_K = counts_K3[:, [0, 2]].sum(axis=1) > 0
    return metrics | {
        "full_50_class_macro": float(f1_from_counts(counts_K3[present_K]).mean()) if present_K.any() else None,
        "tp_50": tp,
        "fp_50": fp,
        "fn_50": fn,
        "sem_acc_on_matched_50": tp / n_matched if n_matched else None,
    }


def micro_f1(matches: GreedyMatches, iou: float, mode: Mode) -> float | None:
    """F1 of the counts summed over all images; None without objects."""
    return float(f1_from_counts(matches.counts(iou, mode).sum(axis=0))) if matches.n_gt_I.any() else None


def macro_f1(matches: GreedyMatches, iou: float, mode: Mode) -> float | None:
    """Mean over images of each image's own F1; None if no image has an object."""
    return float(image_f1(matches.counts(iou, mode)).mean()) if matches.n_gt_I.any() else None


def mean_f1(matches: GreedyMatches, mode: Mode) -> float | None:
    """Mean of micro F1 over IoU .50:.05:.95; None without objects."""
    return _mean([micro_f1(matches, iou, mode) for iou in COCO_IOUS])


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if any value is None, because F1 is defined at all thresholds or at none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
