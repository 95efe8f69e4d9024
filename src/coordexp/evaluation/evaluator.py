"""The evaluation of one set of predictions.

    results = list(read_results(Path("gt_vs_pred.jsonl")))
    evaluation = evaluate(results, read_categories(Path("categories.json")), STANDARD, STANDARD_MATCHING, 17)
    evaluation.metrics["coco"]["AP50"]

The names, meanings and units of all metrics are in registry.py. A metric that is undefined on the given data (no object
of that kind, no prediction) is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coordexp.config.schema import EvalParams, MatchingParams
from coordexp.evaluation.average_precision import match_categories
from coordexp.evaluation.blind import MARGIN, blind_metrics
from coordexp.evaluation.bootstrap import interval, resample_weights, resampled_ap, resampled_f1
from coordexp.evaluation.coco import CocoResult, coco_ap
from coordexp.evaluation.confidence import (
    CONSTANT,
    IN_USE,
    PERFECT,
    best_threshold,
    compare_scores,
    lrp_metrics,
    oracle_scores,
    reliability,
    threshold_curve,
)
from coordexp.evaluation.details import by_area, per_category, per_image, recall_by_side
from coordexp.evaluation.error_causes import error_metrics, find_causes
from coordexp.evaluation.f1 import f1_metrics
from coordexp.evaluation.lvis import FederatedLabels, check_federated, frequency_rows, lvis_ap, match_federated
from coordexp.evaluation.matched import Matched, nms_metrics, protocol_metrics, worst_duplicates
from coordexp.evaluation.parse import parse_metrics, soundness_metrics
from coordexp.evaluation.protocol import RECALL_GRID, iou_key
from coordexp.evaluation.registry import PROTOCOL_KEYS, view
from coordexp.evaluation.set_behaviour import Duplicates, find_duplicates, omission_by_gt_count, set_metrics
from coordexp.evaluation.table import DetectionTable, Floats, Ints, build_table, input_metrics
from coordexp.evaluation.training_matching import rollout_metrics
from coordexp.evaluation.vocabulary import vocabulary_metrics
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import ImageResult, own_lines

Areas = dict[str, dict[str, Any]]  # area -> metric -> value


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The results for one set of predictions.

    Attributes:
        metrics: area -> metric -> value; the areas and keys of registry.py.
        per_image: one row per image, by image id: the values needed to select images for inspection.
        pr_curve: `recall` (101 points), `precision_50` and `precision_75` (means over categories).
        details: further tables: `per_category`, `by_area`, `by_side_px`, `by_gt_count`, `reliability`, `scores` (the AP
            of each score), `thresholds` (precision, recall and F1 by score threshold), `worst_duplicates`,
            `coco_backend`, and `by_tier` if there are probes.
        samples: metric -> (B,) its value in each bootstrap resample.
        table: the validated input.
        params: the parameters of the evaluation.
        seed: seed of the resamples.
    """

    metrics: Areas
    per_image: list[dict[str, Any]]
    pr_curve: dict[str, list[float]]
    details: dict[str, Any]
    samples: dict[str, Floats]
    table: DetectionTable
    params: EvalParams
    seed: int

    def value(self, key: str) -> float | None:
        """The metric with the key "area.metric"."""
        return _value(self.metrics, key)


