"""Every metric the evaluator writes: what it means, its unit, and which way is better. Documents are made from this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coordexp.evaluation.parse import drop_key
from coordexp.evaluation.settings import EvalSettings, iou_key
from coordexp.text.parser import DROP_REASONS

Better = Literal["higher", "lower", "neither"]
INTERVAL_KEYS = (
    *("coco.mAP", "coco.AP50", "coco.AP75", "known.mAP", "known.AP50", "held_out.mAP", "held_out.AP50"),
    *("f1.loc_50", "f1.full_50", "f1.loc_mean", "f1.full_mean"),
)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric; `key` is "area.metric", undefined values are None."""

    key: str
    meaning: str
    unit: str = "0..1"
    better: Better = "higher"


_COCO = (
    MetricSpec("coco.mAP", "COCO AP, mean over IoU .50:.05:.95 and the categories that have objects"),
    MetricSpec("coco.AP50", "COCO AP at IoU .50"),
    MetricSpec("coco.AP75", "COCO AP at IoU .75"),
    MetricSpec("coco.AP90", "COCO AP at IoU .90"),
    MetricSpec("coco.APs", "COCO AP of objects with a small box"),
    MetricSpec("coco.APm", "COCO AP of objects with a medium box"),
    MetricSpec("coco.APl", "COCO AP of objects with a large box"),
    MetricSpec("coco.AR1", "COCO recall, mean over IoU, 1 prediction per image and category"),
    MetricSpec("coco.AR10", "COCO recall, 10 predictions per image and category"),
    MetricSpec("coco.AR100", "COCO recall, 100 predictions per image and category"),
    MetricSpec("coco.ARs", "COCO recall of objects with a small box"),
    MetricSpec("coco.ARm", "COCO recall of objects with a medium box"),
    MetricSpec("coco.ARl", "COCO recall of objects with a large box"),
    MetricSpec("coco.n_images", "images evaluated, those without objects included", "images", "neither"),
    MetricSpec("coco.n_gt", "annotated objects, crowd regions left out", "objects", "neither"),
    MetricSpec("coco.n_pred", "predictions, those of no category included", "predictions", "neither"),
    MetricSpec("known.mAP", "COCO AP over the categories seen in training"),
    MetricSpec("known.AP50", "COCO AP at IoU .50 over the categories seen in training"),
    MetricSpec("held_out.mAP", "COCO AP over the categories never seen in training"),
    MetricSpec("held_out.AP50", "COCO AP at IoU .50 over the categories never seen in training"),
)
_F1 = (
    MetricSpec("f1.precision_50", "right boxes with the right name / predictions, IoU .50"),
    MetricSpec("f1.recall_50", "right boxes with the right name / objects, IoU .50"),
    MetricSpec("f1.loc_mean", "micro F1 of the boxes alone, mean over IoU .50:.05:.95"),
    MetricSpec("f1.full_mean", "micro F1 of boxes and names, mean over IoU .50:.05:.95"),
    MetricSpec("f1.full_50_macro", "mean over images of each image's F1 of boxes and names, IoU .50"),
    MetricSpec("f1.tp_50", "right boxes with the right name, IoU .50", "objects"),
    MetricSpec("f1.fp_50", "predictions that are not among tp_50", "predictions", "lower"),
    MetricSpec("f1.fn_50", "objects that are not among tp_50", "objects", "lower"),
    MetricSpec("f1.sem_acc_on_matched_50", "share of matched boxes with the right name, IoU .50"),
)
_ROLLOUT = (
    MetricSpec("rollout.precision", "pairs of the training-time matching / predictions"),
    MetricSpec("rollout.recall", "pairs of the training-time matching / objects"),
    MetricSpec("rollout.f1", "F1 of the training-time matching (gate, then Hungarian); not the f1 area"),
    MetricSpec("rollout.matched_iou_mean", "mean IoU of the pairs of the training-time matching"),
)
_PARSE = (
    MetricSpec("parse.parse_rate", "answers that are whole: container found, not truncated, nothing dropped"),
    MetricSpec("parse.valid_objects", "objects parsed", "objects", "neither"),
    MetricSpec("parse.dropped_total", "objects dropped by the parser, all reasons", "objects", "lower"),
    MetricSpec("parse.truncated_rate", "answers cut by the token budget", better="lower"),
    MetricSpec("parse.empty_rate", "answers without a valid object", better="neither"),
)
_SET = (
    MetricSpec("set.dup_image_rate", "images with a duplicate pair at the lowest duplicate IoU", better="lower"),
    MetricSpec("set.count_error_mean", "predictions minus objects, mean over images", "objects per image", "neither"),
    MetricSpec("set.omission_rate", "objects without a matched box at IoU .50, names ignored", better="lower"),
    MetricSpec(
        "set.over_generation_rate", "predictions beyond their image's number of objects / predictions", better="lower"
    ),
    MetricSpec(
        "set.order_violation_rate", "neighbouring predictions whose (y1, x1) decreases / neighbours", better="lower"
    ),
    MetricSpec("set.giant_box_rate", "images where one box covers 90 % of the picture and two objects", better="lower"),
)
_CONFIDENCE = (
    MetricSpec(
        "confidence.ece",
        "expected calibration error at IoU .50, bins of equal mass; None if scores leave [0, 1]",
        better="lower",
    ),
    MetricSpec("confidence.auroc_tp_fp", "probability that a true positive outscores a false one, IoU .50"),
    MetricSpec(
        "confidence.perfect_ranking_mAP", "mAP of the same boxes under a perfect ranking: the headroom of the score"
    ),
    MetricSpec(
        "confidence.constant_score_mAP",
        "mAP with one score for all, ranked by image id and generation order",
        better="neither",
    ),
)


def metric_specs(settings: EvalSettings) -> dict[str, MetricSpec]:
    """All metrics under these settings, by key."""
    thresholds = [
        MetricSpec(f"f1.{mode}_{iou_key(u)}", f"micro F1 of {what}, IoU {u:g}")
        for u in settings.all_f1_ious
        for mode, what in (("loc", "the boxes alone"), ("full", "boxes and names"))
    ]
    duplicates = [
        MetricSpec(f"set.dup_pairs_{iou_key(u)}", f"pairs of one name with IoU >= {u:g}", "pairs per image", "lower")
        for u in settings.duplicate_ious
    ]
    dropped = [
        MetricSpec(f"parse.{drop_key(reason)}", f"objects dropped by the parser as {reason}", "objects", "lower")
        for reason in DROP_REASONS
    ]
    intervals = [
        MetricSpec(f"interval.{key}", f"95 % bootstrap interval over images of {key}", "[low, high]", "neither")
        for key in INTERVAL_KEYS
    ]
    every = (*_COCO, *_F1, *thresholds, *_ROLLOUT, *_PARSE, *dropped, *_SET, *duplicates, *_CONFIDENCE, *intervals)
    return {spec.key: spec for spec in every}
