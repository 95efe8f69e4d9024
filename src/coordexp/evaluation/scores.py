"""The AP that each score of a file would reach: boxes and names stay, only the ranking changes.

The perfect ranking and one constant score for all bound what any score can do; what lies between the score in use and
the perfect ranking is the headroom of confidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from coordexp.evaluation.average_precision import mean_ap, unweighted_ap
from coordexp.evaluation.coco_matching import Pairs, match_categories, ranking_flags
from coordexp.evaluation.confidence import auroc, calibration_error, oracle_scores
from coordexp.evaluation.table import DetectionTable, Floats

IN_USE, CONSTANT, PERFECT = "in use", "constant", "perfect ranking"


def compare_scores(table: DetectionTable, pairs: Pairs) -> list[dict[str, Any]]:
    """One row for each score: mAP, AP50, AP75, auroc_tp_fp and ece (the last two None for what is no estimate).

    First the score in use, then the candidates of the file by name, the constant score, and the perfect ranking, which
    knows the IoU of each box with the object it takes.
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
