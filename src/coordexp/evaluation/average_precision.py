"""COCO average precision from cached matches, under any ranking and any image weights.

pycocotools computes the numbers of record (coco.py). This module computes the same AP (area range "all") in a form that
can be repeated cheaply for thousands of image weightings, which a bootstrap needs. It separates three parts. Overlaps
do not depend on scores, so the few overlapping pairs of a data set are found once. A ranking only walks these pairs, by
the rules of pycocotools and lvis-api within one image and category. The image weights affect only the counting.

Legend: P predictions, G annotated objects, N overlapping pairs, K categories, T IoU thresholds .50:.05:.95, D
detections of one category by falling score, H true positives among them, I images, B weightings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.evaluation.categories import NO_CATEGORY
from coordexp.evaluation.protocol import COCO_IOUS, MAX_DETECTIONS, RECALL_GRID
from coordexp.evaluation.table import Bools, DetectionTable, Floats, Ints
from coordexp.geometry.boxes import Boxes, xyxy_to_xywh

_PAIRS_PER_BLOCK = 500_000  # candidate pairs in memory at once: a few tens of MB
_FP, _TP, _IGNORED, _SURPLUS = 0, 1, 2, 3


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Predictions and objects of one image and category with IoU >= .50, as rows of a DetectionTable.

    For a crowd region the overlap is the fraction of the prediction inside it, as in pycocotools.
    """

    pred_N: Ints
    gt_N: Ints
    iou_N: Floats
    crowd_N: Bools

    def keep_predictions(self, keep_P: Bools) -> Pairs:
        """The pairs that belong to `table.keep_predictions(keep_P)`."""
        kept_N = keep_P[self.pred_N]
        new_row_P = np.cumsum(keep_P) - 1
        return Pairs(new_row_P[self.pred_N[kept_N]], self.gt_N[kept_N], self.iou_N[kept_N], self.crowd_N[kept_N])


@dataclass(frozen=True, slots=True, eq=False)
class CategoryMatches:
    """The matched detections of one category in the data set, in ranking order (ties by image, then generation)."""

    pred_D: Ints  # row in the DetectionTable
    image_D: Ints
    tp_TD: Bools  # matched to an annotated object
    ignored_TD: Bools  # neither a true nor a false positive, such as one inside a crowd region
    iou_D: Floats  # with the object matched at IoU .50, otherwise 0
    gt_image_G: Ints  # image of each annotated object, without crowd regions


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """The differences between protocols: limits on the number of detections, and detections that do not count."""

    max_per_group: int | None = MAX_DETECTIONS  # per image and category, highest scores first
    max_per_image: int | None = None
    dropped_P: Bools | None = None  # removed before matching
    ignored_if_wrong_P: Bools | None = None  # do not count as false positives


def overlapping_pairs(table: DetectionTable) -> Pairs:
    """All pairs of the table, computed in blocks of images."""
    n_gt_I = np.bincount(table.gt_image_G, minlength=table.n_images)
    first_gt_I = np.cumsum(n_gt_I) - n_gt_I
    n_candidates_P = n_gt_I[table.pred_image_P]
    cuts = np.searchsorted(np.cumsum(n_candidates_P), np.arange(0, n_candidates_P.sum(), _PAIRS_PER_BLOCK))
    blocks = [
        _pairs_of(table, rows, first_gt_I, n_candidates_P)
        for rows in np.split(np.arange(len(n_candidates_P)), np.unique(cuts))
    ]
    return Pairs(*(np.concatenate(columns) for columns in zip(*blocks, strict=True)))


