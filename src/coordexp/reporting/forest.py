"""The forest plot: paired differences with their intervals, a panel per comparison, a row per metric.

Each panel has its own scale, because comparisons differ in size by an order of magnitude. The numbers are next to their
marks; color and marker show the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coordexp.evaluation.effect import Verdict
from coordexp.reporting.markdown import with_interval
from coordexp.reporting.style import INK, WIDTH_IN, figure_style, new_figure, save_figure

NAMES = {
    **{"coco.mAP": "mAP", "coco.AP50": "AP50", "coco.AP75": "AP75"},
    **{"f1.full_50": "F1", "f1.loc_50": "F1, class-agnostic"},
    **{"known.mAP": "mAP, seen in training", "held_out.mAP": "mAP, held out"},
}
_LOOKS = {Verdict.BETTER: ("#0072B2", "^"), Verdict.WORSE: ("#D55E00", "v")}  # distinct to color-blind readers too
_PLAIN = (INK, "o")
_ROW_IN, _PANEL_IN = 0.22, 0.6  # inches of a row, and of a panel around its rows


class Estimate(Protocol):
    """A paired difference with its 95 % interval."""

    @property
    def delta(self) -> float: ...
    @property
    def lo(self) -> float: ...
    @property
    def hi(self) -> float: ...
    @property
    def verdict(self) -> Verdict: ...


Panels = Mapping[str, Mapping[str, Estimate | None]]  # title -> metric -> difference, None where it is undefined


def write_forest(path: Path, panels: Panels, keys: Sequence[str], colours: int = 256) -> None:
    """Draw the differences of these metrics as PNG, one panel below the other.

    Differences that are undefined, or the same in every resample, are left out.
    """
    with figure_style():
        save_figure(_forest(panels, keys), path, colours)


def _forest(panels: Panels, keys: Sequence[str]) -> Figure:
    known = {
        title: {key: found for key in keys if (found := differences.get(key)) is not None and found.lo < found.hi}
        for title, differences in panels.items()
    }
    heights = [_PANEL_IN + _ROW_IN * max(1, len(rows)) for rows in known.values()]
    figure = new_figure(WIDTH_IN, sum(heights) + 0.4)
    axes = figure.subplots(len(known), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, rows) in zip(axes, known.items(), strict=True):
        ax.set_title(title, loc="left", fontweight="bold")
        _panel(ax, rows)
    axes[-1].set_xlabel("difference with 95 % interval, paired over images\n▲ better   ▼ worse   ● no difference shown")
    return figure


def _panel(ax: Axes, rows: Mapping[str, Estimate]) -> None:
    for y, found in enumerate(rows.values()):
        colour, marker = _LOOKS.get(found.verdict, _PLAIN)
        ax.plot([found.lo, found.hi], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        ax.plot(found.delta, y, color=colour, marker=marker, markersize=5.5)
    ax.axvline(0, color=INK, linewidth=0.9)
    ax.margins(x=0.06)
    ax.locator_params(axis="x", nbins=6)
    ax.set_yticks(range(len(rows)), [NAMES.get(key, key) for key in rows])
    ax.set_ylim(max(1, len(rows)) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    numbers = ax.secondary_yaxis("right")
    shown = [with_interval(found.delta, (found.lo, found.hi), sign=True) for found in rows.values()]
    numbers.set_yticks(range(len(rows)), shown)
    for ticks in (ax.yaxis, numbers.yaxis):
        ticks.set_tick_params(length=0)
    numbers.spines["right"].set_visible(False)
    if not rows:
        ax.text(
            0.5,
            0.5,
            "no metric differs, or none is defined on this data",
            ha="center",
            va="center",
            transform=ax.transAxes,
        )
