"""Tables of metrics.json: every number in them is one of that file, in its own digits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coordexp.config.paths import CHECKPOINTS, COMPARISONS
from coordexp.errors import DataError
from coordexp.evaluation.registry import metric_specs
from coordexp.evaluation.settings import EvalSettings, iou_key
from coordexp.reporting.inputs import Json
from coordexp.reporting.markdown import MISSING, escape, flatten, interval, number, percent, signed, table
from coordexp.reporting.outcomes import Outcomes
from coordexp.reporting.verdicts import Verdict, difference_from, verdict_of

Metrics = Mapping[str, Json]  # checkpoint -> area -> metric
_ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}
_CONFUSED_ROWS = 8


def metric(metrics: Metrics, checkpoint: str, key: str) -> Any:
    """The value of "area.metric"; raises DataError if the evaluation did not write it."""
    area, name = key.split(".", 1)
    try:
        return metrics[checkpoint][area][name]
    except KeyError as error:
        raise DataError(
            f"metrics.json: {checkpoint}.eval.{key} is missing. Run `dvc repro coco-eval` under the present parameters."
        ) from error


def headline_keys(settings: EvalSettings) -> list[str]:
    """The rows of the first table."""
    return [
        *("coco.mAP", "coco.AP50", "coco.AP75", "f1.full_50", "f1.loc_50", "f1.precision_50", "f1.recall_50"),
        *("parse.parse_rate", f"set.dup_pairs_{iou_key(min(settings.duplicate_ious))}", "set.count_error_mean"),
    ]


def set_keys(metrics: Metrics, settings: EvalSettings) -> list[str]:
    """The rows of the table on set behaviour and parsing; a drop reason has a row if any checkpoint met it."""
    met = {f"parse.{name}" for areas in metrics.values() for name, count in areas["parse"].items() if count}
    reasons = sorted(key for key in met if key.startswith("parse.dropped_") and key != "parse.dropped_total")
    return [
        *(f"set.dup_pairs_{iou_key(u)}" for u in settings.duplicate_ious),
        *("set.dup_image_rate", "set.count_error_mean", "set.omission_rate", "set.over_generation_rate"),
        *("set.order_violation_rate", "set.giant_box_rate", "parse.parse_rate", "parse.valid_objects"),
        *("parse.dropped_total", *reasons, "parse.truncated_rate", "parse.empty_rate"),
    ]


NAME_KEYS = ("known.mAP", "known.AP50", "held_out.mAP", "held_out.AP50", "f1.sem_acc_on_matched_50")
COUNT_KEYS = (
    *("coco.n_pred", "f1.tp_50", "f1.fp_50", "f1.fn_50", "f1.full_50", "coco.mAP", "confidence.perfect_ranking_mAP"),
    *(
        "confidence.constant_score_mAP",
        "confidence.auroc_tp_fp",
        "confidence.ece",
        "rollout.f1",
        "rollout.matched_iou_mean",
    ),
)


def metrics_table(metrics: Metrics, keys: Iterable[str], settings: EvalSettings) -> str:
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


def guarded_table(metrics: Metrics, details: Mapping[str, Json]) -> str:
    """What removing duplicates after the fact would change: if little, the metrics do not hide them."""
    keys = ("coco.mAP", "f1.full_50")
    rows = []
    for name in CHECKPOINTS:
        guarded = required(details[name], "guarded", f"{name}/details.json")
        pairs = [(metric(metrics, name, key), guarded[key]) for key in keys]
        removed = metric(metrics, name, "coco.n_pred") - guarded["n_pred"]
        rows.append([name, str(removed), *(f"{number(raw)} to {number(kept)}" for raw, kept in pairs)])
    return table(["checkpoint", "predictions removed", "mAP", "F1 full, IoU .50"], rows)


def mapping_table(details: Mapping[str, Json]) -> str:
    """How the predicted names were found among the categories."""
    ways = ("exact", "normalised", "unmapped")
    rows = [
        [name, *(str(required(details[name], "mapping", f"{name}/details.json")[way]) for way in ways)]
        for name in CHECKPOINTS
    ]
    return table(["predicted names", *ways], rows)


def comparison_table(comparison: Mapping[str, Mapping[str, Any]]) -> str:
    """Paired differences with their verdicts; `could show` is the half-width of the interval."""
    rows = []
    for name, (new, old) in COMPARISONS.items():
        for key, row in comparison[name].items():
            difference = difference_from(row)
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


def ceiling_table(ceiling: Json) -> str:
    """Round trip through the bins by object size."""
    rows = [
        [escape(f"{kind} {row['size']}"), str(row["n"]), number(row["mean_iou"]), percent(row["share_95"])]
        for key, kind in (("by_area", ""), ("by_side_px", "side, px:"))
        for row in required(ceiling, key, "ceiling.json")
    ]
    return table(
        ["objects", "number", "mean IoU", "IoU at least .95"], [[cells[0].strip(), *cells[1:]] for cells in rows]
    )


def leaves_table(tree: Any, header: Sequence[str]) -> str:
    """Every leaf of a JSON file as a row: for small statistics that other stages own."""
    return table(header, [[f"`{key}`", escape(number(value))] for key, value in flatten(tree)])


def required(tree: Json, key: str, file: str) -> Any:
    """A key that a file must have; raises DataError naming both."""
    if key not in tree:
        raise DataError(f"{file}: key {key!r} is missing, found {', '.join(tree) or 'none'}. Run its stage again.")
    return tree[key]