def _pairs_of(
    table: DetectionTable, rows: Ints, first_gt_I: Ints, n_candidates_P: Ints
) -> tuple[Ints, Ints, Floats, Bools]:
    n_R = n_candidates_P[rows]
    pred_N = np.repeat(rows, n_R)
    within_N = np.arange(len(pred_N)) - np.repeat(np.cumsum(n_R) - n_R, n_R)
    gt_N = first_gt_I[table.pred_image_P[pred_N]] + within_N
    same_N = table.pred_category_P[pred_N] == table.gt_category_G[gt_N]
    pred_N, gt_N = pred_N[same_N], gt_N[same_N]
    crowd_N = table.gt_crowd_G[gt_N]
    iou_N = _coco_iou(table.pred_boxes_P4[pred_N], table.gt_boxes_G4[gt_N], crowd_N)
    near_N = iou_N >= COCO_IOUS[0]
    return pred_N[near_N], gt_N[near_N], iou_N[near_N], crowd_N[near_N]


def _coco_iou(pred_N4: Boxes, gt_N4: Boxes, crowd_N: Bools) -> Floats:
    """IoU, or fraction of the detection inside a crowd region; bit-identical to pycocotools' arithmetic on xywh."""
    d, g = xyxy_to_xywh(pred_N4), xyxy_to_xywh(gt_N4)
    sides = np.minimum(d[:, :2] + d[:, 2:], g[:, :2] + g[:, 2:]) - np.maximum(d[:, :2], g[:, :2])
    overlap_N = np.where((sides > 0).all(axis=1), sides.prod(axis=1), 0.0)
    area_d, area_g = d[:, 2:].prod(axis=1), g[:, 2:].prod(axis=1)
    union_N = np.where(crowd_N, area_d, area_d + area_g - overlap_N)
    return np.divide(overlap_N, union_N, out=np.zeros_like(overlap_N), where=overlap_N > 0)


def match_categories(
    table: DetectionTable, pairs: Pairs | None = None, rules: Rules | None = None
) -> list[CategoryMatches]:
    """Match detections to annotated objects in each category; `pairs` are those of this table, if already known."""
    pairs, rules = pairs or overlapping_pairs(table), rules or Rules()
    # A stable sort keeps equal scores of an image in generation order, as pycocotools' merge sort does.
    by_score = np.argsort(-table.pred_score_P, kind="stable")
    counted_P = _counted(table, by_score, rules)
    state_TP, iou_P = _walk(table, pairs, counted_P)
    if rules.ignored_if_wrong_P is not None:
        state_TP[(state_TP == _FP) & rules.ignored_if_wrong_P] = _IGNORED
    pred_KD = _by_category(by_score[counted_P[by_score]], table.pred_category_P, len(table.index))
    gt_KG = _by_category(np.flatnonzero(~table.gt_crowd_G), table.gt_category_G, len(table.index))
    return [
        CategoryMatches(
            pred_D=pred_D,
            image_D=table.pred_image_P[pred_D],
            tp_TD=state_TP[:, pred_D] == _TP,
            ignored_TD=state_TP[:, pred_D] == _IGNORED,
            iou_D=iou_P[pred_D],
            gt_image_G=table.gt_image_G[gt_G],
        )
        for pred_D, gt_G in zip(pred_KD, gt_KG, strict=True)
    ]


def _by_category(rows: Ints, category_N: Ints, n_categories: int) -> list[Ints]:
    """The rows of each category, in the order given."""
    rows = rows[np.argsort(category_N[rows], kind="stable")]
    ends = np.searchsorted(category_N[rows], np.arange(n_categories), side="right")
    return np.split(rows, ends)[:-1]


def _counted(table: DetectionTable, by_score: Ints, rules: Rules) -> Bools:
    """(P,) whether each prediction takes part: it has a category and is within the limits."""
    counted_P = table.pred_category_P != NO_CATEGORY
    if rules.dropped_P is not None:
        counted_P &= ~rules.dropped_P
    if rules.max_per_image is not None:
        counted_P &= _rank_in_group(table.pred_image_P, by_score) < rules.max_per_image
    if rules.max_per_group is not None:
        group_P = table.pred_image_P * (len(table.index) + 1) + table.pred_category_P
        counted_P &= _rank_in_group(group_P, by_score) < rules.max_per_group
    return counted_P


