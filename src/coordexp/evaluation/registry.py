"""Every metric: its meaning, its unit, which direction is better, and which tables show it.

The generated documents follow from this file. A new metric is computed in its area, declared here, and shown by each
view that lists its key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from coordexp.config.schema import EvalParams
from coordexp.evaluation.parse import LOOP_COPIES, drop_key
from coordexp.evaluation.protocol import f1_thresholds, iou_key
from coordexp.records.categories import Split
from coordexp.text.parser import DROP_REASONS

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric: `key` is "area.metric", `name` the short name in narrow tables. Undefined values are None."""

    key: str
    meaning: str
    unit: str = "0..1"
    better: Better = "higher"
    name: str = ""


# Tiers of category names by what training has of them (records.categories.Split). OPEN_TIERS leaves out the controls.
TIERS: dict[str, Split] = {
    **{"seen": "train", "strict": "strict", "phrase": "phrase"},
    **{"plain_only": "plain_only", "never": "never"},
}
OPEN_TIERS = ("seen", "strict", "phrase")
# The prompts of the vocabulary area.
ASKED = {"everything": "prompted for all objects", "list": "prompted with a list", "one": "prompted with one name"}

# The metrics of each view, in order. `<lowest>` is the lowest duplicate threshold of the parameters, `<each>` is every
# threshold or drop reason.
VIEWS: dict[str, tuple[str, ...]] = {
    "intervals": (  # each gets a bootstrap interval in metrics.json
        *("coco.mAP", "coco.AP50", "coco.AP75", "known.mAP", "known.AP50", "held_out.mAP", "held_out.AP50"),
        *("f1.loc_50", "f1.full_50", "f1.loc_95", "f1.full_95", "f1.loc_mean", "f1.full_mean"),
        *("f1.precision_50", "f1.recall_50", "f1.full_50_macro", "f1.full_50_annotated", "f1.full_mean_annotated"),
        *("protocol.positive_mAP", "protocol.positive_AP50", "protocol.positive_AP75"),
        *("protocol.positive_full_50", "protocol.positive_full_95", "protocol.positive_full_mean"),
        *("protocol.gap_mAP", "protocol.gap_AP50", "protocol.gap_AP75"),
        *("protocol.gap_full_50", "protocol.gap_full_95", "protocol.gap_full_mean"),
        *("guarded.mAP", "guarded.AP50", "guarded.full_50", "guarded.full_mean", "confidence.headroom_mAP"),
        "blind.margin_AP50",
    ),
    "vocabulary": (  # each gets a bootstrap interval
        *(f"vocabulary.{asked}_{tier}_AP50" for asked in ASKED for tier in TIERS),
        *("vocabulary.list_strict_to_seen", *(f"vocabulary.list_{tier}_exact_rival" for tier in OPEN_TIERS)),
        *(f"vocabulary.{key}_{probe}" for key in ("refused", "rejected") for probe in ("easy", "hard")),
        "vocabulary.one_recall",
    ),
    "lvis intervals": ("lvis.mAP", "lvis.AP50", "lvis.AP75", "lvis.APr", "lvis.APc", "lvis.APf"),
    "compared": (  # each gets a paired difference and a verdict; higher is better for all of them
        *("coco.mAP", "coco.AP50", "coco.AP75", "f1.full_50", "f1.loc_50", "f1.full_95", "f1.full_mean"),
        *("known.mAP", "held_out.mAP", "protocol.positive_full_mean", "guarded.full_50"),
    ),
    "headline": (  # what `dvc metrics` shows for each trained checkpoint
        *("coco.mAP", "coco.AP50", "f1.full_50", "set.dup_pairs_<lowest>"),
    ),
    "readme": (
        *("coco.mAP", "coco.AP50", "coco.AP75", "f1.full_50", "f1.loc_50", "set.dup_pairs_<lowest>"),
        "parse.parse_rate",
    ),
    "printed": (  # by `coordexp evaluate`
        *("coco.mAP", "coco.AP50", "coco.AP75", "f1.precision_50", "f1.recall_50", "f1.full_50", "f1.loc_50"),
        *("f1.full_95", "f1.full_mean", "protocol.positive_full_mean", "protocol.gap_full_mean", "guarded.full_50"),
        *("parse.parse_rate", "set.dup_pairs_<lowest>", "confidence.ece", "confidence.auroc_tp_fp"),
        *("confidence.headroom_mAP", "confidence.lrp", "confidence.best_f1_50", "confidence.best_threshold_50"),
        "input.names_unmapped",
        *("blind.margin_AP50", "errors.classification_cost", "errors.localization_cost", "errors.duplicate_cost"),
        *("errors.background_cost", "errors.missed_cost", "lvis.mAP", "lvis.APr", "lvis.APc", "lvis.APf"),
    ),
    # Tables of the report.
    "checkpoints": (
        *("coco.mAP", "coco.AP50", "coco.AP75", "f1.full_50", "f1.full_95", "f1.full_mean", "f1.loc_50"),
        *("f1.precision_50", "f1.recall_50", "f1.full_50_macro", "f1.full_50_class_macro"),
        *("parse.parse_rate", "set.dup_pairs_<lowest>", "set.count_error_mean"),
    ),
    "protocols": ("coco.mAP", "coco.AP50", "f1.full_50", "f1.full_95", "f1.full_mean"),
    "errors": (
        *("errors.classification", "errors.classification_cost", "errors.localization", "errors.localization_cost"),
        *("errors.both", "errors.both_cost", "errors.duplicate", "errors.duplicate_cost"),
        *("errors.background", "errors.background_cost", "errors.missed", "errors.missed_cost"),
    ),
    "blind": (
        *("coco.AP50", "blind.constant_AP50", "blind.median_box_AP50", "blind.dealt_AP50", "blind.margin_AP50"),
        *("f1.full_50", "blind.constant_full_50", "blind.median_box_full_50", "blind.dealt_full_50"),
    ),
    "absent names": ("protocol.absent_name_rate",),
    "sizes": ("coco.APs", "coco.APm", "coco.APl", "coco.ARs", "coco.ARm", "coco.ARl"),
    "names": ("known.mAP", "known.AP50", "held_out.mAP", "held_out.AP50", "f1.sem_acc_on_matched_50"),
    "mapping": (
        *("input.names_exact", "input.names_normalised", "input.names_semantic", "input.names_ambiguous"),
        "input.names_unmapped",
    ),
    "set": (
        *("set.dup_pairs_<each>", "set.dup_image_rate", "set.count_error_mean", "set.omission_rate"),
        *("set.over_generation_rate", "set.order_violation_rate", "set.giant_box_rate", "parse.parse_rate"),
        *("parse.valid_objects", "parse.dropped_total", "parse.dropped_<each>", "parse.truncated_rate"),
        *("parse.loop_rate", "parse.unreadable_rate", "parse.empty_rate", "input.zero_area_boxes"),
    ),
    "after NMS": (
        *("coco.mAP", "coco.AP50", "f1.full_50", "f1.full_mean", "f1.precision_50", "f1.recall_50"),
        *("set.dup_pairs_<lowest>", "set.count_error_mean", "set.omission_rate", "set.over_generation_rate"),
    ),
    "counts": (
        *("coco.n_pred", "f1.tp_50", "f1.fp_50", "f1.fn_50", "f1.full_50", "coco.mAP"),
        *("confidence.perfect_ranking_mAP", "confidence.constant_score_mAP", "confidence.auroc_tp_fp"),
        *("confidence.ece", "confidence.headroom_mAP", "confidence.lrp", "confidence.lrp_loc", "confidence.lrp_fp"),
        *("confidence.lrp_fn", "rollout.f1", "rollout.matched_iou_mean", "rollout.gate_rejected"),
    ),
}
# Key of the `protocol` area -> the full-vocabulary metric, and the resamples with oracle classes.
PROTOCOL_KEYS = {
    **{key: (f"coco.{key}", f"positive.{key}") for key in ("mAP", "AP50", "AP75")},
    **{key: (f"f1.{key}", f"f1.{key}_annotated") for key in ("full_50", "full_95", "full_mean")},
}
# Headline keys of the `guarded` area, which also has every key of `set`.
NMS_KEYS = (
    *("coco.mAP", "coco.AP50", "coco.AP75", "f1.loc_50", "f1.full_50", "f1.full_95", "f1.full_mean"),
    *("f1.precision_50", "f1.recall_50", "coco.n_pred"),
)


