"""One evaluation of one set of predictions, and the comparison of two.

    results = list(read_results(Path("gt_vs_pred.jsonl")))
    evaluation = evaluate(results, read_categories(Path("categories.json")), EvalSettings())
    evaluation.metrics["coco"]["AP50"]

The names, meanings and units of all metrics are in registry.py. A metric that is undefined on the data at hand (no
object of that kind, no prediction) is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coordexp.errors import DataError
from coordexp.evaluation.average_precision import mean_ap, unweighted_ap
from coordexp.evaluation.coco_matching import CategoryMatches, match_categories
from coordexp.evaluation.bootstrap import difference, interval, resample_weights, resampled_ap, resampled_f1
from coordexp.evaluation.categories import NO_CATEGORY, Category
from coordexp.evaluation.coco import CocoResult, coco_ap
from coordexp.evaluation.confidence import confidence_metrics
from coordexp.evaluation.f1 import GreedyMatches, f1_from_counts, f1_metrics, match_greedily, micro_f1, named_in_image
from coordexp.evaluation.parse import parse_metrics
from coordexp.evaluation.registry import INTERVAL_KEYS
from coordexp.evaluation.set_behaviour import (
    Duplicates,
    find_duplicates,
    first_of_duplicates,
    mean_matched_iou,
    omission_by_gt_count,
    set_metrics,
)
from coordexp.evaluation.settings import COCO_IOUS, RECALL_GRID, EvalSettings, iou_key
from coordexp.evaluation.sizes import recall_by_side
from coordexp.evaluation.table import DetectionTable, Floats, build_table
from coordexp.evaluation.training_matching import rollout_metrics
from coordexp.records.gt_vs_pred import ImageResult

COMPARED = ("coco.mAP", "coco.AP50", "coco.AP75", "f1.full_50", "f1.loc_50")


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What is known about one set of predictions.

    Attributes:
        metrics: area -> metric -> value; the areas and keys of registry.py.
        per_image: one row per image, by image id: what is needed to choose the images worth looking at.
        pr_curve: `recall` (101 points), `precision_50` and `precision_75` (means over categories).
        details: tables beside the metrics: `per_category`, `by_side_px`, `by_gt_count`, `reliability`, `guarded` (after
            a duplicate guard), `annotated` (only predictions of categories present in their image), `mapping`,
            `coco_backend`.
        samples: metric -> its value in each bootstrap resample, shape (B,).
        table: the checked input.
        settings: the settings all of this was computed under.
    """

    metrics: dict[str, dict[str, Any]]
    per_image: list[dict[str, Any]]
    pr_curve: dict[str, list[float]]
    details: dict[str, Any]
    samples: dict[str, Floats]
    table: DetectionTable
    settings: EvalSettings

    def value(self, key: str) -> float | None:
        """The metric named "area.metric"."""
        return _value(self.metrics, key)


def evaluate(results: Sequence[ImageResult], categories: Sequence[Category], settings: EvalSettings) -> Evaluation:
    """Evaluate the predictions of a data set.

    Args:
        results: the lines of a gt_vs_pred file, in any order, every image once, every prediction scored.
        categories: the classes of the data set; every annotated name must be one of them.
        settings: thresholds, bands, resamples and seed.

    Raises:
        DataError: the results break their contract (see `build_table`).
    """
    table = build_table(results, categories)
    coco = coco_ap(table, settings)
    ap_matches = match_categories(table)
    f1_matches = match_greedily(table, min(settings.all_f1_ious))
    duplicates = find_duplicates(table, min(settings.duplicate_ious))
    confidence, reliability = confidence_metrics(table, ap_matches, settings)
    samples = _resample(table, ap_matches, f1_matches, settings)
    metrics: dict[str, dict[str, Any]] = {
        "coco": _coco_metrics(table, coco),
        **{name: _subset_metrics(coco, rows) for name, rows in _subsets(table).items()},
        "f1": f1_metrics(f1_matches, settings),
        "rollout": rollout_metrics(table, settings.matching),
        "parse": parse_metrics(results),
        "set": set_metrics(table, f1_matches, duplicates, settings),
        "confidence": confidence,
    }
    metrics["interval"] = {key: interval(samples[key], _value(metrics, key)) for key in INTERVAL_KEYS}
    details = {
        "per_category": _per_category(table, coco),
        "by_side_px": recall_by_side(table, f1_matches),
        "by_gt_count": omission_by_gt_count(f1_matches),
        "reliability": reliability,
        "guarded": _guarded(table, duplicates, settings),
        "annotated": _headline(table.keep_predictions(named_in_image(table))),
        "mapping": {how: table.mapping.get(how, 0) for how in ("exact", "normalised", "unmapped")},
        "coco_backend": {"name": coco.backend, "reason": coco.reason},
    }
    return Evaluation(
        metrics=metrics,
        per_image=_per_image(results, table, f1_matches, duplicates, settings),
        pr_curve={
            "recall": RECALL_GRID.tolist(),
            "precision_50": coco.pr_curve(0.5),
            "precision_75": coco.pr_curve(0.75),
        },
        details=details,
        samples=samples,
        table=table,
        settings=settings,
    )


