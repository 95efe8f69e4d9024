"""Quality of the scores: calibration, separation of correct from incorrect, and the AP of each ranking of the boxes.

A prediction is correct if COCO's matching at IoU 0.5 makes it a true positive (category included). The perfect ranking
and one constant score for all predictions bound the effect of any score; the gap between the score in use and the
perfect ranking is the headroom of confidence.

LRP (Localisation-Recall-Precision error, Oksuz et al. 2021, arXiv:2011.10772) is an error per object for predictions
above a threshold. A false positive or a missed object costs 1; an object that is matched by a box of the correct name
costs (1 - IoU) / (1 - .5). Unlike the calibration error, it does not improve when hard objects are dropped; unlike AP,
it evaluates scores at the best threshold that they allow. The optimum over thresholds is taken per category (oLRP,
equations 9 and 10).

Legend: P predictions, D detections of one category by falling score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from coordexp.evaluation.average_precision import (
    CategoryMatches,
    Pairs,
    match_categories,
    mean_ap,
    overlapping_pairs,
    ranking_flags,
    unweighted_ap,
)
from coordexp.evaluation.protocol import COCO_IOUS
from coordexp.evaluation.table import Bools, DetectionTable, Floats

CALIBRATION_BINS = 10


def reliability(table: DetectionTable, matches_K: list[CategoryMatches]) -> list[dict[str, Any]]:
    """The bins of the reliability diagram for the score in use: confidence, precision, n."""
    right_P, judged_P = ranking_flags(table, matches_K)
    return calibration_error(table.pred_score_P[judged_P], right_P[judged_P])[1]


def calibration_error(
    confidence_P: Floats, right_P: Bools, n_bins: int = CALIBRATION_BINS
) -> tuple[float | None, list[dict[str, Any]]]:
    """Expected calibration error over bins of equal mass: sum of n_b/N * |mean confidence - precision|.

    Equal confidences share a bin, so there may be fewer bins than `n_bins`. The error is None, without bins,
    without predictions or if a score lies outside [0, 1] and is therefore not a probability.
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
    """Probability that a correct prediction outscores an incorrect one, ties counted half; None if one kind is missing.

    Computed from ranks as the Mann-Whitney U statistic.
    """
    n_right = int(right_P.sum())
    n_wrong = len(right_P) - n_right
    if not n_right or not n_wrong:
        return None
    _, inverse, counts = np.unique(score_P, return_inverse=True, return_counts=True)
    mean_rank_P = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((mean_rank_P[right_P].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


CURVE_ROWS = 101


def threshold_curve(table: DetectionTable, matches_K: list[CategoryMatches]) -> list[dict[str, float]]:
    """Precision, recall and F1 at IoU .50 of the predictions at or above a score threshold, by rising threshold.

    At most CURVE_ROWS thresholds, each a score in the file, including the best one; empty without objects or
    predictions. COCO matches in order of falling score, so a threshold does not change the matches above it.
    """
    right_P, judged_P = ranking_flags(table, matches_K)
    n_gt, score_D = int(table.n_gt_I.sum()), table.pred_score_P[judged_P]
    if not n_gt or not len(score_D):
        return []
    order = np.argsort(-score_D, kind="stable")
    score_D, right_D = score_D[order], right_P[judged_P][order]
    ends = np.flatnonzero(np.append(score_D[1:] != score_D[:-1], True))  # equal scores pass a threshold together
    hits, kept = np.cumsum(right_D)[ends], ends + 1
    f1 = 2 * hits / (kept + n_gt)
    shown = np.unique(np.append(np.linspace(0, len(ends) - 1, CURVE_ROWS - 1).astype(int), f1.argmax()))[::-1]
    columns = (score_D[ends], hits / kept, hits / n_gt, f1)
    names = ("threshold", "precision", "recall", "f1")
    return [dict(zip(names, (float(column[n]) for column in columns), strict=True)) for n in shown]


def best_threshold(curve: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """The highest F1 of a threshold curve, and its threshold."""
    if not curve:
        return {"best_f1_50": None, "best_threshold_50": None}
    best = max(curve, key=lambda row: row["f1"])
    return {"best_f1_50": best["f1"], "best_threshold_50": best["threshold"]}


def oracle_scores(table: DetectionTable, pairs: Pairs | None = None) -> Floats:
    """(P,) the score of a perfect ranker: the IoU with the matched object, 0 for an unmatched prediction.

    Predictions are matched within image and category, by falling IoU down to 0.5. Boxes do not change, so the AP under
    these scores is what a better ranking alone could reach.
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


IN_USE, CONSTANT, PERFECT = "in use", "constant", "perfect ranking"


def compare_scores(table: DetectionTable, pairs: Pairs) -> list[dict[str, Any]]:
    """One row per score: mAP, AP50, AP75, auroc_tp_fp and ece (the last two None for the two bounds).

    First the score in use, then the candidates in the file by name, the constant score, and the perfect ranking, which
    uses the IoU of each box with its matched object.
    """
    rows = []
    for name, score_P in _rankings(table, pairs):
        ranked = table.with_scores(score_P)
        matches_K = match_categories(ranked, pairs)
        ap_KT = unweighted_ap(matches_K, table.n_images)
        row = {"score": name, "mAP": mean_ap(ap_KT), "AP50": mean_ap(ap_KT[:, :1]), "AP75": mean_ap(ap_KT[:, 5:6])}
        right_P, judged_P = ranking_flags(ranked, matches_K)
        estimate = name not in (CONSTANT, PERFECT)
        known = (score_P[judged_P], right_P[judged_P])
        row["auroc_tp_fp"] = auroc(*known) if estimate else None
        row["ece"] = calibration_error(*known)[0] if estimate else None
        rows.append(row)
    return rows


def _rankings(table: DetectionTable, pairs: Pairs) -> Iterator[tuple[str, Floats]]:
    yield IN_USE, table.pred_score_P
    yield from ((name, scores) for name, scores in table.candidates.items() if name != CONSTANT)
    yield CONSTANT, np.ones(len(table.pred_score_P))
    yield PERFECT, oracle_scores(table, pairs)


_TAU = COCO_IOUS[0]


def lrp_metrics(table: DetectionTable, matches_K: Sequence[CategoryMatches]) -> dict[str, float | None]:
    """Means over the categories with objects of `lrp` at the best threshold, and of its parts there.

    `lrp_loc` is the mean 1 - IoU of the true positives, over categories that have any; `lrp_fp` is 1 - precision,
    `lrp_fn` is 1 - recall. All are None if no category has objects.
    """
    optima = [best_cut(m, table.pred_score_P[m.pred_D]) for m in matches_K if len(m.gt_image_G)]
    if not optima:
        return dict.fromkeys(("lrp", "lrp_loc", "lrp_fp", "lrp_fn"))
    lrp, loc, fp, fn = np.array(optima).T
    return {
        "lrp": float(lrp.mean()),
        "lrp_loc": float(np.nanmean(loc)) if not np.isnan(loc).all() else None,
        "lrp_fp": float(fp.mean()),
        "lrp_fn": float(fn.mean()),
    }


def best_cut(matches: CategoryMatches, score_D: Floats) -> tuple[float, float, float, float]:
    """LRP, mean 1 - IoU of true positives (NaN without any), 1 - precision and 1 - recall, at the minimum of LRP.

    Thresholds lie between different scores, so equal scores stay together. Above all scores there is no prediction, and
    LRP is 1.
    """
    n_gt = len(matches.gt_image_G)
    hit_D = matches.tp_TD[0]
    cut_ends = np.append(score_D[1:] != score_D[:-1], True)[: len(score_D)]
    n_hit, n_false = (np.append(0, np.cumsum(flags)[cut_ends]) for flags in (hit_D, ~hit_D & ~matches.ignored_TD[0]))
    lost = np.append(0.0, np.cumsum(np.where(hit_D, 1 - matches.iou_D, 0.0))[cut_ends])
    lrp = (lost / (1 - _TAU) + n_false + (n_gt - n_hit)) / (n_gt + n_false)
    best = int(np.argmin(lrp))
    hits, false = int(n_hit[best]), int(n_false[best])
    loc = float(lost[best] / hits) if hits else float("nan")
    return float(lrp[best]), loc, false / (hits + false) if hits + false else 0.0, 1 - hits / n_gt