def _rank_in_group(group_P: Ints, by_score: Ints) -> Ints:
    """(P,) rank of each prediction in its group, 0 for the highest score."""
    order = by_score[np.argsort(group_P[by_score], kind="stable")]
    n_before = np.searchsorted(group_P[order], group_P[order], side="left")
    rank_P = np.empty(len(order), dtype=np.int64)
    rank_P[order] = np.arange(len(order)) - n_before
    return rank_P


def _walk(table: DetectionTable, pairs: Pairs, counted_P: Bools) -> tuple[NDArray[np.int8], Floats]:
    """(T, P) state of each prediction at each threshold, and (P,) the IoU of its match at IoU .50.

    Detections choose in ranking order. Each takes the free object with the highest IoU (the last one on ties). If there
    is none, it may match a crowd region, which stays free for others.
    """
    # COCOeval.evaluateImg visits all objects for each detection and threshold. With the pairs sorted by detection rank,
    # objects before crowds, and falling IoU, the same choice is a detection's first free pair.
    order = np.lexsort((-pairs.gt_N, -pairs.iou_N, pairs.crowd_N, pairs.pred_N, -table.pred_score_P[pairs.pred_N]))
    order = order[counted_P[pairs.pred_N[order]]]
    pred_N, gt_N, iou_N, crowd_N = (c[order] for c in (pairs.pred_N, pairs.gt_N, pairs.iou_N, pairs.crowd_N))
    state_TP = np.zeros((len(COCO_IOUS), len(counted_P)), dtype=np.int8)
    iou_P = np.zeros(len(counted_P))
    for t, threshold in enumerate(np.minimum(COCO_IOUS, 1 - 1e-10)):  # the bound is that of COCOeval.evaluateImg
        passing = np.flatnonzero(iou_N >= threshold)
        state, free, won = bytearray(len(counted_P)), bytearray(b"\1") * len(table.gt_image_G), []
        columns = (passing, pred_N[passing], gt_N[passing], crowd_N[passing])
        for n, pred, gt, crowd in zip(*(column.tolist() for column in columns), strict=True):
            if state[pred]:
                continue
            if crowd:
                state[pred] = _IGNORED
            elif free[gt]:
                free[gt], state[pred] = 0, _TP
                won.append(n)
        state_TP[t] = np.frombuffer(state, dtype=np.int8)
        if t == 0:
            iou_P[pred_N[won]] = iou_N[won]
    return state_TP, iou_P


def ranking_flags(
    table: DetectionTable, matches_K: list[CategoryMatches], threshold_index: int = 0
) -> tuple[Bools, Bools]:
    """(P,) whether each prediction is a true positive, and (P,) whether it counts at all.

    A prediction does not count if it matches a crowd region, or is beyond the 100 highest scores of its image and
    category. A prediction without a category counts and is incorrect. `threshold_index` 0 is IoU 0.5.
    """
    tp_P = np.zeros(len(table.pred_score_P), dtype=bool)
    judged_P = table.pred_category_P == NO_CATEGORY
    for matches in matches_K:
        tp_P[matches.pred_D] = matches.tp_TD[threshold_index]
        judged_P[matches.pred_D] = ~matches.ignored_TD[threshold_index]
    return tp_P, judged_P


_CELLS_PER_BLOCK = 1_000_000  # detections x weightings in memory at once: a few MB
_MOST_THREADS = 8  # each thread holds a few blocks
_FEWEST_THREADED = 10  # weightings; for fewer, handing a category to a thread takes longer than its AP
_GRID_AND_END = np.append(RECALL_GRID, np.inf)