def view(name: str, params: EvalParams) -> tuple[str, ...]:
    """The keys that a view shows under these parameters, in order."""
    duplicates = [f"set.dup_pairs_{iou_key(u)}" for u in params.duplicate_ious]
    found = {
        "set.dup_pairs_<lowest>": [f"set.dup_pairs_{iou_key(min(params.duplicate_ious))}"],
        "set.dup_pairs_<each>": duplicates,
        "parse.dropped_<each>": sorted(f"parse.{drop_key(reason)}" for reason in DROP_REASONS),
    }
    return tuple(key for entry in VIEWS[name] for key in found.get(entry, [entry]))


def after_nms(key: str) -> str:
    """The key of a metric after NMS: `guarded.mAP` for `coco.mAP`."""
    return f"guarded.{key.split('.', 1)[1]}"


_COCO = (
    MetricSpec("coco.mAP", "COCO AP, mean over IoU .50:.05:.95 and over the categories that have objects", name="mAP"),
    MetricSpec("coco.AP50", "COCO AP at IoU .50", name="AP50"),
    MetricSpec("coco.AP75", "COCO AP at IoU .75", name="AP75"),
    MetricSpec("coco.AP90", "COCO AP at IoU .90"),
    MetricSpec("coco.APs", "COCO AP of small objects, by annotated area (box area if there is none)"),
    MetricSpec("coco.APm", "COCO AP of medium objects, by the same area"),
    MetricSpec("coco.APl", "COCO AP of large objects, by the same area"),
    MetricSpec("coco.AR1", "COCO recall, mean over IoU, 1 prediction per image and category"),
    MetricSpec("coco.AR10", "COCO recall, 10 predictions per image and category"),
    MetricSpec("coco.AR100", "COCO recall, 100 predictions per image and category"),
    MetricSpec("coco.ARs", "COCO recall of small objects, by annotated area (box area if there is none)"),
    MetricSpec("coco.ARm", "COCO recall of medium objects, by the same area"),
    MetricSpec("coco.ARl", "COCO recall of large objects, by the same area"),
    MetricSpec("coco.n_images", "evaluated images, including those without objects", "images", "neither"),
    MetricSpec("coco.n_gt", "annotated objects, without crowd regions", "objects", "neither"),
    MetricSpec(
        "coco.n_gt_annotation_area",
        "objects of n_gt whose area in APs to ARl is annotated and differs from the box area",
        "objects",
        "neither",
    ),
    MetricSpec("coco.n_pred", "predictions, including unmapped ones", "predictions", "neither"),
    MetricSpec("known.mAP", "COCO AP over the categories seen in training"),
    MetricSpec("known.AP50", "COCO AP at IoU .50 over the categories seen in training"),
    MetricSpec("held_out.mAP", "COCO AP over the categories not seen in training"),
    MetricSpec("held_out.AP50", "COCO AP at IoU .50 over the categories not seen in training"),
)
_F1 = (
    MetricSpec("f1.precision_50", "correct boxes with the correct name / predictions, IoU .50", name="precision"),
    MetricSpec("f1.recall_50", "correct boxes with the correct name / objects, IoU .50", name="recall"),
    MetricSpec("f1.full_50_class_macro", "mean of the F1 of each category that has objects, IoU .50"),
    MetricSpec("f1.tp_50", "true positives: correct boxes with the correct name, IoU .50", "objects"),
    MetricSpec("f1.fp_50", "false positives: predictions that are not in tp_50", "predictions", "lower"),
    MetricSpec("f1.fn_50", "false negatives: objects that are not in tp_50", "objects", "lower"),
    MetricSpec("f1.sem_acc_on_matched_50", "fraction of matched boxes with the correct name, IoU .50"),
)
_ROLLOUT = (
    MetricSpec("rollout.precision", "matched pairs of the training-time matching / predictions"),
    MetricSpec("rollout.recall", "matched pairs of the training-time matching / objects"),
    MetricSpec("rollout.f1", "F1 of the training-time matching (gate, then Hungarian), which differs from the f1 area"),
    MetricSpec("rollout.matched_iou_mean", "mean IoU of the matched pairs of the training-time matching"),
    MetricSpec("rollout.gate_rejected", "predictions whose pairs all fail the gate", "predictions", "lower"),
)
_PARSE = (
    MetricSpec(
        "parse.parse_rate",
        "fraction of answers that parse completely: container found, not truncated, nothing dropped",
        name="answers that parse",
    ),
    MetricSpec("parse.valid_objects", "objects parsed", "objects", "neither"),
    MetricSpec("parse.dropped_total", "objects dropped by the parser, for any reason", "objects", "lower"),
    MetricSpec("parse.truncated_rate", "fraction of answers truncated by the token budget", better="lower"),
    MetricSpec(
        "parse.loop_rate",
        f"fraction of answers that loop: {LOOP_COPIES} or more objects, and a third of all, copy earlier ones",
        better="lower",
    ),
    MetricSpec(
        "parse.unreadable_rate",
        "fraction of answers without an object list, with a malformed one, or with all objects dropped",
        better="lower",
    ),
    MetricSpec("parse.empty_rate", "fraction of answers without a valid object", better="neither"),
)
_SET = (
    MetricSpec("set.dup_image_rate", "fraction of images with a pair at the lowest duplicate IoU", better="lower"),
    MetricSpec("set.count_error_mean", "predictions minus objects, mean over images", "objects per image", "neither"),
    MetricSpec("set.omission_rate", "fraction of objects without a box at IoU .50, names ignored", better="lower"),
    MetricSpec(
        "set.over_generation_rate",
        "predictions in excess of the number of objects in the image / predictions",
        better="lower",
    ),
    MetricSpec(
        "set.order_violation_rate",
        "consecutive predictions whose (y1, x1) decreases / consecutive predictions",
        better="lower",
    ),
    MetricSpec(
        "set.giant_box_rate", "fraction of images where a box covers 90 % of the image and two objects", better="lower"
    ),
)
_LVIS = (
    MetricSpec("lvis.mAP", "LVIS AP: federated labels, 300 predictions per image, mean over IoU .50:.05:.95"),
    MetricSpec("lvis.AP50", "LVIS AP at IoU .50"),
    MetricSpec("lvis.AP75", "LVIS AP at IoU .75"),
    MetricSpec("lvis.APs", "LVIS AP of small objects, by annotated area (box area if there is none)"),
    MetricSpec("lvis.APm", "LVIS AP of medium objects, by the same area"),
    MetricSpec("lvis.APl", "LVIS AP of large objects, by the same area"),
    MetricSpec("lvis.APr", "LVIS AP of rare categories (in at most 10 training images)"),
    MetricSpec("lvis.APc", "LVIS AP of common categories (in 11 to 100 training images)"),
    MetricSpec("lvis.APf", "LVIS AP of frequent categories (in over 100 training images)"),
    MetricSpec("lvis.AR300", "LVIS recall, mean over IoU, 300 predictions per image"),
)
_INPUT = (
    MetricSpec("input.names_exact", "predictions whose description equals a category name", "predictions", "neither"),
    MetricSpec(
        "input.names_normalised",
        "predictions whose description equals a category name after normalization",
        "predictions",
        "neither",
    ),
    MetricSpec("input.names_semantic", "predictions mapped to the nearest name by meaning", "predictions", "neither"),
    MetricSpec(
        "input.names_ambiguous",
        "predictions left unmapped because two names are about equally near",
        "predictions",
        "lower",
    ),
    MetricSpec("input.names_unmapped", "predictions that are not mapped to a category", "predictions", "lower"),
    MetricSpec("input.control_char_descs", "descriptions with control characters", "predictions", "lower"),
    MetricSpec("input.empty_descs", "descriptions that are empty after normalization", "predictions", "lower"),
    MetricSpec("input.zero_area_boxes", "predicted boxes with zero area", "predictions", "lower"),
    MetricSpec("input.outside_boxes", "predicted boxes more than 1 px outside their image", "predictions", "lower"),
    MetricSpec("input.scores_outside_unit", "scores below 0 or above 1", "predictions", "neither"),
)
_PROTOCOL_NAMES = {
    "mAP": "mAP",
    "AP50": "AP at IoU .50",
    "AP75": "AP at IoU .75",
    "full_50": "F1 of boxes and names at IoU .50",
    "full_95": "F1 of boxes and names at IoU .95",
    "full_mean": "F1 of boxes and names, mean over IoU .50:.05:.95",
}
_PROTOCOL = (
    *(MetricSpec(f"protocol.positive_{key}", f"{name}, oracle classes") for key, name in _PROTOCOL_NAMES.items()),
    *(
        MetricSpec(f"protocol.gap_{key}", f"{name}: oracle classes minus full vocabulary", better="lower")
        for key, name in _PROTOCOL_NAMES.items()
    ),
    MetricSpec("protocol.absent_name_rate", "predictions whose name is not annotated in their image", better="lower"),
)
_CONFIDENCE = (
    MetricSpec(
        "confidence.ece",
        "expected calibration error at IoU .50, bins of equal mass; None if a score is outside [0, 1]",
        better="lower",
    ),
    MetricSpec(
        "confidence.auroc_tp_fp", "probability that a true positive has a higher score than a false positive, IoU .50"
    ),
    MetricSpec(
        "confidence.perfect_ranking_mAP", "mAP of the same boxes under a perfect ranking: the upper bound for any score"
    ),
    MetricSpec(
        "confidence.constant_score_mAP",
        "mAP with one constant score, ranked by image id and generation order",
        better="neither",
    ),
    MetricSpec(
        "confidence.headroom_mAP", "perfect-ranking mAP minus mAP: what a better score could gain", better="lower"
    ),
    MetricSpec(
        "confidence.lrp", "LRP error per object at its best score threshold, mean over categories", better="lower"
    ),
    MetricSpec("confidence.lrp_loc", "mean 1 - IoU of the true positives at that threshold", better="lower"),
    MetricSpec("confidence.lrp_fp", "1 - precision at that threshold, IoU .50", better="lower"),
    MetricSpec("confidence.lrp_fn", "1 - recall at that threshold, IoU .50", better="lower"),
    MetricSpec("confidence.best_f1_50", "F1 of boxes and names, IoU .50, at the score threshold that maximizes it"),
    MetricSpec(
        "confidence.best_threshold_50", "that threshold: predictions with at least this score count", "score", "neither"
    ),
)
_BLIND_WHAT = {
    "constant": "the most frequent label at its median box, in every image",
    "median_box": "the median box of each frequent label, in every image",
    "dealt": "the model's own predictions, shuffled across images",
}
_BLIND = (
    *(MetricSpec(f"blind.{key}_AP50", f"AP50 of {what}", better="neither") for key, what in _BLIND_WHAT.items()),
    *(
        MetricSpec(f"blind.{key}_full_50", f"F1 of boxes and names at IoU .50 of {what}", better="neither")
        for key, what in _BLIND_WHAT.items()
    ),
    MetricSpec("blind.margin_AP50", "AP50 minus the AP50 of the best blind control"),
)
# Plural name of the error, and its definition.
_ERROR_WHAT = {
    "classification": ("classification errors", "IoU >= .50 with an object of another label"),
    "localization": ("localization errors", "the label is correct, IoU with its object is .10 to .50"),
    "both": ("errors of both kinds", "IoU .10 to .50 with an object of another label"),
    "duplicate": ("duplicates", "a higher-ranked prediction is matched to the object"),
    "background": ("background false positives", "IoU under .10 with every object"),
    "missed": ("missed objects", "unmatched, and no classification or localization error is on them"),
}
_ERRORS = tuple(
    spec
    for key, (errors, definition) in _ERROR_WHAT.items()
    for spec in (
        MetricSpec(
            f"errors.{key}", f"{errors}: {definition}", "objects" if key == "missed" else "predictions", "lower"
        ),
        MetricSpec(f"errors.{key}_cost", f"AP50 lost to {errors}", better="lower"),
    )
)
_F1_SCOPES = (
    ("", "micro F1 of {what}, {iou}"),
    ("_macro", "macro F1 of {what}, mean over images, {iou}"),
    ("_annotated", "micro F1 of {what}, {iou}, only predictions with names annotated in their image"),
)


