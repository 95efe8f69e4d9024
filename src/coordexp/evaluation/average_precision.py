"""COCO average precision from cached matches, under any image weights.

pycocotools gives the numbers of record (coco.py). This module computes the same AP (area range "all", 100 detections)
in a form that can be evaluated again for thousands of re-weightings of the images, which is what a bootstrap needs:
matching depends on one image at a time, so it is done once, and only the counting depends on the weights.

Legend: K categories, T IoU thresholds .50:.05:.95, D detections of a category by falling score, I images, B weightings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.evaluation.categories import NO_CATEGORY
from coordexp.evaluation.settings import COCO_IOUS, MAX_DETECTIONS, RECALL_GRID
from coordexp.evaluation.table import Bools, DetectionTable, Floats, Ints
from coordexp.geometry.boxes import Boxes, xyxy_to_xywh

_CELLS_PER_BLOCK = 1_000_000  # detections x weightings held at once; keeps a block in a few MB


@dataclass(frozen=True, slots=True, eq=False)
class CategoryMatches:
    """Matched detections of one category over the data set, in ranking order."""

    pred_D: Ints  # row in the DetectionTable
    image_D: Ints
    tp_TD: Bools  # matched to an annotated object
    ignored_TD: Bools  # matched to a crowd region: neither right nor wrong
    gt_image_G: Ints  # image of each annotated object, crowd regions left out


def match_categories(table: DetectionTable) -> list[CategoryMatches]:
    """Match detections to annotated objects as pycocotools does, for each category."""
    gt_order = np.lexsort((table.gt_crowd_G, table.gt_image_G, table.gt_category_G))  # crowd regions last
    # lexsort is stable: equal scores stay in generation order, as in pycocotools' merge sort.
    pred_order = np.lexsort((-table.pred_score_P, table.pred_image_P, table.pred_category_P))
    pred_order = pred_order[table.pred_category_P[pred_order] != NO_CATEGORY]
    gt_groups = _groups(table.gt_category_G, table.gt_image_G, gt_order, table.n_images)
    pred_groups = _groups(table.pred_category_P, table.pred_image_P, pred_order, table.n_images)
    state_TP = np.full((len(COCO_IOUS), len(table.pred_score_P)), _FP, dtype=np.int8)
    for key, rows in pred_groups.items():
        state_TP[:, rows[MAX_DETECTIONS:]] = _SURPLUS
        if key in gt_groups:
            best, objects = rows[:MAX_DETECTIONS], gt_groups[key]
            crowd = table.gt_crowd_G[objects]
            iou = _coco_iou(table.pred_boxes_P4[best], table.gt_boxes_G4[objects], crowd)
            state_TP[:, best] = _match_group(iou, crowd)
    kept = pred_order[state_TP[0, pred_order] != _SURPLUS]
    ends = np.searchsorted(table.pred_category_P[kept], np.arange(len(table.index)), side="right")
    return [_ranked(table, k, rows, state_TP) for k, rows in enumerate(np.split(kept, ends)[:-1])]


_FP, _TP, _IGNORED, _SURPLUS = 0, 1, 2, 3


def _groups(category_N: Ints, image_N: Ints, order: Ints, n_images: int) -> dict[int, Ints]:
    """Rows of each (category, image), in `order`, which must already be grouped that way."""
    keys, starts = np.unique((category_N * n_images + image_N)[order], return_index=True)
    return dict(zip(keys.tolist(), np.split(order, starts[1:]), strict=True)) if len(keys) else {}


def _coco_iou(pred_D4: Boxes, gt_G4: Boxes, crowd_G: Bools) -> Floats:
    """IoU, or share of the detection inside a crowd region, with pycocotools' arithmetic on xywh to the last bit."""
    d, g = xyxy_to_xywh(pred_D4)[:, None], xyxy_to_xywh(gt_G4)[None]
    sides = np.minimum(d[..., :2] + d[..., 2:], g[..., :2] + g[..., 2:]) - np.maximum(d[..., :2], g[..., :2])
    overlap_DG = np.where((sides > 0).all(axis=-1), sides.prod(axis=-1), 0.0)
    area_d, area_g = d[..., 2:].prod(axis=-1), g[..., 2:].prod(axis=-1)
    union_DG = np.where(crowd_G, area_d, area_d + area_g - overlap_DG)
    return np.divide(overlap_DG, union_DG, out=np.zeros_like(overlap_DG), where=overlap_DG > 0)


def _match_group(iou_DG: Floats, crowd_G: Bools) -> NDArray[np.int8]:
    """Greedy matching of one image and category; returns states of shape (T, D).

    Detections choose in ranking order: the free object of highest IoU (the last of equals), and only if there is none,
    a crowd region, which stays free.
    """
    state_TD = np.full((len(COCO_IOUS), len(iou_DG)), _FP, dtype=np.int8)
    n_objects = int((~crowd_G).sum())
    threshold_T1 = np.minimum(COCO_IOUS, 1 - 1e-10)[:, None]
    free_TO = np.ones((len(COCO_IOUS), n_objects), dtype=bool)
    for d in np.flatnonzero(iou_DG.max(axis=1) >= threshold_T1[0, 0]):
        objects, crowds = iou_DG[d, :n_objects], iou_DG[d, n_objects:]
        if n_objects:
            choice_TO = np.where(free_TO & (objects >= threshold_T1), objects, -1.0)
            best_T = n_objects - 1 - np.argmax(choice_TO[:, ::-1], axis=1)
            hit_T = choice_TO[np.arange(len(best_T)), best_T] >= 0
            free_TO[hit_T, best_T[hit_T]] = False
            state_TD[hit_T, d] = _TP
        if crowds.size:
            state_TD[(state_TD[:, d] == _FP) & (crowds >= threshold_T1).any(axis=1), d] = _IGNORED
    return state_TD


