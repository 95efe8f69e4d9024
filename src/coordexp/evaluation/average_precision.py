"""COCO average precision from cached matches, under any image weights.

pycocotools gives the numbers of record (coco.py). This module computes the same AP (area range "all") in a form that
can be evaluated again for thousands of re-weightings of the images, which is what a bootstrap needs: matching depends
on one image at a time, so it is done once (coco_matching.py), and only the counting depends on the weights.

Legend: K categories, T IoU thresholds .50:.05:.95, D detections of a category by falling score, H true positives among
them, I images, B weightings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from coordexp.evaluation.coco_matching import CategoryMatches
from coordexp.evaluation.protocol import COCO_IOUS, RECALL_GRID
from coordexp.evaluation.table import Floats, Ints

_CELLS_PER_BLOCK = 1_000_000  # detections x weightings held at once; keeps a block in a few MB
_MOST_THREADS = 8  # each holds a few blocks
_GRID_AND_END = np.append(RECALL_GRID, np.inf)


def weighted_ap(matches_K: Sequence[CategoryMatches], weights_BI: Ints) -> Floats:
    """AP of each category, threshold and weighting, shape (K, T, B); NaN where a weighting holds no object of one.

    An image of weight w counts as w copies of itself, so weights of 1 give pycocotools' AP. Equal scores within one
    image and category keep their copies together: hit, hit, miss, miss where w real copies would rank hit, miss, hit,
    miss.
    """
    weights_IB = np.ascontiguousarray(weights_BI.T, dtype=np.int32)
    ap_KTB = np.full((len(matches_K), len(COCO_IOUS), weights_IB.shape[1]), np.nan)

    def fill(k: int) -> None:
        for block in _blocks(weights_IB.shape[1], len(matches_K[k].pred_D)):
            ap_KTB[k, :, block] = _category_ap(matches_K[k], weights_IB[:, block])

    present = [k for k, matches in enumerate(matches_K) if len(matches.gt_image_G)]
    # Threads help: numpy lets go of the interpreter in its loops.
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
    ap_TB = np.zeros((len(COCO_IOUS), weights_IB.shape[1]))
    for t, (tp_D, ignored_D) in enumerate(zip(matches.tp_TD, matches.ignored_TD, strict=True)):
        # Recall moves only at true positives, and precision peaks there: the other rows only need to be counted.
        hits_H = np.flatnonzero(tp_D)
        counted_HB = seen_DB[hits_H]
        if ignored_D.any():
            counted_HB = np.cumsum(np.where(ignored_D[:, None], 0, weight_DB), axis=0, dtype=np.int32)[hits_H]
        tp_HB = np.cumsum(weight_DB[hits_H], axis=0, dtype=np.int32)
        envelope_HB = tp_HB / (counted_HB + np.spacing(1))
        np.maximum.accumulate(envelope_HB[::-1], axis=0, out=envelope_HB[::-1])
        passed_HB = recall_points_passed(tp_HB / np.maximum(n_gt_B, 1))
        envelope_HB *= np.diff(passed_HB, axis=0, prepend=0)
        ap_TB[t] = envelope_HB.sum(axis=0) / len(RECALL_GRID)
    return np.where(n_gt_B > 0, ap_TB, np.nan)


def recall_points_passed(recall: Floats) -> NDArray[np.int32]:
    """How many points of RECALL_GRID are at or below each recall: `np.searchsorted(side="right")`, but faster.

    The point of the same hundredth and the next one are compared exactly; the grid is not quite i/100 in floats.
    """
    at = (recall * (len(RECALL_GRID) - 1)).astype(np.int32)
    passed = at + (_GRID_AND_END[at] <= recall)
    passed += _GRID_AND_END[at + 1] <= recall
    return passed


def unweighted_ap(matches_K: Sequence[CategoryMatches], n_images: int) -> Floats:
    """AP of each category and threshold, shape (K, T), with every image counted once."""
    return weighted_ap(matches_K, np.ones((1, n_images), dtype=np.int64))[..., 0]


def mean_ap(ap_KT: Floats) -> float | None:
    """Mean over categories that have objects; None if no category has."""
    present = ap_KT[~np.isnan(ap_KT).any(axis=1)]
    return float(present.mean()) if present.size else None