_F1_NAMES = {"full_50": "F1@.5", "full_95": "F1@.95", "full_mean": "F1@.5:.95", "loc_50": "F1@.5, class-agnostic"}


_OF_TIER = {
    "seen": "categories seen in training",
    "strict": "categories unseen in text and images",
    "phrase": "categories unseen in text",
    "plain_only": "colored nouns that training has only without a color (control)",
    "never": "categories without a word seen in training (control)",
}
_REFUSALS = {
    "refused": "fraction of empty answers",
    "rejected": "fraction of answers without a box at the confidence that finds 80 % of objects prompted by name,",
}
_VOCABULARY = (
    *(
        MetricSpec(f"vocabulary.{asked}_{tier}_AP50", f"AP at IoU .50 of {names}, {how}")
        for asked, how in ASKED.items()
        for tier, names in _OF_TIER.items()
    ),
    MetricSpec("vocabulary.list_strict_to_seen", "list_strict_AP50 / list_seen_AP50", "ratio"),
    *(
        MetricSpec(
            f"vocabulary.list_{tier}_exact_rival",
            f"fraction of located objects with the correct name over a rival with its first word, {_OF_TIER[tier]}",
        )
        for tier in OPEN_TIERS
    ),
    *(
        MetricSpec(f"vocabulary.{key}_{probe}", f"{what} when prompted with absent names, {names} with a present name")
        for key, what in _REFUSALS.items()
        for probe, names in (("easy", "none of which shares a word"), ("hard", "each of which shares a word"))
    ),
    MetricSpec(
        "vocabulary.one_recall", "fraction of objects found when prompted with one name, IoU .50, without controls"
    ),
)