def _value(metrics: dict[str, dict[str, Any]], key: str) -> float | None:
    area, metric = key.split(".")
    return metrics[area][metric]


def _subsets(table: DetectionTable) -> dict[str, list[int]]:
    return {"known": table.index.rows("train"), "held_out": table.index.rows("held_out")}


def _coco_metrics(table: DetectionTable, coco: CocoResult) -> dict[str, float | int | None]:
    counts = {"n_images": table.n_images, "n_gt": int(table.n_gt_I.sum()), "n_pred": int(table.n_pred_I.sum())}
    return {**coco.stats, "AP90": coco.mean_ap(iou=0.9), **counts}


def _subset_metrics(coco: CocoResult, rows: list[int]) -> dict[str, float | None]:
    return {"mAP": coco.mean_ap(rows), "AP50": coco.mean_ap(rows, iou=0.5)}


def _resample(
    table: DetectionTable, ap_matches: list[CategoryMatches], f1_matches: GreedyMatches, settings: EvalSettings
) -> dict[str, Floats]:
    weights_BI = resample_weights(table.n_images, settings)
    rows = {"coco": list(range(len(table.index))), **_subsets(table)}
    return resampled_ap(ap_matches, weights_BI, rows) | resampled_f1(f1_matches, weights_BI)


def _headline(table: DetectionTable) -> dict[str, float | int | None]:
    """The numbers that are repeated for a changed set of predictions."""
    ap_KT = unweighted_ap(match_categories(table), table.n_images)
    matches = match_greedily(table, COCO_IOUS[0])
    return {
        "coco.mAP": mean_ap(ap_KT),
        "coco.AP50": mean_ap(ap_KT[:, :1]),
        "coco.AP75": mean_ap(ap_KT[:, 5:6]),
        "f1.full_50": micro_f1(matches, 0.5, "full"),
        "f1.loc_50": micro_f1(matches, 0.5, "loc"),
        "n_pred": len(table.pred_score_P),
    }


def _guarded(table: DetectionTable, duplicates: Duplicates, settings: EvalSettings) -> dict[str, Any]:
    iou = min(settings.duplicate_ious)
    keep_P = first_of_duplicates(len(table.pred_score_P), duplicates, iou)
    return {"iou": iou, **_headline(table.keep_predictions(keep_P))}


def _per_category(table: DetectionTable, coco: CocoResult) -> list[dict[str, Any]]:
    n_categories = len(table.index)
    ap_KT = coco.ap_KT()
    n_gt = np.bincount(table.gt_category_G[~table.gt_crowd_G], minlength=n_categories)
    n_pred = np.bincount(table.pred_category_P[table.pred_category_P != NO_CATEGORY], minlength=n_categories)
    return [
        {
            "id": category.id,
            "name": category.name,
            "split": category.split,
            "n_gt": int(n_gt[row]),
            "n_pred": int(n_pred[row]),
            "AP": mean_ap(ap_KT[row : row + 1]),
            "AP50": mean_ap(ap_KT[row : row + 1, :1]),
            "AP75": mean_ap(ap_KT[row : row + 1, 5:6]),
        }
        for row, category in enumerate(table.index.categories)
    ]


