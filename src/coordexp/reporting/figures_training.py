"""Figures of the training logs: every loss with its lower bound, and the error of coordinates in bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from coordexp.config.schema import Params
from coordexp.infra.logs import BIN_ERROR, logged, smoothed
from coordexp.reporting.style import (
    CHANNEL_LOOKS,
    INK,
    LOOKS,
    WIDTH_IN,
    LineLook,
    figure_style,
    new_figure,
    save_figure,
)
from coordexp.reporting.training import channels, loss_columns, loss_floor, of_channel

_PANELS_PER_ROW = 2
_SUMS = ("loss/coord_reg",)  # of terms that have panels of their own
_SMOOTHED_FRACTION = 0.05  # of the rows
_LOG_FROM_RATIO, _LOG_ERROR_FROM_RATIO = 20.0, 4.0  # curves that span more than this have a logarithmic axis


@dataclass(frozen=True, slots=True)
class Curve:
    """One run, or one channel of it; `softce_floor` has the weight of the run."""

    label: str
    log: pd.DataFrame
    look: LineLook
    softce_floor: float


def write_training_figures(logs: Mapping[str, pd.DataFrame], params: Params, folder: Path) -> None:
    """Write stage1_losses.png, stage2_losses.png and bin_mae.png."""
    floors = {stage: loss_floor("softce", params, stage) or 0.0 for stage in logs}
    stage1, control = (Curve(name, logs[name], LOOKS[name], floors[name]) for name in ("stage1", "stage1-control"))
    # The control next to stage 2, and stage 2 by channel: the losses of the two channels mean different things.
    by_channel = [
        Curve(f"stage2, channel {name}", of_channel(logs["stage2"], name), CHANNEL_LOOKS[name], floors["stage2"])
        for name in channels(logs["stage2"])
    ]
    stage2 = by_channel or [Curve("stage2", logs["stage2"], LOOKS["stage2"], floors["stage2"])]
    with figure_style():
        save_figure(_loss_panels([stage1]), folder / "stage1_losses.png")
        save_figure(_loss_panels([control, *stage2]), folder / "stage2_losses.png")
        save_figure(_bin_mae([stage1], [control, *stage2]), folder / "bin_mae.png")


def _loss_panels(curves: Sequence[Curve]) -> Figure:
    """The total, then a panel per weighted term, since terms differ by orders of magnitude."""
    longest_first = sorted((loss_columns(curve.log) for curve in curves), key=len, reverse=True)
    names = [name for name in dict.fromkeys(chain(*longest_first)) if name not in _SUMS]
    n_rows = -(-len(names) // _PANELS_PER_ROW)
    figure = new_figure(WIDTH_IN, 1.9 * n_rows + 0.5)
    axes = list(figure.subplots(n_rows, _PANELS_PER_ROW, squeeze=False).flat)
    for ax, name in zip(axes, names, strict=False):
        _loss_panel(ax, curves, name)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    figure.supylabel("weighted loss", fontsize=9)
    figure.supxlabel("optimizer step", fontsize=9)
    if len(curves) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _loss_panel(ax: Axes, curves: Sequence[Curve], column: str) -> None:
    term = column.removeprefix("loss/")
    for curve in curves:
        _draw(ax, curve, column)
    ax.set_title(term)
    floors = sorted({curve.softce_floor for curve in curves if column in curve.log.columns})
    if term in ("softce", "total") and floors[0] > 0:  # no other term takes the total lower
        _draw_floors(ax, floors)
    elif _spans(curves, column, _LOG_FROM_RATIO):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    else:
        ax.set_ylim(bottom=0)


def _draw_floors(ax: Axes, floors: Sequence[float]) -> None:
    """The lower bound under each weight; the axis starts there, since only the loss above it can be trained away."""
    top = ax.get_ylim()[1]
    ax.set_ylim(floors[0] - 0.15 * (top - floors[0]), top)
    for floor in floors:
        ax.axhline(floor, color=INK, linewidth=1, linestyle="--")
        ax.annotate(f"lower bound {floor:.2f}: entropy of the target", (0.98, floor), (0, -3), ha="right", va="top",
                    xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=7.5)  # fmt: skip


def _spans(curves: Sequence[Curve], column: str, ratio: float) -> bool:
    values = np.concatenate([smooth(logged(curve.log, column)) for curve in curves])
    return bool(len(values) and values.min() > 0 and values.max() > ratio * values.min())


def smooth(values: pd.Series) -> pd.Series:
    """The moving mean that is drawn over the raw values."""
    return smoothed(values, max(3, round(_SMOOTHED_FRACTION * len(values))))


def _draw(ax: Axes, curve: Curve, column: str) -> None:
    """Raw values faintly, their moving mean on top."""
    values = logged(curve.log, column)
    if len(values):
        ax.plot(values.index, values, color=curve.look.colour, alpha=0.25, linewidth=0.8)
        ax.plot(values.index, smooth(values), color=curve.look.colour, linestyle=curve.look.line, label=curve.label)


def _bin_mae(stage1: Sequence[Curve], stage2: Sequence[Curve]) -> Figure:
    """Mean |E[k] - y| in bins under teacher forcing; logarithmic if it falls by `_LOG_ERROR_FROM_RATIO`."""
    figure = new_figure(WIDTH_IN, 3.0)
    for ax, title, curves in zip(
        figure.subplots(1, 2), ("stage 1", "stage 2 and the control"), (stage1, stage2), strict=True
    ):
        for curve in curves:
            _draw(ax, curve, BIN_ERROR)
        ax.set(title=title, xlabel="optimizer step")
        if _spans(curves, BIN_ERROR, _LOG_ERROR_FROM_RATIO):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_ylim(bottom=0)
        if len(curves) > 1 and ax.get_legend_handles_labels()[1]:
            ax.legend(loc="lower left")
    figure.axes[0].set_ylabel("mean |E[k] - y|, bins of 1/1000")
    return figure