def metric_specs(params: EvalParams, *, lvis: bool = False, vocabulary: bool = False) -> dict[str, MetricSpec]:
    """All metrics under these parameters, by key; the areas `lvis` and `vocabulary` only on request."""
    levels = [(iou_key(u), f"IoU {u:g}") for u in f1_thresholds(params)] + [("mean", "mean over IoU .50:.05:.95")]
    thresholds = [
        MetricSpec(
            f"f1.{mode}_{key}{scope}",
            meaning.format(what=what, iou=iou),
            name="" if scope else _F1_NAMES.get(f"{mode}_{key}", ""),
        )
        for key, iou in levels
        for mode, what in (("loc", "class-agnostic boxes"), ("full", "boxes and names"))
        for scope, meaning in _F1_SCOPES
    ]
    duplicates = [
        MetricSpec(
            *(f"set.dup_pairs_{iou_key(u)}", f"pairs with the same name and IoU >= {u:g}", "pairs per image", "lower"),
            name="duplicate pairs per image",
        )
        for u in params.duplicate_ious
    ]
    dropped = [
        MetricSpec(f"parse.{drop_key(reason)}", f"objects dropped by the parser as {reason}", "objects", "lower")
        for reason in DROP_REASONS
    ]
    of_set = [*_SET, *duplicates]
    raw = {spec.key: spec for spec in (*_COCO, *_F1, *thresholds, *of_set)}
    guarded = [
        replace(raw[key], key=after_nms(key), meaning=f"{raw[key].meaning}; after NMS")
        for key in (*NMS_KEYS, *(spec.key for spec in of_set))
    ]
    guarded.append(MetricSpec("guarded.n_removed", "predictions that NMS removes", "predictions", "lower"))
    with_interval = [*view("intervals", params), *(view("lvis intervals", params) if lvis else ())]
    with_interval += view("vocabulary", params) if vocabulary else ()
    intervals = [
        MetricSpec(f"interval.{key}", f"95 % bootstrap interval of {key} over images", "[low, high]", "neither")
        for key in with_interval
    ]
    every = [*_COCO, *(_LVIS if lvis else ()), *_F1, *thresholds, *_PROTOCOL, *_ROLLOUT, *_PARSE, *dropped, *_INPUT]
    blind = [
        replace(
            spec, key=spec.key.replace(".", "_blind."), meaning=f"{spec.meaning}; predictions shuffled across images"
        )
        for spec in _VOCABULARY
    ]
    every += [
        *of_set,
        *guarded,
        *_CONFIDENCE,
        *_BLIND,
        *_ERRORS,
        *([*_VOCABULARY, *blind] if vocabulary else ()),
        *intervals,
    ]
    return {spec.key: spec for spec in every}