def _ranked(table: DetectionTable, category: int, rows: Ints, state_TP: NDArray[np.int8]) -> CategoryMatches:
    pred_D = rows[np.argsort(-table.pred_score_P[rows], kind="stable")]  # ties by image, then by generation order
    return CategoryMatches(
        pred_D=pred_D,
        image_D=table.pred_image_P[pred_D],
        tp_TD=state_TP[:, pred_D] == _TP,
        ignored_TD=state_TP[:, pred_D] == _IGNORED,
        gt_image_G=table.gt_image_G[(table.gt_category_G == category) & ~table.gt_crowd_G],
    )


def weighted_ap(matches_K: list[CategoryMatches], weights_BI: Ints) -> Floats:
    """AP of each category, threshold and weighting, shape (K, T, B); NaN where a weighting holds no object of one.

    An image of weight w counts as w copies of itself, so weights of 1 give pycocotools' AP. Equal scores within one
    image and category keep their copies together: hit, hit, miss, miss where w real copies would rank hit, miss, hit,
    miss.
    """
    weights_IB = np.ascontiguousarray(weights_BI.T, dtype=np.int32)
    ap_KTB = np.full((len(matches_K), len(COCO_IOUS), weights_IB.shape[1]), np.nan)
    for k, matches in enumerate(matches_K):
        if len(matches.gt_image_G):
            for block in _blocks(weights_IB.shape[1], len(matches.pred_D)):
                ap_KTB[k, :, block] = _category_ap(matches, weights_IB[:, block])
    return ap_KTB


def _blocks(n_weightings: int, n_detections: int) -> Iterator[slice]:
    step = max(1, _CELLS_PER_BLOCK // max(1, n_detections))
    return (slice(start, start + step) for start in range(0, n_weightings, step))


def _category_ap(matches: CategoryMatches, weights_IB: NDArray[np.int32]) -> Floats:
    n_gt_B = weights_IB[matches.gt_image_G].sum(axis=0)
    weight_DB = weights_IB[matches.image_D]
    seen_DB = np.cumsum(weight_DB, axis=0)
    ap_TB = np.zeros((len(COCO_IOUS), weights_IB.shape[1]))
    for t, (tp_D, ignored_D) in enumerate(zip(matches.tp_TD, matches.ignored_TD, strict=True)):
        # Recall moves only at true positives, and precision peaks there: the other rows only need to be counted.
        hits_H = np.flatnonzero(tp_D)
        counted_HB = seen_DB[hits_H]
        if ignored_D.any():
            counted_HB = np.cumsum(np.where(ignored_D[:, None], 0, weight_DB), axis=0)[hits_H]
        tp_HB = np.cumsum(weight_DB[hits_H], axis=0)
        precision_HB = tp_HB / (counted_HB + np.spacing(1))
        envelope_HB = np.maximum.accumulate(precision_HB[::-1], axis=0)[::-1]
        recall_HB = tp_HB / np.maximum(n_gt_B, 1)
        passed_HB = np.searchsorted(RECALL_GRID, recall_HB, side="right")
        ap_TB[t] = (envelope_HB * np.diff(passed_HB, axis=0, prepend=0)).sum(axis=0) / len(RECALL_GRID)
    return np.where(n_gt_B > 0, ap_TB, np.nan)


def unweighted_ap(matches_K: list[CategoryMatches], n_images: int) -> Floats:
    """AP of each category and threshold, shape (K, T), with every image counted once."""
    return weighted_ap(matches_K, np.ones((1, n_images), dtype=np.int64))[..., 0]


def mean_ap(ap_KT: Floats) -> float | None:
    """Mean over categories that have objects; None if no category has."""
    present = ap_KT[~np.isnan(ap_KT).any(axis=1)]
    return float(present.mean()) if present.size else None


def ranking_flags(
    table: DetectionTable, matches_K: list[CategoryMatches], threshold_index: int = 0
) -> tuple[Bools, Bools]:
    """Whether each prediction of the table is a true positive, and whether it is judged at all, both of shape (P,).

    Not judged: matched to a crowd region, or beyond the 100 best of its image and category. A prediction without a
    category is judged, and wrong. `threshold_index` 0 is IoU 0.5.
    """
    tp_P = np.zeros(len(table.pred_score_P), dtype=bool)
    judged_P = table.pred_category_P == NO_CATEGORY
    for matches in matches_K:
        tp_P[matches.pred_D] = matches.tp_TD[threshold_index]
        judged_P[matches.pred_D] = ~matches.ignored_TD[threshold_index]
    return tp_P, judged_P
