"""The few small pictures that git holds, which page one and the README show.

Their names stay, whatever they show, and every experiment commits them anew: so they are few and small. All other
pictures are in DVC's cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coordexp.config.paths import COMPARISONS
from coordexp.infra.logs import BIN_ERROR, logged
from coordexp.matching.summary import MatchCounts
from coordexp.reporting.figures_evaluation import pr_curves
from coordexp.reporting.figures_training import bin_error_axis, smooth
from coordexp.reporting.gallery import GalleryPick, write_example
from coordexp.reporting.inputs import Json, ReportData
from coordexp.reporting.outcomes import Outcomes
from coordexp.reporting.style import FAINT, INK, LOOKS, figure_style, new_figure, save_figure
from coordexp.reporting.verdicts import Difference, compared

MAX_FILES, MAX_BYTES = 8, 70_000
DIFFERENCES, CURVES, TRAINING = "differences.png", "precision_recall.png", "training.png"
EXAMPLES = {"random": "random.png", "most misses": "most_missed.png"}  # rule of the gallery -> its first image
_COLOURS = 32  # of a figure: lines and text need few
_ROWS = ("coco.mAP", "coco.AP50", "coco.AP75", "f1.full_50", "f1.loc_50", "known.mAP", "held_out.mAP")
_PANELS = (("stage2_vs_control", "stage2_vs_stage1"), ("stage1_vs_base",))  # of one scale each
_OFFSET = 0.16
_BESIDE = {"stage1-control": 4}  # steps to the right of stage 2, not under it


def write_pictures(
    data: ReportData, outcomes: Mapping[str, Outcomes], picks: Sequence[GalleryPick], image_root: Path, folder: Path
) -> None:
    """Draw all pictures of page one into `folder`."""
    with figure_style():
        save_figure(_differences(data), folder / DIFFERENCES, _COLOURS)
        save_figure(pr_curves(data.pr_curves, height_in=3.2), folder / CURVES, _COLOURS)
        save_figure(_training(data), folder / TRAINING, _COLOURS)
    for pick in examples(picks).values():
        write_example(pick, outcomes, image_root, folder / EXAMPLES[pick.rule])


def examples(picks: Sequence[GalleryPick]) -> dict[str, GalleryPick]:
    """The first pick of each rule that page one shows."""
    return {rule: pick for rule in EXAMPLES for pick in reversed(picks) if pick.rule == rule}


def _differences(data: ReportData) -> Figure:
    """A forest plot of the paired differences with their intervals, stage 2 and stage 1 on scales of their own."""
    figure = new_figure(9.2, 3.1)
    for ax, names in zip(figure.subplots(1, 2, sharey=True), _PANELS, strict=True):
        for row, name in enumerate(names):
            new, old = COMPARISONS[name]
            _forest(ax, compared(data, name), (row - (len(names) - 1) / 2) * 2 * _OFFSET, f"{new} - {old}", old)
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.margins(x=0.08)
        ax.set_xlabel("difference, 95 % interval (paired over images)")
        ax.set_title(f"{COMPARISONS[names[0]][0]} against " + " and ".join(COMPARISONS[name][1] for name in names))
        if len(names) > 1 and ax.get_legend_handles_labels()[1]:
            figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.axes[0].set_yticks(range(len(_ROWS)), _ROWS)
    figure.axes[0].set_ylim(len(_ROWS) - 0.5, -0.5)
    return figure


def _forest(ax: Axes, differences: Mapping[str, Difference | None], offset: float, label: str, old: str) -> None:
    found = [(row, differences.get(key)) for row, key in enumerate(_ROWS)]
    known = [(row, difference) for row, difference in found if difference is not None]
    if known:
        look = LOOKS[old]
        ax.errorbar(
            [difference.delta for _, difference in known],
            [row + offset for row, _ in known],
            xerr=[
                [max(0.0, difference.delta - difference.lo) for _, difference in known],
                [max(0.0, difference.hi - difference.delta) for _, difference in known],
            ],
            color=look.colour, marker=look.marker, markersize=4, linestyle="", elinewidth=1.4, label=label,
        )  # fmt: skip


def _training(data: ReportData) -> Figure:
    """How far coordinates are off while training, and F1 on the dev images with its interval: without any weight."""
    figure = new_figure(9.2, 3.0)
    error, f1 = figure.subplots(1, 2)
    seam = len(data.logs["stage1"])
    for name, log in data.logs.items():
        look, start = LOOKS[name], 0 if name == "stage1" else seam
        values = smooth(logged(log, BIN_ERROR))
        error.plot(values.index + start, values, color=look.colour, linestyle=look.line, label=name)
        _evaluations(f1, data.dev_rows[name] or (), start, name)
    bin_error_axis(error)
    error.set_title("Error of the expected coordinate, training data")
    f1.set(ylim=(0, 1), xlabel="optimizer step", title="F1 of boxes and names, dev images")
    for ax in (error, f1):
        ax.axvline(seam, color=FAINT, linewidth=0.8, linestyle="--")
        ax.set_xlim(0, 1.03 * (seam + max(len(data.logs[name]) for name in data.logs if name != "stage1")))
    if error.get_legend_handles_labels()[1]:
        error.legend()
    return figure


def _evaluations(ax: Axes, rows: Sequence[Json], start: int, name: str) -> None:
    """F1 by step with its 95 % interval; one that is undefined is left out."""
    look = LOOKS[name]
    bounds = [MatchCounts(row["predictions"], row["objects"], row["right"]).intervals["f1"] for row in rows]
    points = [(row["step"] + start, row["f1"], *bound) for row, bound in zip(rows, bounds, strict=True) if bound]
    if points:
        steps, values, low, high = np.array(points, dtype=float).T
        ax.errorbar(steps + _BESIDE.get(name, 0), values, yerr=[values - low, high - values], color=look.colour,
                    linestyle=look.line, marker=look.marker, markersize=4, elinewidth=1)  # fmt: skip
