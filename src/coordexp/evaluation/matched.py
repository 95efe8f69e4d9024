"""A set of predictions with its matches, and subsets of it.

The headline numbers are computed for three sets and always shown together: all predictions, those of categories
annotated in their image (the oracle-class protocol), and those that NMS keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from coordexp.config.schema import EvalParams
from coordexp.evaluation.average_precision import (
    CategoryMatches,
    Pairs,
    match_categories,
    mean_ap,
    overlapping_pairs,
    unweighted_ap,
)
from coordexp.evaluation.f1 import (
    GreedyMatches,
    Mode,
    match_greedily,
    mean_f1,
    micro_f1,
    named_in_image,
    precision_recall,
)
from coordexp.evaluation.protocol import f1_thresholds
from coordexp.evaluation.registry import PROTOCOL_KEYS
from coordexp.evaluation.set_behaviour import Duplicates, find_duplicates, first_of_duplicates, set_metrics
from coordexp.evaluation.table import Bools, DetectionTable


@dataclass(frozen=True, slots=True, eq=False)
class Matched:
    """A table, its overlapping pairs, and both matchings: by category and score (AP), and by IoU alone (F1)."""

    table: DetectionTable
    pairs: Pairs
    by_score: list[CategoryMatches]
    by_iou: GreedyMatches

    @classmethod
    def of(cls, table: DetectionTable, params: EvalParams, pairs: Pairs | None = None) -> Matched:
        """Match a table; `pairs` are its own, if already known."""
        pairs = pairs or overlapping_pairs(table)
        return cls(table, pairs, match_categories(table, pairs), match_greedily(table, min(f1_thresholds(params))))

    def keep(self, keep_P: Bools, params: EvalParams) -> Matched:
        """Match only the kept predictions."""
        return Matched.of(self.table.keep_predictions(keep_P), params, self.pairs.keep_predictions(keep_P))

    def annotated(self, params: EvalParams) -> Matched:
        """Only the predictions of categories annotated in their image: oracle classes, the scope `annotated`."""
        return self.keep(named_in_image(self.table), params)

    def after_nms(self, duplicates: Duplicates, params: EvalParams) -> Matched:
        """Only the predictions that NMS keeps at the lowest duplicate IoU, in generation order and per name."""
        iou = min(params.duplicate_ious)
        return self.keep(first_of_duplicates(len(self.table.pred_score_P), duplicates, iou), params)


def headline(matched: Matched) -> dict[str, float | int | None]:
    """mAP, AP50, AP75, F1 (loc_50, full_50, full_95, full_mean), precision_50, recall_50, n_pred."""
    ap_KT = unweighted_ap(matched.by_score, matched.table.n_images)
    matches = matched.by_iou
    precision, recall = precision_recall(matches.counts(0.5, "full").sum(axis=0))
    return {
        "mAP": mean_ap(ap_KT),
        "AP50": mean_ap(ap_KT[:, :1]),
        "AP75": mean_ap(ap_KT[:, 5:6]),
        **{f"{mode}_{key}": micro_f1(matches, iou, mode) for mode, key, iou in _HEADLINE_F1},
        "full_mean": mean_f1(matches, "full"),
        "precision_50": precision,
        "recall_50": recall,
        "n_pred": len(matched.table.pred_score_P),
    }


_HEADLINE_F1: tuple[tuple[Mode, str, float], ...] = (("loc", "50", 0.5), ("full", "50", 0.5), ("full", "95", 0.95))


def protocol_metrics(everything: Matched, positive: Matched) -> dict[str, float | None]:
    """The `protocol` area: metrics with oracle classes, their gap to the full vocabulary, and the rate of absent names.

    The areas `coco` and `f1` hold the full-vocabulary metrics. Oracle-class metrics use the same answers without the
    predictions of categories that are not annotated in the image; a prompt that lists an image's categories may give
    other numbers.
    """
    full, restricted = headline(everything), headline(positive)
    metrics: dict[str, float | None] = {f"positive_{key}": restricted[key] for key in PROTOCOL_KEYS}
    for key in PROTOCOL_KEYS:
        low, high = full[key], restricted[key]
        metrics[f"gap_{key}"] = None if low is None or high is None else high - low
    n_pred, n_named = len(everything.table.pred_score_P), len(positive.table.pred_score_P)
    return metrics | {"absent_name_rate": (n_pred - n_named) / n_pred if n_pred else None}


def nms_metrics(everything: Matched, after_nms: Matched, params: EvalParams) -> dict[str, float | int | None]:
    """The `guarded` area: headline metrics and set behavior after NMS."""
    left = find_duplicates(after_nms.table, min(params.duplicate_ious))
    removed = len(everything.table.pred_score_P) - len(after_nms.table.pred_score_P)
    return {
        **headline(after_nms),
        "n_removed": removed,
        **set_metrics(after_nms.table, after_nms.by_iou, left, params),
    }


def worst_duplicates(table: DetectionTable, duplicates: Duplicates, params: EvalParams) -> list[dict[str, Any]]:
    """The ten images with the most duplicate pairs at the lowest duplicate IoU, in falling order."""
    pairs_I = duplicates.per_image(min(params.duplicate_ious))
    worst = np.argsort(-pairs_I, kind="stable")[:10]
    return [
        {
            "image_id": int(table.image_ids_I[i]),
            "pairs": int(pairs_I[i]),
            "n_pred": int(table.n_pred_I[i]),
            "n_gt": int(table.n_gt_I[i]),
        }
        for i in worst
        if pairs_I[i]
    ]