def weighted_ap(matches_K: Sequence[CategoryMatches], weights_BI: Ints) -> Floats:
    """(K, T, B) AP of each category, threshold and weighting; NaN if a weighting has no object of the category.

    T is the number of thresholds in the matches.

    An image of weight w counts as w copies of itself, so weights of 1 give pycocotools' AP. The matches can be reused
    for every weighting because a match depends on its own image only; weights change the cumulative counts along the
    ranking. Copies of a detection are adjacent in the ranking. For equal scores within one image and category this
    gives hit, hit, miss, miss, whereas w real copies of the image would rank hit, miss, hit, miss.
    """
    weights_IB = np.ascontiguousarray(weights_BI.T, dtype=np.int32)
    n_thresholds = len(matches_K[0].tp_TD) if matches_K else len(COCO_IOUS)
    ap_KTB = np.full((len(matches_K), n_thresholds, weights_IB.shape[1]), np.nan)

    def fill(k: int) -> None:
        for block in _blocks(weights_IB.shape[1], len(matches_K[k].pred_D)):
            ap_KTB[k, :, block] = _category_ap(matches_K[k], weights_IB[:, block])

    present = [k for k, matches in enumerate(matches_K) if len(matches.gt_image_G)]
    if weights_IB.shape[1] < _FEWEST_THREADED:
        for k in present:
            fill(k)
        return ap_KTB
    # Threads help because numpy releases the GIL in its loops.
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, present))
    return ap_KTB


def _blocks(n_weightings: int, n_detections: int) -> Iterator[slice]:
    step = max(1, _CELLS_PER_BLOCK // max(1, n_detections))
    return (slice(start, start + step) for start in range(0, n_weightings, step))


def _category_ap(matches: CategoryMatches, weights_IB: NDArray[np.int32]) -> Floats:
    n_gt_B = weights_IB[matches.gt_image_G].sum(axis=0)
    weight_DB = weights_IB[matches.image_D]
    seen_DB = np.cumsum(weight_DB, axis=0, dtype=np.int32)
    ap_TB = np.zeros((len(matches.tp_TD), weights_IB.shape[1]))
    # Rare categories have equal flags at most thresholds, and then equal AP.
    flags_TD = matches.tp_TD + 2 * matches.ignored_TD
    repeated_T = [False, *(flags_TD[1:] == flags_TD[:-1]).all(axis=1).tolist()]
    for t, (tp_D, ignored_D) in enumerate(zip(matches.tp_TD, matches.ignored_TD, strict=True)):
        if repeated_T[t]:
            ap_TB[t] = ap_TB[t - 1]
            continue
        # Recall changes only at true positives, and precision has its peaks there, so only these rows are evaluated.
        hits_H = np.flatnonzero(tp_D)
        if not len(hits_H):
            continue
        counted_HB = seen_DB[hits_H]
        if ignored_D.any():
            counted_HB = np.cumsum(np.where(ignored_D[:, None], 0, weight_DB), axis=0, dtype=np.int32)[hits_H]
        tp_HB = np.cumsum(weight_DB[hits_H], axis=0, dtype=np.int32)
        envelope_HB = tp_HB / (counted_HB + np.spacing(1))  # the spacing is that of COCOeval.accumulate
        np.maximum.accumulate(envelope_HB[::-1], axis=0, out=envelope_HB[::-1])
        passed_HB = recall_points_passed(tp_HB / np.maximum(n_gt_B, 1))
        envelope_HB *= np.diff(passed_HB, axis=0, prepend=0)
        ap_TB[t] = envelope_HB.sum(axis=0) / len(RECALL_GRID)
    return np.where(n_gt_B > 0, ap_TB, np.nan)


def recall_points_passed(recall: Floats) -> NDArray[np.int32]:
    """The number of RECALL_GRID points at or below each recall: `np.searchsorted(side="right")`, but faster.

    The grid point of the same hundredth and the next one are compared exactly, because in floats the grid is not
    exactly i/100.
    """
    at = (recall * (len(RECALL_GRID) - 1)).astype(np.int32)
    passed = at + (_GRID_AND_END[at] <= recall)
    passed += _GRID_AND_END[at + 1] <= recall
    return passed


def unweighted_ap(matches_K: Sequence[CategoryMatches], n_images: int) -> Floats:
    """(K, T) AP of each category and threshold, with every image counted once."""
    return weighted_ap(matches_K, np.ones((1, n_images), dtype=np.int64))[..., 0]


def mean_ap(ap_KT: Floats) -> float | None:
    """Mean over the categories that have objects; None if there is no such category."""
    present = ap_KT[~np.isnan(ap_KT).any(axis=1)]
    return float(present.mean()) if present.size else None
