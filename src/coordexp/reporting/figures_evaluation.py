"""Figures of the evaluation: precision and recall, scores, and what is missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from coordexp.evaluation.confidence import CONSTANT, PERFECT
from coordexp.evaluation.details import side_px
from coordexp.evaluation.error_causes import Cause
from coordexp.evaluation.set_behaviour import GT_COUNT_BUCKETS
from coordexp.evaluation.table import Bools, Floats, Ints
from coordexp.matching.summary import wilson
from coordexp.reporting.inputs import Json, Metrics, ReportData, bounds_of, metric
from coordexp.reporting.markdown import MISSING, decimals
from coordexp.reporting.outcomes import Outcomes
from coordexp.reporting.style import (
    FAINT,
    GREEN,
    INK,
    LOOKS,
    RED,
    WIDTH_IN,
    LineLook,
    figure_style,
    new_figure,
    save_figure,
)

ERROR_TYPES = ("classification", "localization", "both", "duplicate", "background", "missed")  # of TIDE (2008.08115)
RANKINGS = "rankings"
SIDE_EDGES_PX = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)


def write_evaluation_figures(data: ReportData, outcomes: Mapping[str, Outcomes], folder: Path) -> None:
    """Write precision_recall, error_budget, scores, recall and confidence as PNG."""
    with figure_style():
        save_figure(_pr_curves(data.pr_curves), folder / "precision_recall.png")
        save_figure(_error_budget(data.metrics), folder / "error_budget.png")
        save_figure(_scores(outcomes), folder / "scores.png")
        save_figure(_recall(outcomes), folder / "recall.png")
        save_figure(_confidence(outcomes, data.details, data.metrics), folder / "confidence.png")


def _pr_curves(curves: Mapping[str, Json]) -> Figure:
    """Precision over recall of every checkpoint at IoU .50 and .75."""
    figure = new_figure(WIDTH_IN, 3.2)
    for ax, at in zip(figure.subplots(1, 2, sharey=True), ("50", "75"), strict=True):
        for name, curve in curves.items():
            precision, look = curve[f"precision_{at}"], LOOKS[name]
            if precision:
                ax.plot(curve["recall"], precision, color=look.colour, linestyle=look.line, label=name)
        ax.set(xlim=(0, 1), ylim=(0, 1.02), title=f"IoU .{at}", xlabel="recall")
    figure.axes[0].set_ylabel("precision, mean over categories")
    _legend(figure.axes[1])
    return figure


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[1]:
        ax.legend()


def _error_budget(metrics: Metrics) -> Figure:
    """AP50 that an oracle would gain by correcting one error type alone, per checkpoint, the costliest type first."""
    last = list(metrics.columns)[-1]
    types = sorted(ERROR_TYPES, key=lambda name: -(metric(metrics, last, f"errors.{name}_cost") or 0.0))
    figure = new_figure(WIDTH_IN, 3.8)
    ax = figure.subplots()
    height = 0.8 / len(metrics.columns)
    for shift, checkpoint in enumerate(metrics.columns):
        costs = [metric(metrics, checkpoint, f"errors.{name}_cost") for name in types]
        y = np.arange(len(types)) + (shift - (len(metrics.columns) - 1) / 2) * height
        known = np.array([0.0 if cost is None else cost for cost in costs])
        ax.barh(y, known, 0.9 * height, color=LOOKS[checkpoint].colour, label=checkpoint)
        bounds = bounds_of(metrics, checkpoint, "coco.AP50")
        digits = decimals(bounds) if bounds else 2
        for at, cost in zip(y.tolist(), costs, strict=True):
            ax.annotate(MISSING if cost is None else f"{cost:.{digits}f}", (cost or 0.0, at), (3, 0), va="center",
                        textcoords="offset points", fontsize=7)  # fmt: skip
    ax.set_yticks(range(len(types)), types)
    ax.set(ylim=(len(types) - 0.5, -0.5), xlabel="AP50 gained if this error type alone were corrected")
    ax.margins(x=0.1)
    ax.grid(visible=False, axis="y")
    ax.legend(loc="lower right")
    return figure


def _scores(outcomes: Mapping[str, Outcomes]) -> Figure:
    """Scores of correct and incorrect predictions, a panel per checkpoint."""
    figure = new_figure(WIDTH_IN, 4.2)
    grid = figure.subplots(2, 2, squeeze=False, sharex=True)
    axes = list(grid.flat)
    for ax, (name, outcome) in zip(axes, outcomes.items(), strict=False):
        score, right = outcome.table.pred_score_P, outcome.cause_P == Cause.RIGHT
        ax.set_title(name)
        if len(score):
            _score_histogram(ax, score, right)
    for ax in axes[len(outcomes) :]:
        ax.set_axis_off()
    for left, below in zip(grid[:, 0], grid[-1], strict=True):
        left.set_ylabel("predictions")
        below.set_xlabel("score")
    _legend(axes[0])
    return figure


def _score_histogram(ax: Axes, score_P: Floats, right_P: Bools) -> None:
    edges = np.histogram_bin_edges(score_P, bins=20)
    for keep, colour, hatch, label in ((right_P, GREEN, "", "correct"), (~right_P, RED, "////", "incorrect")):
        ax.hist(score_P[keep], edges.tolist(), histtype="stepfilled", facecolor=to_rgba(colour, 0.2), edgecolor=colour,
                linewidth=1.4, hatch=hatch, label=label)  # fmt: skip


def _reliability(ax: Axes, score_P: Floats, right_P: Bools, look: LineLook) -> None:
    """Fraction correct in ten bins of equal mass with Wilson intervals."""
    # Any score is ranked into (0, 1] for binning; only a score in [0, 1] can be compared with the diagonal.
    order = np.argsort(np.argsort(score_P, kind="stable"), kind="stable")
    bins = np.minimum(10 * order // len(score_P), 9)
    for b in np.unique(bins):
        inside = bins == b
        low, high = wilson(int(right_P[inside].sum()), int(inside.sum()))
        ax.plot([score_P[inside].mean()] * 2, [low, high], color=look.colour, linewidth=1)
        ax.plot(score_P[inside].mean(), right_P[inside].mean(), marker=look.marker, markersize=4, color=look.colour)
    if score_P.min() >= 0 and score_P.max() <= 1:
        ax.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        ax.set_xlim(0, 1)


def _recall(outcomes: Mapping[str, Outcomes]) -> Figure:
    """Recall with the correct name at IoU 0.5, by the size of the object and by the number of objects in its image."""
    figure = new_figure(WIDTH_IN, 5.4)
    by_size, by_count = figure.subplots(2, 1, sharey=True)
    first = next(iter(outcomes.values()))
    counted_G = ~first.table.gt_crowd_G
    size_G = np.searchsorted(SIDE_EDGES_PX, side_px(first.table.gt_boxes_G4), side="right")
    between = [f"{low}-{high}" for low, high in pairwise(SIDE_EDGES_PX)]
    _recall_panel(by_size, outcomes, size_G, [f"<{SIDE_EDGES_PX[0]}", *between, f"{SIDE_EDGES_PX[-1]}+"], counted_G)
    lows = [low for low, _ in GT_COUNT_BUCKETS]
    count_G = np.searchsorted(lows, first.table.n_gt_I[first.table.gt_image_G], side="right") - 1
    _recall_panel(by_count, outcomes, count_G, [_count_label(*bucket) for bucket in GT_COUNT_BUCKETS], counted_G)
    by_size.set(ylim=(0, 1.02), xlabel="object size √(w·h), pixels (number of objects)")
    by_count.set_xlabel("objects in the image (number of objects)")
    figure.supylabel("recall with the correct name, IoU .50", fontsize=9)
    if by_count.get_legend_handles_labels()[1]:
        by_count.legend(loc="lower left")
    return figure


def _count_label(low: int, high: int | None) -> str:
    return f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"


def _recall_panel(
    ax: Axes, outcomes: Mapping[str, Outcomes], bucket_G: Ints, labels: Sequence[str], counted_G: Bools
) -> None:
    present = np.unique(bucket_G[counted_G])
    if not len(present):
        ax.text(0.5, 0.5, "no object is annotated", ha="center", transform=ax.transAxes)
        return
    numbers = [int((counted_G & (bucket_G == b)).sum()) for b in present]
    for shift, (name, outcome) in enumerate(outcomes.items()):
        look = LOOKS[name]
        x = np.arange(len(present)) + 0.11 * (shift - (len(outcomes) - 1) / 2)
        found = [int((outcome.found_G & counted_G & (bucket_G == b)).sum()) for b in present]
        recall = np.array(found) / np.array(numbers)
        low, high = np.array([wilson(k, n) for k, n in zip(found, numbers, strict=True)]).T
        ax.errorbar(x, recall, yerr=[recall - low, high - recall], color=look.colour, linestyle=look.line,
                    marker=look.marker, markersize=4, linewidth=1.2, elinewidth=0.8, label=name)  # fmt: skip
    ax.set_xticks(range(len(present)), [f"{labels[b]}\n({n})" for b, n in zip(present, numbers, strict=True)])
    ax.grid(visible=False, axis="x")


def _confidence(outcomes: Mapping[str, Outcomes], details: Mapping[str, Json], metrics: Metrics) -> Figure:
    """Whether the score is a probability, and what other scores would be worth: reliability above, rankings below."""
    figure = new_figure(WIDTH_IN, 5.6)
    axes = figure.subplot_mosaic([list(outcomes), [RANKINGS] * len(outcomes)], height_ratios=(2, 4))
    for place, (name, outcome) in enumerate(outcomes.items()):
        ax, ece, score = axes[name], metric(metrics, name, "confidence.ece"), outcome.table.pred_score_P
        if len(score):
            _reliability(ax, score, outcome.cause_P == Cause.RIGHT, LOOKS[name])
        ax.set(title=name if ece is None else f"{name}\nECE {ece:.2f}", ylim=(0, 1.02), xlabel="mean score of the bin")
        ax.set_ylabel("fraction correct" if place == 0 else "")
        ax.tick_params(labelleft=place == 0)
        ax.xaxis.label.set_fontsize(8)
    _rankings(axes[RANKINGS], details)
    handles, labels = axes[RANKINGS].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _rankings(ax: Axes, details: Mapping[str, Json]) -> None:
    scores = list(dict.fromkeys(row["score"] for tables in details.values() for row in tables["scores"]))
    scores.sort(key=lambda score: {CONSTANT: 0, PERFECT: 2}.get(score, 1))
    for shift, (name, tables) in enumerate(details.items()):
        known = {row["score"]: row["mAP"] for row in tables["scores"] if row["mAP"] is not None}
        places = [(known[score], scores.index(score)) for score in scores if score in known]
        x, y = np.array(places).reshape(-1, 2).T
        look = LOOKS[name]
        offset = 0.2 * (shift - (len(details) - 1) / 2)  # a lane of its own: markers never overlap
        ax.plot(x, y - offset, color=look.colour, marker=look.marker, linestyle="", markersize=4.5, label=name)
    for between in range(1, len(scores)):
        ax.axhline(between - 0.5, color=FAINT, linewidth=0.5)
    ax.grid(visible=False, axis="y")
    ax.set_yticks(range(len(scores)), scores)
    ax.set(xlabel="mAP of the same boxes under this score", ylim=(-0.5, len(scores) - 0.5))
    ax.margins(x=0.04)
