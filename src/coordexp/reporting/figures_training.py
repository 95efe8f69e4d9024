"""Figures of the training logs: every loss against its floor, and the error of coordinates in bins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from coordexp.evaluation.table import Floats
from coordexp.reporting.style import CHANNEL_LOOKS, INK, LOOKS, LineLook, figure_style, new_figure, save_figure
from coordexp.reporting.training_log import TrainingLog, smoothed
from coordexp.reporting.training_tables import loss_floor

_PANELS_PER_ROW = 3
_SMOOTHING_SHARE = 0.05  # of the rows
_LOG_FROM_RATIO = 100.0  # a curve that spans more than this is drawn on a logarithmic axis
_TITLES = {
    "total": "total",
    "text_ce": "text CE",
    "softce": "softCE",
    "w1": "W1",
    "gate": "gate",
    "coord_ce": "hard coordinate CE",
    "text_gate": "text gate",
    "entropy": "entropy",
    "bbox_smoothl1": "box SmoothL1",
    "bbox_ciou": "box CIoU",
}


def write_training_figures(logs: Mapping[str, TrainingLog], params: Mapping[str, Any], folder: Path) -> None:
    """Write stage1_losses.png, stage2_losses.png and bin_mae.png."""
    with figure_style():
        stage1 = {"stage1": (logs["stage1"], LOOKS["stage1"])}
        save_figure(_loss_panels(stage1, loss_floor("softce", params, "stage1") or 0.0), folder / "stage1_losses.png")
        save_figure(
            _loss_panels(_stage2_curves(logs), loss_floor("softce", params, "stage2") or 0.0),
            folder / "stage2_losses.png",
        )
        save_figure(_bin_mae(logs), folder / "bin_mae.png")


Curves = Mapping[str, tuple[TrainingLog, LineLook]]


def _stage2_curves(logs: Mapping[str, TrainingLog]) -> Curves:
    """The control beside stage 2, the latter by channel: their losses mean different things."""
    log = logs["stage2"]
    channels = {f"stage2, channel {name}": (log.of_channel(name), CHANNEL_LOOKS[name]) for name in log.channels}
    stage2 = channels or {"stage2": (log, LOOKS["stage2"])}
    return {"stage1-control": (logs["stage1-control"], LOOKS["stage1-control"]), **stage2}


def _loss_panels(curves: Curves, floor: float) -> Figure:
    """One panel per weighted term, since terms differ by orders of magnitude."""
    present = {name for log, _ in curves.values() for name in log.names("loss/")}
    ordered = max((log for log, _ in curves.values()), key=lambda log: len(log.names("loss/"))).names("loss/")
    names = ordered + sorted(present - set(ordered))
    n_rows = -(-len(names) // _PANELS_PER_ROW)
    figure = new_figure(9.6, 2.3 * n_rows + 0.4)
    axes = list(figure.subplots(n_rows, _PANELS_PER_ROW, squeeze=False).flat)
    for ax, name in zip(axes, names, strict=False):
        _loss_panel(ax, curves, name, floor)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    _shared_legend(figure, curves)
    return figure


def _loss_panel(ax: Axes, curves: Curves, column: str, floor: float) -> None:
    term = column.removeprefix("loss/")
    for label, (log, look) in curves.items():
        _curve(ax, log, column, label, look)
    ax.set_title(_TITLES.get(term, term))
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("weighted loss" if term.startswith(("bbox", "w1", "total")) else "weighted loss (nats)")
    if term == "softce":
        top = ax.get_ylim()[1]
        ax.set_ylim(floor - 0.15 * (top - floor), top)  # the part above the floor is what training can change
        ax.axhline(floor, color=INK, linewidth=1, linestyle="--")
        ax.annotate(f"floor {floor:.3f}: entropy of the target", (0.98, floor), (0, -3), ha="right", va="top",
                    xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8)  # fmt: skip
    elif _spans_decades(curves, column):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    else:
        ax.set_ylim(bottom=0)


def _spans_decades(curves: Curves, column: str) -> bool:
    values = np.concatenate([_smooth(log.series(column)[1]) for log, _ in curves.values()])
    return bool(values.min() > 0 and values.max() > _LOG_FROM_RATIO * values.min())


def _smooth(values: Floats) -> Floats:
    return smoothed(values, max(3, round(_SMOOTHING_SHARE * len(values))))


def _curve(ax: Axes, log: TrainingLog, column: str, label: str, look: LineLook) -> None:
    """Raw values faintly, their moving mean on top."""
    steps, values = log.series(column)
    if not len(steps):
        return
    ax.plot(steps, values, color=look.colour, alpha=0.25, linewidth=0.8)
    ax.plot(steps, _smooth(values), color=look.colour, linestyle=look.line, label=label)


def _shared_legend(figure: Figure, curves: Curves) -> None:
    if len(curves) > 1:
        ax = next(a for a in figure.axes if a.get_legend_handles_labels()[1])
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


def _bin_mae(logs: Mapping[str, TrainingLog]) -> Figure:
    """Mean |E[k] - y| in bins under teacher forcing, logarithmic: the last bins are the hard ones."""
    figure = new_figure(9.6, 3.2)
    left, right = figure.subplots(1, 2)
    _curve(left, logs["stage1"], "coord_diag/expected_bin_mae", "stage1", LOOKS["stage1"])
    for label, (log, look) in _stage2_curves(logs).items():
        _curve(right, log, "coord_diag/expected_bin_mae", label, look)
    for ax, title in ((left, "stage 1"), (right, "stage 2 and the control")):
        ax.set_title(title)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("mean error of E[k] (bins of 1/1000)")
    if right.get_legend_handles_labels()[1]:
        right.legend()
    return figure
