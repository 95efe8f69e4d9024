"""The eval tables: finished checkpoints on val, and the eval callback during training, with its figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coordexp.config.paths import CHECKPOINTS
from coordexp.config.schema import EvalParams
from coordexp.evaluation.protocol import iou_key
from coordexp.matching.summary import MatchCounts
from coordexp.reporting.answers import FIRST, OWN, reading_mean
from coordexp.reporting.inputs import TRAINED, Json, Metrics, ReportData, metric
from coordexp.reporting.markdown import number, table
from coordexp.reporting.style import FAINT, LOOKS, WIDTH_IN, figure_style, new_figure, save_figure

DevRows = Mapping[str, Sequence[Json] | None]  # by training stage; None if the run left no monitor.jsonl
_COUNTS = ("predictions", "right", "false", "missed")
_HEADS = ("predictions", "true positives", "false positives", "false negatives")
_ASIDE = 0.015  # of the axis: the control is to the right of stage 2, not under it
Point = tuple[int, float, float, float]  # step, value, and its interval


def checkpoint_counts_table(metrics: Metrics, params: EvalParams) -> str:
    """Scores and the counts behind them, one row per checkpoint."""
    pairs = f"set.dup_pairs_{iou_key(min(params.duplicate_ious))}"
    keys: tuple[str, ...] = ("coco.mAP", "f1.full_50", "f1.precision_50", "f1.recall_50")
    keys += ("coco.n_pred", "f1.tp_50", "f1.fp_50", "f1.fn_50", pairs, "parse.parse_rate", "parse.truncated_rate")
    header = ["checkpoint", "mAP", "F1", "precision", "recall", *_HEADS, "duplicate pairs per image", "parse rate"]
    header += ["truncated, fraction"]
    return table(header, [[name, *(number(metric(metrics, name, key)) for key in keys)] for name in CHECKPOINTS])


def monitor_table(dev_rows: DevRows) -> str:
    """One row per evaluation, in the order of training; empty if there was none."""
    keys = ("f1", "precision", "recall", *_COUNTS, "dup_pairs_90", "parse_rate", "truncated")
    rows = [
        [name, str(row["step"]), *(number(row[key]) for key in keys)]
        for name in TRAINED
        for row in dev_rows[name] or ()
    ]
    header = ["stage", "step", "F1", "precision", "recall", *_HEADS, "duplicate pairs", "parse rate", "truncated"]
    return table(header, rows) if rows else ""


def monitor_sentence(dev_rows: DevRows) -> str:
    """What was evaluated, and how precise one evaluation is; or why there is none."""
    rows = [row for name in TRAINED for row in dev_rows[name] or ()]
    if not rows:
        if any(dev_rows[name] is None for name in TRAINED):
            return "No evaluation during training: these runs wrote no `monitor.jsonl`; `dvc repro` writes one."
        return "No evaluation during training: `monitor.every_steps` of the profile is 0."
    n_objects = max(row["objects"] for row in rows)
    half_width = 1.96 * math.sqrt(0.25 / max(1, n_objects))
    return (
        f"During training: the same {rows[0]['images']} dev images with {n_objects} objects each time, greedy, "
        "paired as in training at IoU .50. With this number of objects, a recall near one half is known to within "
        f"±{half_width:.2f} (95 %): read the direction and the counts, not the digits. "
        "mAP over so few images is not informative and is left out."
    )


def write_monitor_figure(data: ReportData, path: Path) -> None:
    """F1 and errors of coordinates by step with their intervals; nothing is written if no step was evaluated."""
    if any(data.dev_rows.values()):
        with figure_style():
            save_figure(_monitor_figure(data), path)


def _monitor_figure(data: ReportData) -> Figure:
    """All on the same dev images; stage 2 and the control start from the last step of stage 1."""
    panels: dict[str, Callable[[str], list[Point]]] = {
        "F1": lambda stage: _f1_points(data.dev_rows[stage] or ()),
        "error in the annotated context (A1), bins": lambda stage: _error_points(data, stage, FIRST),
        "error in own answers, bins": lambda stage: _error_points(data, stage, OWN),
    }
    points = {title: {stage: points_of(stage) for stage in TRAINED} for title, points_of in panels.items()}
    points = {title: found for title, found in points.items() if any(found.values())} or {"nothing to evaluate": {}}
    figure = new_figure(WIDTH_IN, 2.2 * len(points) + 0.7)
    lengths = {name: len(log) for name, log in data.logs.items()}
    seam = lengths["stage1"]
    end = seam + max(length for name, length in lengths.items() if name != "stage1")
    axes = figure.subplots(len(points), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (title, by_stage) in zip(axes, points.items(), strict=True):
        for stage, found in by_stage.items():
            start = 0 if stage == "stage1" else seam
            _draw(ax, found, start + (_ASIDE * end if stage == "stage1-control" else 0.0), stage)
        ax.axvline(seam, color=FAINT, linewidth=0.8, linestyle="--")
        ax.set(title=title, xlim=(0, 1.03 * end))
        ax.set_ylim(0, 1 if title.startswith("F1") else None)
    axes[-1].set_xlabel("optimizer step; the dashed line is the end of stage 1")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _f1_points(rows: Sequence[Json]) -> list[Point]:
    bounds = [MatchCounts(row["predictions"], row["objects"], row["right"]).intervals["f1"] for row in rows]
    return [(row["step"], row["f1"], *bound) for row, bound in zip(rows, bounds, strict=True) if bound]


def _error_points(data: ReportData, stage: str, context: str) -> list[Point]:
    points: list[Point] = []
    for step, rows in groupby(data.contexts[stage] or (), lambda row: row["step"]):
        mean, bounds = reading_mean(data, list(rows), context)
        if mean is not None and bounds is not None:
            points.append((step, mean, bounds[0], bounds[1]))
    return points


def _draw(ax: Axes, points: Sequence[Point], start: float, stage: str) -> None:
    if points:
        look = LOOKS[stage]
        steps, values, low, high = np.array(points, dtype=float).T
        ax.errorbar(steps + start, values, yerr=np.maximum(0, [values - low, high - values]), color=look.colour,
                    linestyle=look.line, marker=look.marker, markersize=4, elinewidth=1, label=stage)  # fmt: skip
