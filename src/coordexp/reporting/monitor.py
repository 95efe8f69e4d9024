"""The eval table: finished checkpoints on val, and what the eval callback found while they trained, with its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coordexp.config.paths import CHECKPOINTS
from coordexp.config.schema import EvalParams
from coordexp.evaluation.protocol import iou_key
from coordexp.reporting.inputs import TRAINED, Json, Metrics, metric
from coordexp.reporting.markdown import number, table
from coordexp.reporting.style import GREEN, INK, LOOKS, RED, figure_style, new_figure, save_figure

DevRows = Mapping[str, Sequence[Json] | None]  # by training stage; None if the run left no monitor.jsonl
_DRAWN_COUNTS = (("right", GREEN, "-"), ("false", RED, "--"), ("missed", "#E69F00", ":"))
_SHOWN = ("stage1", "stage1-control", "stage2")
_COUNTS = ("predictions", "right", "false", "missed")


def checkpoint_counts_table(metrics: Metrics, params: EvalParams) -> str:
    """Scores and the counts they rest on, one row a checkpoint."""
    pairs = f"set.dup_pairs_{iou_key(min(params.duplicate_ious))}"
    keys: tuple[str, ...] = ("coco.mAP", "f1.full_50", "f1.precision_50", "f1.recall_50")
    keys += ("coco.n_pred", "f1.tp_50", "f1.fp_50", "f1.fn_50", pairs, "parse.parse_rate", "parse.truncated_rate")
    header = ["checkpoint", "mAP", "F1", "precision", "recall", *_COUNTS, "duplicate pairs an image", "parse rate"]
    header += ["cut, share"]
    return table(header, [[name, *(number(metric(metrics, name, key)) for key in keys)] for name in CHECKPOINTS])


def monitor_table(dev_rows: DevRows) -> str:
    """One row an evaluation, in the order of training; empty if there was none."""
    keys = ("f1", "precision", "recall", *_COUNTS, "dup_pairs_90", "parse_rate", "truncated")
    rows = [
        [name, str(row["step"]), *(number(row[key]) for key in keys)]
        for name in TRAINED
        for row in dev_rows[name] or ()
    ]
    header = ["stage", "step", "F1", "precision", "recall", *_COUNTS, "duplicate pairs", "parse rate", "cut"]
    return table(header, rows) if rows else ""


def monitor_sentence(dev_rows: DevRows) -> str:
    """What was evaluated, and how far one evaluation can be trusted; or why there is nothing."""
    rows = [row for name in TRAINED for row in dev_rows[name] or ()]
    if not rows:
        if any(dev_rows[name] is None for name in TRAINED):
            return "No evaluation while training: these runs left no `monitor.jsonl`; `dvc repro` writes one."
        return "No evaluation while training: `monitor.every_steps` of the profile is 0."
    n_objects = max(row["objects"] for row in rows)
    half_width = 1.96 * math.sqrt(0.25 / max(1, n_objects))
    return (
        f"While training: the same {rows[0]['images']} dev images with {n_objects} objects every time, greedy, "
        "paired as in training at IoU .50. So few objects place a recall near one half within "
        f"±{half_width:.2f} only (95 %): read the direction and the counts, not the digits. "
        "mAP over so few images says nothing and is left out."
    )


def write_monitor_figure(dev_rows: DevRows, path: Path) -> None:
    """F1, precision and recall, and counts by step; nothing is written if no step was evaluated."""
    rows = {name: list(dev_rows[name] or ()) for name in _SHOWN}
    if any(rows.values()):
        with figure_style():
            save_figure(_monitor_figure(rows), path)


def _monitor_figure(rows: Mapping[str, list[Json]]) -> Figure:
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
            for key, colour, line in _DRAWN_COUNTS:
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
