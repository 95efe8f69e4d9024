"""Figures of single coordinates: how far they are off, and what the model's distributions look like where it matters.

Legend: P predictions, G objects, M matched pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coordexp.evaluation.measures import matched_ious
from coordexp.evaluation.table import Floats
from coordexp.geometry.bins import NUM_BINS, target_bins
from coordexp.reporting.outcomes import MATCH_IOU, Outcomes
from coordexp.reporting.style import FAINT, GREEN, INK, LOOKS, RED, figure_style, new_figure, save_figure

EDGES_BINS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 1000)
SLOTS = ("x1", "y1", "x2", "y2")
STRIPS_PER_RULE = 3
_MARGIN_BINS = 15  # so that a mark on the border of the picture is seen whole
RULES = ("widest", "largest error", "narrowest", "in between")


@dataclass(frozen=True, slots=True)
class Strip:
    """One coordinate slot of a matched pair: what was emitted, how sure the model was, and where the edge is."""

    rule: str
    image_id: int
    desc: str
    slot: str
    emitted_bin: float
    mean_bin: float
    median_bin: float
    sd_bins: float
    true_bin: float


def write_coordinate_figures(outcomes: Mapping[str, Outcomes], strips: Sequence[Strip], folder: Path) -> None:
    """Write bin_errors.png and, if the predictions hold distributions, coord_strips.png."""
    with figure_style():
        save_figure(_bin_errors(outcomes), folder / "bin_errors.png")
        if strips:
            save_figure(_strips(strips), folder / "coord_strips.png")


def bin_errors(outcome: Outcomes) -> Floats:
    """|predicted - annotated| in bins of the four coordinates of every pair matched at IoU .50, shape (M, 4)."""
    hit_M = outcome.matches.at(MATCH_IOU)
    pred_M, gt_M = outcome.matches.pred_M[hit_M], outcome.matches.gt_M[hit_M]
    table = outcome.table
    errors = [
        np.abs(target_bins(table.pred_boxes_P4[p], *size) - target_bins(table.gt_boxes_G4[g], *size))
        for p, g, size in zip(pred_M, gt_M, table.sizes_wh_I2[table.gt_image_G[gt_M]].tolist(), strict=True)
    ]
    return np.array(errors).reshape(-1, 4)


def _bin_errors(outcomes: Mapping[str, Outcomes]) -> Figure:
    """The distribution in octaves of bins; its cumulative, the share of edges within k bins; that of IoU from above."""
    figure = new_figure(12.6, 3.4)
    left, right, above = figure.subplots(1, 3, width_ratios=(4, 3, 3))
    positions = np.arange(len(EDGES_BINS) - 1)
    for shift, (name, outcome) in enumerate(outcomes.items()):
        look, errors = LOOKS[name], bin_errors(outcome).ravel()
        if not len(errors):
            continue
        share = np.histogram(errors, bins=EDGES_BINS)[0] / len(errors)
        width = 0.8 / len(outcomes)
        left.bar(
            positions + (shift - (len(outcomes) - 1) / 2) * width, 100 * share, width, color=look.colour, label=name
        )
        ordered = np.sort(errors)
        label = f"{name}: median {np.median(errors):.1f}"
        right.plot(np.maximum(ordered, 0.1), np.arange(1, len(ordered) + 1) / len(ordered), color=look.colour,
                   linestyle=look.line, label=label)  # fmt: skip
    labels = [f"{a}-{b}" for a, b in pairwise(EDGES_BINS[:-1])] + [f"{EDGES_BINS[-2]}+"]
    left.set_xticks(positions, labels)
    left.set(xlabel="error of an edge (bins of 1/1000)", ylabel="percent of edges", title="Edges of located boxes")
    right.set(xscale="log", xlim=(0.3, 300), ylim=(0, 1.02), xlabel="k (bins of 1/1000)")
    right.set_title("Share of edges within k bins")
    right.xaxis.set_major_formatter("{x:g}")
    for name, outcome in outcomes.items():
        iou_M = np.sort(matched_ious(outcome.table))[::-1]
        if len(iou_M):
            above.plot(iou_M, np.arange(1, len(iou_M) + 1) / len(iou_M), color=LOOKS[name].colour,
                       linestyle=LOOKS[name].line, label=f"{name}: mean {iou_M.mean():.2f}")  # fmt: skip
    above.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="IoU", title="Share of paired boxes of at least that IoU")
    for ax, place in ((left, "upper left"), (right, "lower right"), (above, "lower left")):
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc=place)
    return figure


def _at_border(strip: Strip) -> bool:
    return not _MARGIN_BINS < strip.true_bin < NUM_BINS - _MARGIN_BINS


def choose_strips(outcome: Outcomes, per_rule: int = STRIPS_PER_RULE) -> list[Strip]:
    """Slots of matched pairs by rule: widest distribution, largest error, narrowest, and those around the median width.

    An edge on the border of the picture is known without looking, so it is narrowest only where there is no other. One
    slot per pair at most, so that one bad box does not fill the figure; empty where no distribution is on file.
    """
    everything = _all_strips(outcome)
    orders = {
        "widest": sorted(everything, key=lambda s: -s.sd_bins),
        "largest error": sorted(everything, key=lambda s: -abs(s.emitted_bin - s.true_bin)),
        "narrowest": sorted(everything, key=lambda s: (_at_border(s), s.sd_bins)),
    }
    middle = float(np.median([s.sd_bins for s in everything])) if everything else 0.0
    orders["in between"] = sorted(everything, key=lambda s: abs(s.sd_bins - middle))
    chosen: list[Strip] = []
    taken: set[tuple[int, float]] = set()
    for rule in RULES:
        count = 0
        for strip in orders[rule]:
            if count < per_rule and (strip.image_id, strip.true_bin) not in taken:
                taken |= {(s.image_id, s.true_bin) for s in everything if _same_box(s, strip)}
                fields = {name: getattr(strip, name) for name in Strip.__slots__} | {"rule": rule}
                chosen.append(Strip(**fields))
                count += 1
    return chosen


def _same_box(a: Strip, b: Strip) -> bool:
    return (a.image_id, a.desc) == (b.image_id, b.desc)


def _all_strips(outcome: Outcomes) -> list[Strip]:
    """Every slot of every matched pair whose prediction holds its distribution's statistics."""
    table, found = outcome.table, []
    predictions = [(result, pred) for result in outcome.results for pred in result.pred]
    hit_M = outcome.matches.at(MATCH_IOU)
    for p, g in zip(outcome.matches.pred_M[hit_M].tolist(), outcome.matches.gt_M[hit_M].tolist(), strict=True):
        result, pred = predictions[p]
        if pred.bins is None or pred.coord_sd_bins is None or "expectation" not in pred.boxes_xyxy_px:
            continue
        size = (result.width, result.height)
        boxes = pred.boxes_xyxy_px
        truth, mean = target_bins(table.gt_boxes_G4[g], *size), target_bins(boxes["expectation"], *size)
        median = target_bins(boxes.get("median", pred.bbox_xyxy_px), *size)
        for n, slot in enumerate(SLOTS):
            numbers = (pred.bins[n], mean[n], median[n], pred.coord_sd_bins[n], truth[n])
            found.append(Strip("", result.image_id, pred.desc, slot, *(float(v) for v in numbers)))
    return found