def evaluate(
    results: Sequence[ImageResult],
    categories: Sequence[Category],
    params: EvalParams,
    matching: MatchingParams,
    seed: int,
    federated: FederatedLabels | None = None,
) -> Evaluation:
    """Evaluate the predictions of a data set.

    Args:
        results: the lines of a gt_vs_pred file, in any order; every image occurs once, every prediction has a score.
        categories: the categories of the data set; every annotated name must be one of them.
        params: thresholds, mapping of descriptions and number of resamples.
        matching: the training-time matching, for the `rollout` area.
        seed: seed of the resamples.
        federated: LVIS's labels, which add the area `lvis`. Results with probes add the areas `vocabulary` and
            `vocabulary_blind`; all other areas use only the main line of each image.

    Raises:
        ConfigError: descriptions are mapped by meaning, and the text encoder is not installed.
        DataError: the results are invalid (see table.py).
    """
    lines, results = results, own_lines(results)
    table = build_table(results, categories, params)
    everything = Matched.of(table, params)
    coco, duplicates = coco_ap(table), find_duplicates(table, min(params.duplicate_ious))
    positive, after_nms = everything.annotated(params), everything.after_nms(duplicates, params)
    scores, curve = compare_scores(table, everything.pairs), threshold_curve(table, everything.by_score)
    metrics: Areas = {
        "coco": _coco_metrics(table, coco),
        **{name: _subset_metrics(coco, rows) for name, rows in _subsets(table).items()},
        **_areas(results, everything, positive, after_nms, duplicates, params, matching),
        "confidence": _confidence_metrics(scores) | lrp_metrics(table, everything.by_score) | best_threshold(curve),
        "errors": error_metrics(table, find_causes(table, everything.by_score)),
    }
    weights_BI = resample_weights(table.n_images, params.bootstrap_resamples, seed)
    samples = _resample(everything, positive, after_nms, weights_BI)
    samples |= _resample_headroom(everything, samples["coco.mAP"], weights_BI)
    metrics["blind"], samples[MARGIN] = blind_metrics(table, everything.by_score, weights_BI, seed)
    if federated:
        check_federated(table, federated)
        metrics["lvis"] = lvis_ap(table, federated)
        samples |= _resample_lvis(everything, federated, weights_BI)
    details = _details(everything, coco, duplicates, params) | {"scores": scores, "thresholds": curve}
    if has_probes := len(lines) > len(results):
        areas, resampled, details["by_tier"] = vocabulary_metrics(lines, categories, params, seed)
        metrics, samples = metrics | areas, samples | resampled
    shown = {"intervals": True, "lvis intervals": bool(federated), "vocabulary": has_probes}
    keys = [key for name, is_shown in shown.items() if is_shown for key in view(name, params)]
    return Evaluation(
        metrics=metrics | {"interval": {key: _interval(metrics, samples, key) for key in keys}},
        per_image=per_image(results, table, everything.by_iou, duplicates, params),
        pr_curve=_pr_curve(coco),
        details=details,
        samples=samples,
        table=table,
        params=params,
        seed=seed,
    )


def _areas(
    results: Sequence[ImageResult],
    everything: Matched,
    positive: Matched,
    after_nms: Matched,
    duplicates: Duplicates,
    params: EvalParams,
    matching: MatchingParams,
) -> Areas:
    """The areas that need neither COCO's evaluator nor alternative scores."""
    table = everything.table
    return {
        "f1": f1_metrics(table, everything.by_iou, positive.by_iou, params),
        "protocol": protocol_metrics(everything, positive),
        "rollout": rollout_metrics(table, matching),
        "parse": parse_metrics(results) | soundness_metrics(results, table),
        "input": input_metrics(results, table),
        "set": set_metrics(table, everything.by_iou, duplicates, params),
        "guarded": nms_metrics(everything, after_nms, params),
    }


def _interval(metrics: Areas, samples: Mapping[str, Floats], key: str) -> Any:
    is_share = ".gap_" not in key and "_to_" not in key and key != MARGIN
    return interval(samples[key], _value(metrics, key), is_share=is_share)


def _pr_curve(coco: CocoResult) -> dict[str, list[float]]:
    precision = {f"precision_{iou_key(iou)}": coco.pr_curve(iou) for iou in (0.5, 0.75)}
    return {"recall": RECALL_GRID.tolist(), **precision}


def _details(matched: Matched, coco: CocoResult, duplicates: Duplicates, params: EvalParams) -> dict[str, Any]:
    """The detail tables."""
    table = matched.table
    return {
        "per_category": per_category(table, coco, matched.by_iou),
        "by_area": by_area(table, coco, matched.by_iou),
        "by_side_px": recall_by_side(table, matched.by_iou),
        "by_gt_count": omission_by_gt_count(matched.by_iou),
        "reliability": reliability(table, matched.by_score),
        "worst_duplicates": worst_duplicates(table, duplicates, params),
        "coco_backend": {"name": coco.backend, "reason": coco.reason},
    }


