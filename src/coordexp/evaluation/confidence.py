"""What the scores know: calibration, separation of right from wrong, and the AP that the ranking costs.

A prediction is right if COCO's matching at IoU 0.5 makes it a true positive (category included).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coordexp.evaluation.coco_matching import CategoryMatches, Pairs, overlapping_pairs, ranking_flags
from coordexp.evaluation.table import Bools, DetectionTable, Floats

CALIBRATION_BINS = 10


def reliability(table: DetectionTable, matches_K: list[CategoryMatches]) -> list[dict[str, Any]]:
    """The bins of the reliability diagram of the score in use: confidence, precision, n."""
    right_P, judged_P = ranking_flags(table, matches_K)
    return calibration_error(table.pred_score_P[judged_P], right_P[judged_P])[1]


def calibration_error(
    confidence_P: Floats, right_P: Bools, n_bins: int = CALIBRATION_BINS
) -> tuple[float | None, list[dict[str, Any]]]:
    """Expected calibration error over bins of equal mass: sum of n_b/N * |mean confidence - precision|.

    Equal confidences share a bin, so there may be fewer bins than asked. The error is None, without bins, if there is
    no prediction or a score lies outside [0, 1] and so is no probability.
    """
    n = len(confidence_P)
    if not n or confidence_P.min() < 0 or confidence_P.max() > 1:
        return None, []
    edges = np.unique(np.sort(confidence_P)[[b * n // n_bins for b in range(1, n_bins)]]) if n_bins > 1 else np.empty(0)
    bin_P = np.searchsorted(edges, confidence_P, side="right")
    bins = [
        {
            "confidence": float(confidence_P[bin_P == b].mean()),
            "precision": float(right_P[bin_P == b].mean()),
            "n": int((bin_P == b).sum()),
        }
        for b in np.unique(bin_P)
    ]
    return sum(row["n"] / n * abs(row["confidence"] - row["precision"]) for row in bins), bins


def auroc(score_P: Floats, right_P: Bools) -> float | None:
    """Probability that a right prediction outscores a wrong one, ties counted half; None if either kind is missing."""
    n_right = int(right_P.sum())
    n_wrong = len(right_P) - n_right
    if not n_right or not n_wrong:
        return None
    _, inverse, counts = np.unique(score_P, return_inverse=True, return_counts=True)
    mean_rank_P = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((mean_rank_P[right_P].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def oracle_scores(table: DetectionTable, pairs: Pairs | None = None) -> Floats:
    """The score a perfect ranker would give, shape (P,): the IoU with the object it takes, 0 if it takes none.

    Objects are taken within image and category, in falling IoU from 0.5 upwards. Predictions are neither moved nor
    removed, so the AP under these scores is what ranking alone could reach.
    """
    pairs = pairs or overlapping_pairs(table)
    score_P = np.zeros(len(table.pred_score_P))
    free_P, free_G = bytearray(b"\1") * len(score_P), bytearray(b"\1") * len(table.gt_image_G)
    order = np.lexsort((pairs.gt_N, pairs.pred_N, -pairs.iou_N))
    order = order[~pairs.crowd_N[order]]
    columns = (pairs.pred_N[order], pairs.gt_N[order], pairs.iou_N[order])
    for pred, gt, iou in zip(*(column.tolist() for column in columns), strict=True):
        if free_P[pred] and free_G[gt]:
            free_P[pred] = free_G[gt] = 0
            score_P[pred] = iou
    return score_P
