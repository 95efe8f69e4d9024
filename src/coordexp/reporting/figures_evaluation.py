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
from coordexp.reporting.inputs import Json, Metrics, ReportData, metric
from coordexp.reporting.outcomes import Outcomes
from coordexp.reporting.style import GREEN, INK, LOOKS, RED, figure_style, new_figure, save_figure

SIDE_EDGES_PX = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)


def write_evaluation_figures(data: ReportData, outcomes: Mapping[str, Outcomes], folder: Path) -> None:
    """Write precision_recall, scores, recall and confidence as PNG."""
    with figure_style():
        save_figure(_pr_curves(data.pr_curves), folder / "precision_recall.png")
        save_figure(_scores(outcomes), folder / "scores.png")
        save_figure(_recall(outcomes), folder / "recall.png")
        save_figure(_confidence(data.details, data.metrics), folder / "confidence.png")


def _pr_curves(curves: Mapping[str, Json]) -> Figure:
    """Precision over recall of every checkpoint at IoU .50 and .75."""
    figure = new_figure(9.2, 3.2)
    for ax, at in zip(figure.subplots(1, 2, sharey=True), ("50", "75"), strict=True):
        for name, curve in curves.items():
            precision, look = curve[f"precision_{at}"], LOOKS[name]
            if precision:
                ax.plot(curve["recall"], precision, color=look.colour, linestyle=look.line, label=name)
        ax.set(xlim=(0, 1), ylim=(0, 1.02), title=f"IoU .{at}", xlabel="recall")
    figure.axes[0].set_ylabel("precision, mean over names")
    _legend(figure.axes[1])
    return figure


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[1]:
        ax.legend()


def _scores(outcomes: Mapping[str, Outcomes]) -> Figure:
    """Above: scores of right and false boxes. Below: the share that is right, in bins of equal mass."""
    figure = new_figure(10.4, 4.6)
    axes = figure.subplots(2, len(outcomes), sharex="col", squeeze=False, height_ratios=(3, 2))
    for (above, below), (name, outcome) in zip(axes.T, outcomes.items(), strict=True):
        score, right = outcome.table.pred_score_P, outcome.cause_P == Cause.RIGHT
        above.set_title(name)
        if len(score):
            _score_histogram(above, score, right)
            _reliability(below, score, right)
        below.set(ylim=(0, 1.02), xlabel="score")
    axes[0, 0].set_ylabel("predictions")
    axes[1, 0].set_ylabel("share that is right")
    _legend(axes[0, 0])
    return figure


def _score_histogram(ax: Axes, score_P: Floats, right_P: Bools) -> None:
    edges = np.histogram_bin_edges(score_P, bins=20)
    for keep, colour, hatch, label in ((right_P, GREEN, "", "right"), (~right_P, RED, "////", "false")):
        ax.hist(score_P[keep], edges.tolist(), histtype="stepfilled", facecolor=to_rgba(colour, 0.2), edgecolor=colour,
                linewidth=1.4, hatch=hatch, label=label)  # fmt: skip