def _strips(strips: Sequence[Strip]) -> Figure:
    figure = new_figure(9.6, 0.36 * len(strips) + 1.2)
    ax = figure.subplots()
    rows = np.arange(len(strips))[::-1]
    for y, strip in zip(rows, strips, strict=True):
        _strip(ax, float(y), strip)
    labels = [f"{s.rule}: {s.desc} {s.slot}, image {s.image_id}" for s in strips]
    ax.set_yticks(rows, labels)
    ax.set(xlim=(-_MARGIN_BINS, NUM_BINS - 1 + _MARGIN_BINS), ylim=(-0.7, len(strips) - 0.3), xlabel="bin")
    ax.set_title("stage2: where the model puts an edge, and how sure it is")
    handles, names = ax.get_legend_handles_labels()
    first = dict(zip(names, handles, strict=True))
    figure.legend(first.values(), first.keys(), loc="outside lower center", ncols=len(first))
    return figure


def _strip(ax: Axes, y: float, strip: Strip) -> None:
    low, high = max(0.0, strip.mean_bin - strip.sd_bins), min(NUM_BINS - 1.0, strip.mean_bin + strip.sd_bins)
    ax.axhline(y, color=FAINT, linewidth=0.5, zorder=0)
    ax.plot([low, high], [y, y], color=LOOKS["stage2"].colour, linewidth=7, alpha=0.35, solid_capstyle="butt",
            label="mean ± standard deviation")  # fmt: skip
    ax.plot(strip.mean_bin, y, marker="|", markersize=10, color=LOOKS["stage2"].colour, linestyle="", label="mean")
    ax.plot(strip.median_bin, y, marker="D", markersize=4, color=INK, linestyle="", label="median")
    ax.plot(strip.emitted_bin, y, marker="x", markersize=6, color=RED, linestyle="", label="emitted")
    ax.plot(strip.true_bin, y, marker="v", markersize=6, color=GREEN, linestyle="", label="annotated")