def _per_image(
    results: Sequence[ImageResult],
    table: DetectionTable,
    matches: GreedyMatches,
    duplicates: Duplicates,
    settings: EvalSettings,
) -> list[dict[str, Any]]:
    full_I3, loc_I3 = matches.counts(0.5, "full"), matches.counts(0.5, "loc")
    unmapped_I = np.bincount(table.pred_image_P[table.pred_category_P == NO_CATEGORY], minlength=table.n_images)
    dup_iou = min(settings.duplicate_ious)
    columns = {
        "n_gt": table.n_gt_I,
        "n_pred": table.n_pred_I,
        "tp_50": full_I3[:, 0],
        "fp_50": full_I3[:, 1],
        "fn_50": full_I3[:, 2],
        "f1_full_50": f1_from_counts(full_I3),
        "f1_loc_50": f1_from_counts(loc_I3),
        "matched_iou_mean": mean_matched_iou(matches, 0.5),
        f"dup_pairs_{iou_key(dup_iou)}": duplicates.per_image(dup_iou),
        "n_unmapped": unmapped_I,
    }
    lists = [[None if v != v else v for v in column.tolist()] for column in columns.values()]  # NaN: no match, no mean
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]
    ordered = sorted(results, key=lambda r: r.image_id)
    return [
        {"image_id": r.image_id, "image": r.image, **row, "parse_ok": r.parse.ok, "truncated": r.parse.truncated}
        for r, row in zip(ordered, rows, strict=True)
    ]


def compare(a: Evaluation, b: Evaluation) -> dict[str, dict[str, float] | None]:
    """The paired difference a - b of the headline metrics over the same images, resample by resample.

    Returns:
        metric -> `delta` (of the point values), `lo` and `hi` (95 % interval), `p_superior` (probability that a is
        better, ties counted half); None for a metric that is undefined on either side.

    Raises:
        DataError: the two sides differ in images, in ground truth, or in the bootstrap's seed or number of resamples.
    """
    _check_pairable(a, b)
    compared: dict[str, dict[str, float] | None] = {}
    for key in COMPARED:
        value_a, value_b = a.value(key), b.value(key)
        if value_a is None or value_b is None:
            compared[key] = None
        else:
            compared[key] = difference(a.samples[key], b.samples[key], value_a - value_b)
    return compared


def _check_pairable(a: Evaluation, b: Evaluation) -> None:
    ids_a, ids_b = set(a.table.image_ids_I.tolist()), set(b.table.image_ids_I.tolist())
    if ids_a != ids_b:
        only = sorted(ids_a ^ ids_b)
        raise DataError(
            f"The two evaluations hold different images: {len(only)} ids are in one only, for example {only[0]}. "
            "A paired comparison needs identical image lists; decode both on the same split."
        )
    names = ("gt_image_G", "gt_boxes_G4", "gt_category_G", "gt_crowd_G")
    if not all(np.array_equal(getattr(a.table, name), getattr(b.table, name)) for name in names):
        raise DataError("The two evaluations annotate the same images differently; use one version of the data.")
    draws_a, draws_b = ((e.settings.seed, e.settings.bootstrap_resamples) for e in (a, b))
    if draws_a != draws_b:
        raise DataError(
            f"Bootstrap (seed, resamples) is {draws_a} on one side, {draws_b} on the other; use one setting."
        )


def most_changed_images(a: Evaluation, b: Evaluation, n: int) -> list[dict[str, Any]]:
    """The n images whose F1 (names included, IoU 0.5) differs most between a and b, largest difference first."""
    _check_pairable(a, b)
    rows = [
        {
            "image_id": row_a["image_id"],
            "image": row_a["image"],
            "f1_full_50_a": row_a["f1_full_50"],
            "f1_full_50_b": row_b["f1_full_50"],
            "delta": row_a["f1_full_50"] - row_b["f1_full_50"],
        }
        for row_a, row_b in zip(a.per_image, b.per_image, strict=True)
    ]
    return sorted(rows, key=lambda row: -abs(row["delta"]))[:n]


def rounded(value: Any, digits: int = 4) -> Any:
    """A nested metrics value with its floats rounded, for writing; None, integers and strings stay as they are."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return round(value, digits) if isinstance(value, float) else value