def _reliability(ax: Axes, score_P: Floats, right_P: Bools) -> None:
    # Any score is ranked into (0, 1] for binning; only a score in [0, 1] can be compared with the diagonal.
    order = np.argsort(np.argsort(score_P, kind="stable"), kind="stable")
    bins = np.minimum(10 * order // len(score_P), 9)
    for b in np.unique(bins):
        inside = bins == b
        low, high = wilson(int(right_P[inside].sum()), int(inside.sum()))
        ax.plot([score_P[inside].mean()] * 2, [low, high], color=INK, linewidth=1)
        ax.plot(score_P[inside].mean(), right_P[inside].mean(), marker="o", markersize=4, color=INK)
    if score_P.min() >= 0 and score_P.max() <= 1:
        ax.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        ax.set_xlim(0, 1)


def _recall(outcomes: Mapping[str, Outcomes]) -> Figure:
    """Recall with the right name at IoU 0.5, by the size of the object and by how many share the image."""
    figure = new_figure(10.4, 3.8)
    by_size, by_count = figure.subplots(1, 2, sharey=True, width_ratios=(5, 4))
    first = next(iter(outcomes.values()))
    counted_G = ~first.table.gt_crowd_G
    size_G = np.searchsorted(SIDE_EDGES_PX, side_px(first.table.gt_boxes_G4), side="right")
    between = [f"{low}-{high}" for low, high in pairwise(SIDE_EDGES_PX)]
    _recall_panel(by_size, outcomes, size_G, [f"<{SIDE_EDGES_PX[0]}", *between, f"{SIDE_EDGES_PX[-1]}+"], counted_G)
    lows = [low for low, _ in GT_COUNT_BUCKETS]
    count_G = np.searchsorted(lows, first.table.n_gt_I[first.table.gt_image_G], side="right") - 1
    _recall_panel(by_count, outcomes, count_G, [_count_label(*bucket) for bucket in GT_COUNT_BUCKETS], counted_G)
    by_size.set(ylim=(0, 1.02), ylabel="recall, right name, IoU .50", xlabel="size of the object: √(w·h) in pixels")
    by_count.set_xlabel("objects in the image")
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
        share = np.array(found) / np.array(numbers)
        low, high = np.array([wilson(k, n) for k, n in zip(found, numbers, strict=True)]).T
        ax.errorbar(x, share, yerr=[share - low, high - share], color=look.colour, linestyle=look.line,
                    marker=look.marker, markersize=4, linewidth=1.2, elinewidth=0.8, label=name)  # fmt: skip
    ax.set_xticks(range(len(present)), [f"{labels[b]}\n({n})" for b, n in zip(present, numbers, strict=True)])
    ax.grid(visible=False, axis="x")


def _confidence(details: Mapping[str, Json], metrics: Metrics) -> Figure:
    """Is the score a probability, and what would another score be worth: reliability beside the mAP of each ranking."""
    figure = new_figure(10.4, 4.2)
    calibration, rankings = figure.subplots(1, 2, width_ratios=(4, 5))
    _calibration(calibration, details, metrics)
    _rankings(rankings, details)
    figure.legend(*calibration.get_legend_handles_labels(), loc="outside lower center", ncols=len(LOOKS) + 1)
    return figure


def _calibration(ax: Axes, details: Mapping[str, Json], metrics: Metrics) -> None:
    """Precision over mean confidence in bins of equal mass; the area of a marker is its fraction of the predictions."""
    ax.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="calibrated")
    for name, tables in details.items():
        bins, look, ece = tables["reliability"], LOOKS[name], metric(metrics, name, "confidence.ece")
        if not bins:  # no prediction, or a score that is no probability
            continue
        x, y, n = (np.array([row[key] for row in bins]) for key in ("confidence", "precision", "n"))
        label = f"{name}: ECE {ece:.3f}"
        ax.plot(x, y, color=look.colour, linestyle=look.line, marker=look.marker, markersize=3, label=label)
        ax.scatter(x, y, s=300 * n / n.sum(), color=look.colour, marker=look.marker, alpha=0.7, linewidth=0)
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="mean score of the bin", ylabel="share that is right, IoU .50")
    ax.set_title("Reliability of the score in use")


def _rankings(ax: Axes, details: Mapping[str, Json]) -> None:
    scores = list(dict.fromkeys(row["score"] for tables in details.values() for row in tables["scores"]))
    scores.sort(key=lambda score: {CONSTANT: 0, PERFECT: 2}.get(score, 1))
    for shift, (name, tables) in enumerate(details.items()):
        known = {row["score"]: row["mAP"] for row in tables["scores"] if row["mAP"] is not None}
        places = [(known[score], scores.index(score)) for score in scores if score in known]
        x, y = np.array(places).reshape(-1, 2).T
        look = LOOKS[name]
        offset = 0.14 * (shift - (len(details) - 1) / 2)
        ax.plot(x, y - offset, color=look.colour, marker=look.marker, linestyle="", markersize=5)
    ax.set_yticks(range(len(scores)), scores)
    ax.set(xlabel="mAP under this ranking", ylim=(-0.6, len(scores) - 0.4), xlim=(0, None))
    ax.set_title("The same boxes, ranked by")
