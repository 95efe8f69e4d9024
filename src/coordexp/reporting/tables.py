"""Tables of metrics.json: every number in them is one of that file, in its own digits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coordexp.config.paths import CHECKPOINTS, COMPARISONS
from coordexp.config.schema import EvalParams
from coordexp.errors import DataError
from coordexp.evaluation.effect import Verdict
from coordexp.evaluation.protocol import iou_key
from coordexp.evaluation.registry import metric_specs
from coordexp.evaluation.soundness import FAULTS
from coordexp.reporting.inputs import Json, Metrics, metric
from coordexp.reporting.markdown import MISSING, escape, flatten, interval, number, percent, signed, table
from coordexp.reporting.outcomes import Outcomes
from coordexp.reporting.verdicts import compared, verdict_of

_ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}
_CONFUSED_ROWS = 8


def headline_keys(settings: EvalParams) -> list[str]:
    """The rows of the first table."""
    return [
        *("coco.mAP", "coco.AP50", "coco.AP75", "f1.full_50", "f1.full_95", "f1.full_mean", "f1.loc_50"),
        *("f1.precision_50", "f1.recall_50", "f1.full_50_macro", "f1.full_50_class_macro"),
        *("parse.parse_rate", f"set.dup_pairs_{iou_key(min(settings.duplicate_ious))}", "set.count_error_mean"),
    ]


def set_keys(metrics: Metrics, settings: EvalParams) -> list[str]:
    """The rows of the table on set behaviour and parsing; a drop reason has a row if any checkpoint met it."""
    met = {f"parse.{name}" for areas in metrics.values() for name, count in areas["parse"].items() if count}
    reasons = sorted(key for key in met if key.startswith("parse.dropped_") and key != "parse.dropped_total")
    return [
        *(f"set.dup_pairs_{iou_key(u)}" for u in settings.duplicate_ious),
        *("set.dup_image_rate", "set.count_error_mean", "set.omission_rate", "set.over_generation_rate"),
        *("set.order_violation_rate", "set.giant_box_rate", "parse.parse_rate", "parse.valid_objects"),
        *("parse.dropped_total", *reasons, *FAULTS, "parse.empty_rate"),
    ]


AREA_KEYS = ("coco.APs", "coco.APm", "coco.APl", "coco.ARs", "coco.ARm", "coco.ARl")
NAME_KEYS = ("known.mAP", "known.AP50", "held_out.mAP", "held_out.AP50", "f1.sem_acc_on_matched_50")
COUNT_KEYS = (
    *("coco.n_pred", "f1.tp_50", "f1.fp_50", "f1.fn_50", "f1.full_50", "coco.mAP", "confidence.perfect_ranking_mAP"),
    *(
        "confidence.constant_score_mAP",
        "confidence.auroc_tp_fp",
        "confidence.ece",
        "confidence.headroom_mAP",
        "confidence.lrp",
        "confidence.lrp_loc",
        "confidence.lrp_fp",
        "confidence.lrp_fn",
        "rollout.f1",
        "rollout.matched_iou_mean",
        "rollout.gate_rejected",
    ),
)


def metrics_table(metrics: Metrics, keys: Iterable[str], settings: EvalParams) -> str:
    """Metrics as rows, checkpoints as columns, with the 95 % interval where there is one."""
    specs = metric_specs(settings)
    rows = []
    for key in keys:
        spec = specs[key]
        unit = "" if spec.unit == "0..1" else f" ({spec.unit})"
        cells = [_cell(metrics, checkpoint, key) for checkpoint in CHECKPOINTS]
        rows.append([f"`{key}`{_ARROWS[spec.better]}", escape(spec.meaning) + unit, *cells])
    return table(["metric", "meaning", *CHECKPOINTS], rows, "ll" + "r" * len(CHECKPOINTS))


def _cell(metrics: Metrics, checkpoint: str, key: str) -> str:
    bounds = metrics[checkpoint]["interval"].get(key)
    return f"{number(metric(metrics, checkpoint, key))} {interval(bounds)}".rstrip()


PROTOCOL_ROWS = (
    *(("mAP", "coco.mAP", "mAP"), ("AP50", "coco.AP50", "AP50"), ("F1, IoU .50", "f1.full_50", "full_50")),
    *(("F1, IoU .95", "f1.full_95", "full_95"), ("F1, mean IoU .50:.95", "f1.full_mean", "full_mean")),
)


def protocol_table(metrics: Metrics) -> str:
    """Full vocabulary, GT-positive classes and their gap for each checkpoint, one row per metric and checkpoint."""
    rows = []
    for name in CHECKPOINTS:
        for title, full, key in PROTOCOL_ROWS:
            positive, gap = f"protocol.positive_{key}", f"protocol.gap_{key}"
            rows.append([name, title, *(_cell(metrics, name, k) for k in (full, positive, gap))])
    header = ["checkpoint", "metric", "full vocabulary (P2)", "GT-positive classes (P1)", "gap P1 - P2"]
    return table(header, rows, "llrrr")


def guarded_table(metrics: Metrics, settings: EvalParams) -> str:
    """Raw and guarded, side by side: if little changes, the metrics do not hide duplicates."""
    pairs = f"dup_pairs_{iou_key(min(settings.duplicate_ious))}"
    rows = [["predictions removed", *(number(metric(metrics, name, "guarded.n_removed")) for name in CHECKPOINTS)]]
    for raw, key in (
        *(("coco.mAP", "mAP"), ("coco.AP50", "AP50"), ("f1.full_50", "full_50"), ("f1.full_mean", "full_mean")),
        *(("f1.precision_50", "precision_50"), ("f1.recall_50", "recall_50"), (f"set.{pairs}", pairs)),
        *((f"set.{key}", key) for key in ("count_error_mean", "omission_rate", "over_generation_rate")),
    ):
        before_after = [
            f"{number(metric(metrics, name, raw))} to {number(metric(metrics, name, f'guarded.{key}'))}"
            for name in CHECKPOINTS
        ]
        rows.append([f"`{raw}`", *before_after])
    return table(["raw to guarded", *CHECKPOINTS], rows)


def omission_table(details: Mapping[str, Json]) -> str:
    """Missed objects by the number of objects in the image."""
    by_count = {name: required(details[name], "by_gt_count", f"{name}/details.json") for name in CHECKPOINTS}
    rows = []
    for n, row in enumerate(by_count[CHECKPOINTS[0]]):
        missed = [
            f"{number(by_count[name][n]['omission_rate'])} ({by_count[name][n]['count_error_mean']:+.2f})"
            for name in CHECKPOINTS
        ]
        rows.append([row["n_gt"], str(row["n_images"]), *missed])
    return table(["objects in the image", "images", *CHECKPOINTS], rows)


def worst_duplicates_table(details: Json) -> str:
    """The images with most duplicate pairs of one checkpoint; empty if there are none."""
    worst = required(details, "worst_duplicates", "details.json")
    rows = [[str(row[key]) for key in ("image_id", "pairs", "n_pred", "n_gt")] for row in worst]
    return table(["image id", "duplicate pairs", "predictions", "objects"], rows) if rows else ""


def scores_table(details: Mapping[str, Json]) -> str:
    """The mAP that each score would reach, and how well it tells right from false (AUROC)."""
    by_name = {
        name: {row["score"]: row for row in required(details[name], "scores", f"{name}/details.json")}
        for name in CHECKPOINTS
    }
    scores = dict.fromkeys(score for rows in by_name.values() for score in rows)
    bounds = [score for score in scores if score in ("constant", "perfect ranking")]
    rows = []
    for score in [*(s for s in scores if s not in bounds), *bounds]:
        cells = []
        for name in CHECKPOINTS:
            row = by_name[name].get(score)
            auroc = "" if row is None or row["auroc_tp_fp"] is None else f" ({row['auroc_tp_fp']:.3f})"
            cells.append(MISSING if row is None else f"{number(row['mAP'])}{auroc}")
        rows.append([escape(score), *cells])
    return table(["score", *CHECKPOINTS], rows)


def size_table(details: Mapping[str, Json], key: str, label: str) -> str:
    """Recall of boxes at IoU .50 / .75 / .95 by object size (`key` of details.json, `label` its column)."""
    by_size = {name: required(details[name], key, f"{name}/details.json") for name in CHECKPOINTS}
    rows = []
    for n, row in enumerate(by_size[CHECKPOINTS[0]]):
        recalls = [
            " / ".join(f"{by_size[name][n][f'recall_{iou}']:.2f}" for iou in (50, 75, 95)) for name in CHECKPOINTS
        ]
        rows.append([escape(row[label]), str(row["n_gt"]), *recalls])
    return table(["size", "objects", *CHECKPOINTS], rows)


def category_table(details: Json) -> str:
    """Every category of one checkpoint, most frequent first."""
    keys = ("AP", "AP50", "AP75", "precision_50", "recall_50", "f1_50")
    categories = required(details, "per_category", "details.json")
    rows = [
        [escape(row["name"]), row["split"].replace("_", " "), str(row["n_gt"]), str(row["n_pred"])]
        + [number(row[key]) for key in keys]
        for row in sorted(categories, key=lambda row: (-row["n_gt"], row["name"]))
        if row["n_gt"] or row["n_pred"]
    ]
    header = ["name", "split", "objects", "predictions", "AP", "AP50", "AP75", "precision", "recall", "F1"]
    return table(header, rows, "ll" + "r" * (len(header) - 2))


def mapping_table(metrics: Metrics) -> str:
    """How the predicted names were found among the categories."""
    ways = ("exact", "normalised", "semantic", "ambiguous", "unmapped")
    rows = [[name, *(number(metric(metrics, name, f"input.names_{way}")) for way in ways)] for name in CHECKPOINTS]
    return table(["predicted names", *ways], rows)


def comparison_table(metrics: Metrics, comparison: Mapping[str, Mapping[str, Json | None]]) -> str:
    """Paired differences with their verdicts; `could show` is the half-width of the interval."""
    rows = []
    for name, (new, old) in COMPARISONS.items():
        for key, difference in compared(metrics, comparison, name).items():
            pair = f"{new} - {old}"
            if difference is None:
                rows.append([pair, f"`{key}`", *[MISSING] * 4, Verdict.UNDEFINED.value])
                continue
            bounds = f"[{signed(difference.lo)}, {signed(difference.hi)}]"
            chance = number(difference.p_superior)
            verdict = verdict_of(difference).value
            rows.append(
                [pair, f"`{key}`", signed(difference.delta), bounds, chance, number(difference.half_width), verdict]
            )
    header = ["difference", "metric", "delta", "95 % interval", "P(superior)", "could show", "verdict"]
    return table(header, rows, "llrrrrl")


def confusion_table(outcomes: Outcomes) -> str:
    """The most frequent wrong names of located objects; empty if there are none."""
    confusions = sorted(outcomes.confusions().items(), key=lambda item: (-item[1], item[0]))[:_CONFUSED_ROWS]
    return table(
        ["annotated", "predicted", "objects"], [[escape(a), escape(b), str(n)] for (a, b), n in confusions], "llr"
    )


def upper_bound_table(upper_bound: Json) -> str:
    """Round trip through the bins by object size."""
    rows = [
        [
            escape(f"{kind} {row['size']}".strip()),
            str(row["n"]),
            *(number(row[name]) for name in ("mAP", "f1_95", "mean_iou")),
            percent(row["share_95"]),
        ]
        for key, kind in (("by_area", ""), ("by_side_px", "side, px:"))
        for row in required(upper_bound, key, "upper_bound.json")
    ]
    return table(["objects", "number", "mAP", "F1, IoU .95", "mean IoU", "IoU at least .95"], rows)


def leaves_table(tree: Any, header: Sequence[str]) -> str:
    """Every leaf of a JSON file as a row: for small statistics that other stages own."""
    return table(header, [[f"`{key}`", escape(number(value))] for key, value in flatten(tree)])


def required(tree: Json, key: str, file: str) -> Any:
    """A key that a file must have; raises DataError naming both."""
    if key not in tree:
        raise DataError(f"{file}: key {key!r} is missing, found {', '.join(tree) or 'none'}. Run its stage again.")
    return tree[key]
