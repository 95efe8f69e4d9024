"""What the scores know: calibration, separation of right from wrong, and the AP that the ranking costs.

A prediction is right if COCO's matching at IoU 0.5 makes it a true positive (category included).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coordexp.evaluation.average_precision import mean_ap, unweighted_ap
from coordexp.evaluation.coco_matching import CategoryMatches, match_categories, ranking_flags
from coordexp.evaluation.f1 import greedy_pairs
from coordexp.evaluation.settings import COCO_IOUS, EvalSettings
from coordexp.evaluation.table import Bools, DetectionTable, Floats, image_slices
from coordexp.geometry.boxes import pairwise_iou


def confidence_metrics(
    table: DetectionTable, matches_K: list[CategoryMatches], settings: EvalSettings
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """The `confidence` area of the metrics, and the bins of the reliability diagram."""
    right_P, judged_P = ranking_flags(table, matches_K)
    score, right = table.pred_score_P[judged_P], right_P[judged_P]
    ece, bins = calibration_error(score, right, settings.calibration_bins)
    metrics = {
        "ece": ece,
        "auroc_tp_fp": auroc(score, right),
        "perfect_ranking_mAP": _mean_ap(table.with_scores(oracle_scores(table))),
        "constant_score_mAP": _mean_ap(table.with_scores(np.ones(len(table.pred_score_P)))),
    }
    return metrics, bins


def _mean_ap(table: DetectionTable) -> float | None:
    """mAP under other scores; equal scores rank by image id, then by generation order."""
    return mean_ap(unweighted_ap(match_categories(table), table.n_images))


def calibration_error(confidence_P: Floats, right_P: Bools, n_bins: int) -> tuple[float | None, list[dict[str, Any]]]:
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


def oracle_scores(table: DetectionTable) -> Floats:
    """The score a perfect ranker would give, shape (P,): the IoU with the object it takes, 0 if it takes none.

    Objects are taken within image and category, in falling IoU from 0.5 upwards. Predictions are neither moved nor
    removed, so the AP under these scores is what ranking alone could reach.
    """
    score_P = np.zeros(len(table.pred_score_P))
    pred_slices = image_slices(table.pred_image_P, table.n_images)
    gt_slices = image_slices(table.gt_image_G, table.n_images)
    for in_pred, in_gt in zip(pred_slices, gt_slices, strict=True):
        same = table.pred_category_P[in_pred, None] == table.gt_category_G[None, in_gt]
        usable = same & ~table.gt_crowd_G[in_gt]
        iou_PG = np.where(usable, pairwise_iou(table.pred_boxes_P4[in_pred], table.gt_boxes_G4[in_gt]), 0.0)
        rows, columns = greedy_pairs(iou_PG, COCO_IOUS[0])
        score_P[in_pred.start + rows] = iou_PG[rows, columns]
    return score_P
