"""Tables of metrics.json; the rows are views of the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from coordexp.config.paths import CHECKPOINTS
from coordexp.errors import ConfigError, closest
from coordexp.evaluation.bootstrap import interval, resample_weights
from coordexp.evaluation.confidence import CONSTANT, PERFECT
from coordexp.evaluation.measures import MEASURES
from coordexp.evaluation.registry import PROTOCOL_KEYS, after_nms, metric_specs, view
from coordexp.reporting.inputs import Json, Metrics, ReportData, bounds_of, metric, required
from coordexp.reporting.markdown import MISSING, code, escape, flatten, number, percent, table, with_interval
from coordexp.reporting.outcomes import Outcomes

_ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}
_CONFUSED_ROWS = 8


def metrics_table(data: ReportData, name: str) -> str:
    """The metrics of a view as rows, checkpoints as columns, with the 95 % interval where there is one.

    A reason for which the parser dropped nothing has no row. Metrics that the evaluation did not measure, because the
    data set has no such categories or prompts, are listed below the table.
    """
    specs, rows = metric_specs(data.settings, vocabulary=True), []
    optional = name == "vocabulary"
    missing = [key for key in view(name, data.settings) if optional and key not in data.metrics.index]
    for key in view(name, data.settings):
        if key in missing:
            continue
        spec = specs[key]
        if key.startswith("parse.dropped_") and not data.metrics.loc[key].any() and key != "parse.dropped_total":
            continue
        unit = "" if spec.unit == "0..1" else f" ({spec.unit})"
        rows.append([f"`{key}`{_ARROWS[spec.better]}", escape(spec.meaning) + unit, *_cells(data.metrics, key)])
    text = table(["metric", "meaning", *CHECKPOINTS], rows, "ll" + "r" * len(CHECKPOINTS))
    unmeasured = ", ".join(f"`{key}`" for key in missing)
    return text + (f"\n\nNot measured on this data: {unmeasured}." if missing else "")


def measures_table(data: ReportData, outcomes: Mapping[str, Outcomes], area: str) -> str:
    """The measures of an area as rows, checkpoints as columns, with 95 % intervals over images."""
    first = outcomes[CHECKPOINTS[0]].table
    weights_BI = resample_weights(first.n_images, data.settings.bootstrap_resamples, data.run.params.seed)
    rows = []
    for key, measure in MEASURES.items():
        if not key.startswith(f"{area}."):
            continue
        cells = []
        for name in CHECKPOINTS:
            statistic = measure.statistic(outcomes[name].table)
            value = float(statistic(np.ones((1, first.n_images)))[0])
            known = None if np.isnan(value) else value
            cells.append(with_interval(known, interval(statistic(weights_BI), known, is_share=measure.unit == "0..1")))
        unit = "" if measure.unit == "0..1" else f" ({measure.unit})"
        rows.append([f"`{key}`{_ARROWS[measure.better]}", escape(measure.meaning) + unit, *cells])
    return table(["measure", "meaning", *CHECKPOINTS], rows, "ll" + "r" * len(CHECKPOINTS))


def goals_table(data: ReportData) -> str:
    """Each goal of the profile next to the values of the trained checkpoints; empty if there are none.

    Raises:
        ConfigError: a goal names a metric that this evaluation does not have.
    """
    names = [name for name in CHECKPOINTS if name != "base"]
    known, rows = metric_specs(data.settings, vocabulary=True), []
    for goal in data.run.profile.report.goals:
        key, _, least = goal.partition(" >= ")
        if key in known and key not in data.metrics.index:
            rows.append([f"`{key}`", least, *["? not measured"] * len(names), MISSING])
            continue
        if key not in data.metrics.index:
            raise ConfigError(
                f"report.goals: {goal!r}: this run has no metric {key}.{closest(key, data.metrics.index)}"
            )
        reached = [(bounds_of(data.metrics, n, key) or [metric(data.metrics, n, key)])[0] for n in names]
        signs = ["?" if low is None else "✔" if low >= float(least) else "✘" for low in reached]
        cells = [f"{sign} {_cell(data.metrics, n, key)}" for sign, n in zip(signs, names, strict=True)]
        blind = key.replace(".", "_blind.", 1)
        by_chance = number(metric(data.metrics, "stage2", blind)) if blind in data.metrics.index else MISSING
        rows.append([f"`{key}`", least, *cells, by_chance])
    header = ["goal", "at least", *names, "stage2, blind"]
    return table(header, rows, "l" + "r" * (len(header) - 1)) if rows else ""


def tier_table(data: ReportData) -> str:
    """Outcomes of the objects of each tier by kind of prompt; empty without probes."""
    if "by_tier" not in data.details[CHECKPOINTS[-1]]:
        return ""
    keys = ("located", "first_word", "last_word", "exact")
    rows = [
        [first["asked"], first["tier"], str(first["n_gt"])]
        + [" / ".join(number(row[key]) for key in keys) for row in (first, *others)]
        for first, *others in zip(*_detail(data.details, "by_tier"), strict=True)
    ]
    return table(["prompt", "categories", "objects", *CHECKPOINTS], rows, "llr" + "r" * len(CHECKPOINTS))


def _cells(metrics: Metrics, key: str) -> list[str]:
    return [_cell(metrics, checkpoint, key) for checkpoint in CHECKPOINTS]


def _cell(metrics: Metrics, checkpoint: str, key: str) -> str:
    return with_interval(metric(metrics, checkpoint, key), bounds_of(metrics, checkpoint, key))


def protocol_table(data: ReportData) -> str:
    """Full vocabulary, oracle classes and their gap for each checkpoint, one row per metric and checkpoint."""
    names = {full: key for key, (full, _) in PROTOCOL_KEYS.items()}
    specs, rows = metric_specs(data.settings), []
    for checkpoint in CHECKPOINTS:
        for full in view("protocols", data.settings):
            keys = (full, f"protocol.positive_{names[full]}", f"protocol.gap_{names[full]}")
            rows.append([checkpoint, specs[full].name, *(_cell(data.metrics, checkpoint, key) for key in keys)])
    return table(["checkpoint", "metric", "full-vocabulary", "oracle-class", "gap"], rows, "llrrr")


def nms_table(data: ReportData) -> str:
    """Before and after NMS: if little changes, the metrics hide no duplicates."""
    rows = [["predictions removed", *_cells(data.metrics, "guarded.n_removed")]]
    for key in view("after NMS", data.settings):
        sides = [[number(metric(data.metrics, name, k)) for k in (key, after_nms(key))] for name in CHECKPOINTS]
        rows.append([f"`{key}`", *(" to ".join(side) for side in sides)])
    return table(["before to after NMS", *CHECKPOINTS], rows)


def mapping_table(data: ReportData) -> str:
    """How predicted names were mapped to categories."""
    keys = view("mapping", data.settings)
    rows = [[name, *(number(metric(data.metrics, name, key)) for key in keys)] for name in CHECKPOINTS]
    return table(["predicted names", *(key.removeprefix("input.names_") for key in keys)], rows)


def omission_table(details: Mapping[str, Json]) -> str:
    """Missed objects by the number of objects in the image."""
    by_count = _detail(details, "by_gt_count")
    rows = [
        [
            *(first["n_gt"], str(first["n_images"])),
            *(f"{number(row['omission_rate'])} ({row['count_error_mean']:+.2f})" for row in (first, *others)),
        ]
        for first, *others in zip(*by_count, strict=True)
    ]
    return table(["objects in the image", "images", *CHECKPOINTS], rows)


def size_table(details: Mapping[str, Json], key: str, label: str) -> str:
    """Recall of boxes at IoU .50 / .75 / .95 by object size (`key` of details.json, `label` its column)."""
    rows = [
        [
            *(escape(first[label]), str(first["n_gt"])),
            *(" / ".join(f"{row[f'recall_{iou}']:.2f}" for iou in (50, 75, 95)) for row in (first, *others)),
        ]
        for first, *others in zip(*_detail(details, key), strict=True)
    ]
    return table(["size", "objects", *CHECKPOINTS], rows)


def _detail(details: Mapping[str, Json], key: str) -> list[list[Json]]:
    return [required(details[name], key, f"{name}/details.json") for name in CHECKPOINTS]


def worst_duplicates_table(details: Json) -> str:
    """The images with the most duplicate pairs of one checkpoint; empty if there are none."""
    worst = required(details, "worst_duplicates", "details.json")
    rows = [[str(row[key]) for key in ("image_id", "pairs", "n_pred", "n_gt")] for row in worst]
    return table(["image id", "duplicate pairs", "predictions", "objects"], rows) if rows else ""


def scores_table(details: Mapping[str, Json]) -> str:
    """The mAP that each score would reach, and how well it separates true from false positives (AUROC)."""
    by_name = [{row["score"]: row for row in rows} for rows in _detail(details, "scores")]
    scores = dict.fromkeys(score for rows in by_name for score in rows)
    ordered = sorted(scores, key=lambda score: score in (CONSTANT, PERFECT))  # bounds last
    rows = [[escape(score), *(_score_cell(rows.get(score)) for rows in by_name)] for score in ordered]
    return table(["score", *CHECKPOINTS], rows)


def _score_cell(row: Json | None) -> str:
    if row is None:
        return MISSING
    auroc = "" if row["auroc_tp_fp"] is None else f" ({row['auroc_tp_fp']:.3f})"
    return f"{number(row['mAP'])}{auroc}"


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


def confusion_table(outcomes: Outcomes) -> str:
    """The most frequent classification errors; empty if there are none."""
    confusions = sorted(outcomes.confusions().items(), key=lambda item: (-item[1], item[0]))[:_CONFUSED_ROWS]
    rows = [[escape(truth), escape(predicted), str(n)] for (truth, predicted), n in confusions]
    return table(["annotated", "predicted", "objects"], rows, "llr")


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
    """Every leaf of a JSON file as a row, for small statistics of other stages."""
    return table(header, [[code(key), escape(number(value))] for key, value in flatten(tree)])


# Published column -> our metric, by the protocol under which the two may share a table.
_OURS = {
    "oracle-class": {f"f1_{level}": f"protocol.positive_full_{level}" for level in ("50", "95", "mean")},
    "full-vocabulary": {name: f"coco.{name}" for name in ("mAP", "AP50", "AP75")},
    "training matching": {
        **{"mAP": "coco.mAP", "n_pred": "coco.n_pred"},
        **{name: f"rollout.{name}" for name in ("f1", "precision", "recall")},
    },
}


def published_tables() -> dict[str, Json]:
    """The tables of published.json by name.

    Each has `title`, `source`, `rows`, and either one `protocol` for all rows or `protocols` that the rows refer to by
    name. AP and F1 are in 0..1. `mark` is the source of the number: paper, source read, or reported and not
    reproduced.
    """
    return json.loads(files(__package__).joinpath("published.json").read_text(encoding="utf-8"))


def published_markdown(metrics: Metrics) -> str:
    """Every published table with its protocols in words, and stage 2 as its last rows, one per protocol."""
    return "\n\n".join(_published(metrics, published) for published in published_tables().values())


def _published(metrics: Metrics, published: Json) -> str:
    columns = list(dict.fromkeys(key for row in published["rows"] for key in row))
    protocols = published.get("protocols") or {"training matching": "; ".join(map(str, published["protocol"].values()))}
    rows = [[escape(number(row[key])) if key in row else "" for key in columns] for row in published["rows"]]
    for name in protocols:
        ours = {columns[0]: "**this run, stage2**", "protocol": name, "mark": "measured"}
        ours |= {column: number(metric(metrics, "stage2", key)) for column, key in _OURS[name].items()}
        rows.append([ours.get(key, "") for key in columns])
    title = f"**{escape(published['title'])}** ({escape(published['source'])})"
    notes = "\n".join(f"- {name}: {escape(words)}" for name, words in protocols.items())
    return f"{title}\n\n{table(columns, rows)}\n\n{notes}"