def _value(metrics: Areas, key: str) -> float | None:
    area, metric = key.split(".")
    return metrics[area][metric]


def _subsets(table: DetectionTable) -> dict[str, list[int]]:
    split_of = [category.split for category in table.index.categories]  # None: unknown whether it occurs in training
    return {
        "known": [row for row, split in enumerate(split_of) if split == "train"],
        "held_out": [row for row, split in enumerate(split_of) if split not in ("train", None)],
    }


def _coco_metrics(table: DetectionTable, coco: CocoResult) -> dict[str, float | int | None]:
    annotated_G = ~np.isnan(table.gt_annotated_px2_G) & ~table.gt_crowd_G
    counts = {
        "n_images": table.n_images,
        "n_gt": int(table.n_gt_I.sum()),
        "n_gt_annotation_area": int(annotated_G.sum()),
        "n_pred": int(table.n_pred_I.sum()),
    }
    return {**coco.stats, "AP90": coco.mean_ap(iou=0.9), **counts}


def _subset_metrics(coco: CocoResult, rows: list[int]) -> dict[str, float | None]:
    return {"mAP": coco.mean_ap(rows), "AP50": coco.mean_ap(rows, iou=0.5)}


def _confidence_metrics(scores: list[dict[str, Any]]) -> dict[str, float | None]:
    row = {row["score"]: row for row in scores}
    actual, perfect = row[IN_USE]["mAP"], row[PERFECT]["mAP"]
    return {
        "ece": row[IN_USE]["ece"],
        "auroc_tp_fp": row[IN_USE]["auroc_tp_fp"],
        "perfect_ranking_mAP": perfect,
        "constant_score_mAP": row[CONSTANT]["mAP"],
        "headroom_mAP": None if actual is None else perfect - actual,
    }


def _resample(everything: Matched, positive: Matched, after_nms: Matched, weights_BI: Ints) -> dict[str, Floats]:
    table = everything.table
    whole = list(range(len(table.index)))
    samples = resampled_ap(everything.by_score, weights_BI, {"coco": whole, **_subsets(table)})
    samples |= resampled_f1(everything.by_iou, weights_BI)
    samples |= resampled_f1(positive.by_iou, weights_BI, scope="_annotated")
    samples |= resampled_ap(positive.by_score, weights_BI, {"positive": whole})
    samples |= resampled_f1(after_nms.by_iou, weights_BI, area="guarded")
    samples |= resampled_ap(after_nms.by_score, weights_BI, {"guarded": whole})
    for key, (of_all, of_positive) in PROTOCOL_KEYS.items():
        samples[f"protocol.positive_{key}"] = samples[of_positive]
        samples[f"protocol.gap_{key}"] = samples[of_positive] - samples[of_all]
    return samples


def _resample_headroom(everything: Matched, mAP_B: Floats, weights_BI: Ints) -> dict[str, Floats]:
    """The mAP that a perfect ranking would add, in each resample."""
    table, pairs = everything.table, everything.pairs
    ranked = match_categories(table.with_scores(oracle_scores(table, pairs)), pairs)
    perfect = resampled_ap(ranked, weights_BI, {"perfect": list(range(len(table.index)))})["perfect.mAP"]
    return {"confidence.headroom_mAP": perfect - mAP_B}


def _resample_lvis(everything: Matched, federated: FederatedLabels, weights_BI: Ints) -> dict[str, Floats]:
    rows = {"lvis": list(range(len(everything.table.index))), **frequency_rows(everything.table, federated)}
    samples = resampled_ap(match_federated(everything.table, federated, everything.pairs), weights_BI, rows)
    by_frequency = {f"lvis.{name}": samples[f"{name}.mAP"] for name in ("APr", "APc", "APf")}
    return {key: values for key, values in samples.items() if key.startswith("lvis.")} | by_frequency


def rounded(value: Any, digits: int = 4) -> Any:
    """A nested metrics value with its floats rounded, for writing; None, integers and strings do not change."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return round(value, digits) if isinstance(value, float) else value
