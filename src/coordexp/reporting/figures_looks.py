"""Figure of the looks at the model in training: scores, and the counts behind them, over all stages in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coordexp.reporting.inputs import Json
from coordexp.reporting.style import GREEN, INK, LOOKS, RED, figure_style, new_figure, save_figure

_COUNTS = (("right", GREEN, "-"), ("false", RED, "--"), ("missed", "#E69F00", ":"))
_SHOWN = ("stage1", "stage1-control", "stage2")


def write_looks_figure(looks: Mapping[str, Sequence[Json] | None], path: Path) -> None:
    """F1, precision and recall, and counts by step; nothing is written if no step was looked at."""
    rows = {name: list(looks[name] or ()) for name in _SHOWN}
    if any(rows.values()):
        with figure_style():
            save_figure(_looks_figure(rows), path)


def _looks_figure(rows: Mapping[str, list[Json]]) -> Figure:
    figure = new_figure(9.6, 3.2)
    axes = list(figure.subplots(1, 3))
    # Stage 2 and the control go on from the last step of stage 1: one axis for the whole training.
    seam = rows["stage1"][-1]["step"] if rows["stage1"] else 0
    for name in _SHOWN:
        continued = name != "stage1" and rows["stage1"]
        points = ([rows["stage1"][-1] | {"step": 0}] if continued else []) + rows[name]
        steps = [row["step"] + (seam if name != "stage1" else 0) for row in points]
        look = LOOKS[name]
        for ax, key in ((axes[0], "f1"), (axes[1], "precision"), (axes[1], "recall")):
            ax.plot(
                steps,
                [math.nan if row[key] is None else row[key] for row in points],  # undefined: a gap
                color=look.colour,
                linestyle=":" if key == "recall" else look.line,
                marker=look.marker,
                markersize=4,
                markerfacecolor="white" if key == "recall" else look.colour,
                label=name if key == "f1" else None,
            )
        if name != "stage1-control":
            for key, colour, line in _COUNTS:
                label = key if name == "stage1" else None
                axes[2].plot(steps, [row[key] for row in points], color=colour, linestyle=line, label=label)
    _finish(axes, seam, rows)
    return figure


def _finish(axes: Sequence[Axes], seam: int, rows: Mapping[str, list[Json]]) -> None:
    shown = next(found[0] for found in rows.values() if found)
    titles = ("F1 of boxes and names", "precision (filled), recall (hollow)", "objects, of stage 1 and stage 2")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
        ax.set_xlabel("optimizer step")
        ax.set_ylim(bottom=0)
        if seam:
            ax.axvline(seam, color=INK, linewidth=0.8, linestyle=":")
    for ax in axes[:2]:
        ax.set_ylim(0, 1)
    axes[0].set_ylabel(f"on {shown['images']} dev images")
    axes[2].set_ylim(0, 1.05 * max(axes[2].get_ylim()[1], shown["objects"]))
    axes[2].axhline(shown["objects"], color=INK, linewidth=0.8)
    axes[2].annotate(
        "annotated", (0.02, shown["objects"]), (0, -3), xycoords=("axes fraction", "data"),
        textcoords="offset points", va="top", fontsize=8,
    )  # fmt: skip
    axes[0].legend(loc="lower right")
    axes[2].legend()
