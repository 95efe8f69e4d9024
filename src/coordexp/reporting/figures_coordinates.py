"""Figures of single coordinates: their errors, and the distributions of the model where they tell most.

Legend: P predictions, G objects, M matched pairs, K bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import LegendLocType
from PIL import Image

from coordexp.evaluation.measures import matched_ious
from coordexp.evaluation.table import Floats
from coordexp.geometry.bins import NUM_BINS, target_bins
from coordexp.geometry.boxes import Box
from coordexp.records.images import read_record_rgb
from coordexp.reporting.inputs import Distributions
from coordexp.reporting.outcomes import MATCH_IOU, Outcomes
from coordexp.reporting.style import GREEN, INK, LOOKS, RED, WIDTH_IN, figure_style, new_figure, save_figure

EDGES_BINS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 1000)
SLOTS = ("x1", "y1", "x2", "y2")
STRIPS_PER_RULE = 2
RULES = ("widest", "largest error", "narrowest", "median width")
_MARGIN_BINS = 15  # an edge nearer than this to the border of the image counts as on it
_TAIL = 0.01  # of the probability, on either side, may lie outside of a strip
_CROP_MARGIN = 0.25  # of the longer side of the box
_CROP_PX = 160  # of the longer side of a crop


@dataclass(frozen=True, slots=True)
class Strip:
    """One coordinate slot of a matched pair: what was emitted, its distribution in numbers, and the annotated edge."""

    rule: str
    image_id: int
    pred: int  # place in the answer
    desc: str
    slot: str
    emitted_bin: float
    mean_bin: float
    median_bin: float
    sd_bins: float
    true_bin: float
    box_xyxy_px: Box
    true_box_xyxy_px: Box


def write_coordinate_figures(
    outcomes: Mapping[str, Outcomes],
    strips: Sequence[Strip],
    distributions: Mapping[int, Distributions],
    image_root: Path,
    folder: Path,
) -> None:
    """Write bin_errors.png and, if there are strips, coord_strips.png."""
    with figure_style():
        save_figure(_bin_errors(outcomes), folder / "bin_errors.png")
        if strips:
            images = {strip.image_id: _image_of(outcomes, strip, image_root) for strip in strips}
            save_figure(_strips(strips, distributions, images), folder / "coord_strips.png")


def _image_of(outcomes: Mapping[str, Outcomes], strip: Strip, image_root: Path) -> Image.Image:
    return read_record_rgb(image_root, outcomes["stage2"].of_image(strip.image_id)[0].image)


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
    """Errors of edges in octaves of bins; their cumulative distribution; and that of IoU from above."""
    figure = new_figure(WIDTH_IN, 5.6)
    axes = figure.subplot_mosaic("aa;bc")
    octaves, within, at_least = axes["a"], axes["b"], axes["c"]
    positions, width = np.arange(len(EDGES_BINS) - 1), 0.8 / len(outcomes)
    for shift, (name, outcome) in enumerate(outcomes.items()):
        look, errors = LOOKS[name], np.sort(bin_errors(outcome).ravel())
        if len(errors):
            percents = 100 * np.histogram(errors, bins=EDGES_BINS)[0] / len(errors)
            at = positions + (shift - (len(outcomes) - 1) / 2) * width
            octaves.bar(at, percents, width, color=look.colour, label=name)
            within.plot(np.maximum(errors, 0.1), np.arange(1, len(errors) + 1) / len(errors), color=look.colour,
                        linestyle=look.line, label=f"{name}: median {np.median(errors):.1f}")  # fmt: skip
        iou_M = np.sort(matched_ious(outcome.table))[::-1]
        if len(iou_M):
            at_least.plot(iou_M, np.arange(1, len(iou_M) + 1) / len(iou_M), color=look.colour, linestyle=look.line,
                          label=f"{name}: mean {iou_M.mean():.2f}")  # fmt: skip
    octaves.set_xticks(positions, [*(f"{a}-{b}" for a, b in pairwise(EDGES_BINS[:-1])), f"{EDGES_BINS[-2]}+"])
    octaves.set(xlabel="error of an edge, bins of 1/1000", ylabel="% of edges", title="Edges of matched boxes")
    octaves.grid(visible=False, axis="x")
    within.set(xscale="log", xlim=(0.3, 300), ylim=(0, 1.02), xlabel="k, bins of 1/1000")
    within.set_title("Fraction of edges within k bins")
    within.xaxis.set_major_formatter("{x:g}")
    at_least.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="IoU", title="Fraction of boxes of at least that IoU")
    places: tuple[tuple[Axes, LegendLocType], ...]
    places = ((octaves, "upper right"), (within, "upper left"), (at_least, "lower left"))
    for ax, place in places:
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc=place, fontsize=7)
    return figure


def _at_border(strip: Strip) -> bool:
    return not _MARGIN_BINS < strip.true_bin < NUM_BINS - _MARGIN_BINS


def choose_strips(outcome: Outcomes, per_rule: int = STRIPS_PER_RULE) -> list[Strip]:
    """Slots of matched pairs by rule: widest distribution, largest error, narrowest, and those of median width.

    An edge on the border of the image needs no evidence from it, so such an edge is "narrowest" only where there is no
    other. At most one slot per object, so that one bad box does not fill the figure; empty without distributions.
    """
    everything = all_strips(outcome)
    orders = {
        "widest": sorted(everything, key=lambda s: -s.sd_bins),
        "largest error": sorted(everything, key=lambda s: -abs(s.emitted_bin - s.true_bin)),
        "narrowest": sorted(everything, key=lambda s: (_at_border(s), s.sd_bins)),
    }
    middle = float(np.median([s.sd_bins for s in everything])) if everything else 0.0
    orders["median width"] = sorted(everything, key=lambda s: abs(s.sd_bins - middle))
    chosen: list[Strip] = []
    taken: set[tuple[int, float]] = set()
    for rule in RULES:
        count = 0
        for strip in orders[rule]:
            if count < per_rule and (strip.image_id, strip.true_bin) not in taken:
                taken |= {(s.image_id, s.true_bin) for s in everything if _same_box(s, strip)}
                chosen.append(replace(strip, rule=rule))
                count += 1
    return chosen


def _same_box(a: Strip, b: Strip) -> bool:
    return (a.image_id, a.desc) == (b.image_id, b.desc)


def all_strips(outcome: Outcomes) -> list[Strip]:
    """Every slot of every matched pair whose prediction has the statistics of its distributions."""
    table, found = outcome.table, []
    predictions = [(result, n, pred) for result in outcome.results for n, pred in enumerate(result.pred)]
    hit_M = outcome.matches.at(MATCH_IOU)
    for p, g in zip(outcome.matches.pred_M[hit_M].tolist(), outcome.matches.gt_M[hit_M].tolist(), strict=True):
        result, place, pred = predictions[p]
        if pred.bins is None or pred.coord_sd_bins is None or "expectation" not in pred.boxes_xyxy_px:
            continue
        size, boxes = (result.width, result.height), pred.boxes_xyxy_px
        x1, y1, x2, y2 = table.gt_boxes_G4[g].tolist()
        truth, mean = target_bins((x1, y1, x2, y2), *size), target_bins(boxes["expectation"], *size)
        median = target_bins(boxes.get("median", pred.bbox_xyxy_px), *size)
        for n, slot in enumerate(SLOTS):
            found.append(
                Strip(
                    rule="",
                    image_id=result.image_id,
                    pred=place,
                    desc=pred.desc,
                    slot=slot,
                    emitted_bin=float(pred.bins[n]),
                    mean_bin=float(mean[n]),
                    median_bin=float(median[n]),
                    sd_bins=float(pred.coord_sd_bins[n]),
                    true_bin=float(truth[n]),
                    box_xyxy_px=pred.bbox_xyxy_px,
                    true_box_xyxy_px=(x1, y1, x2, y2),
                )
            )
    return found


def _strips(
    strips: Sequence[Strip], distributions: Mapping[int, Distributions], images: Mapping[int, Image.Image]
) -> Figure:
    """A row per strip: the object with both edges, and the distribution over the bins around them."""
    figure = new_figure(WIDTH_IN, 1.15 * len(strips) + 0.5)
    axes = figure.subplots(len(strips), 2, squeeze=False, width_ratios=(1, 5))
    for (crop, density), strip in zip(axes, strips, strict=True):
        _crop(crop, strip, images[strip.image_id])
        draw_density(density, strip, distributions.get(strip.image_id))
        title = f"{strip.rule}: {strip.desc}, {strip.slot}, image {strip.image_id}"
        density.set_title(title, loc="left", fontsize=8)
    axes[-1][1].set_xlabel("bin")
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=7.5)
    return figure


def _crop(ax: Axes, strip: Strip, image: Image.Image) -> None:
    """The object with a margin; across it the annotated edge and the predicted one."""
    corners = np.array([strip.box_xyxy_px, strip.true_box_xyxy_px])
    margin = _CROP_MARGIN * float((corners[:, 2:] - corners[:, :2]).max())
    low, high = np.floor(corners[:, :2].min(axis=0) - margin), np.ceil(corners[:, 2:].max(axis=0) + margin)
    left, top = (int(v) for v in np.maximum(low, 0))
    right, bottom = (int(v) for v in np.minimum(high, image.size))
    small = image.crop((left, top, right, bottom))
    small.thumbnail((_CROP_PX, _CROP_PX))
    ax.imshow(np.asarray(small), extent=(left, right, bottom, top), interpolation="nearest")
    n = SLOTS.index(strip.slot)
    line = ax.axvline if strip.slot.startswith("x") else ax.axhline
    for box, colour in ((strip.true_box_xyxy_px, GREEN), (strip.box_xyxy_px, LOOKS["stage2"].colour)):
        line(box[n], color="white", linewidth=3)
        line(box[n], color=colour, linewidth=1.6)
    ax.set_axis_off()


def draw_density(ax: Axes, strip: Strip, probs_N4K: Distributions | None) -> None:
    """p(k) of the slot over the bins that hold it and all marks."""
    marks = (strip.mean_bin, strip.median_bin, strip.emitted_bin, strip.true_bin)
    low, high = min(marks), max(marks)
    colour = LOOKS["stage2"].colour
    if probs_N4K is not None:
        p_K = probs_N4K[strip.pred, SLOTS.index(strip.slot)].astype(np.float64)
        mass_K = np.cumsum(p_K) / p_K.sum()
        low = min(low, float(np.searchsorted(mass_K, _TAIL)))
        high = max(high, float(np.searchsorted(mass_K, 1 - _TAIL)))
        ax.fill_between(
            range(NUM_BINS), p_K / p_K.max(), step="mid", color=colour, alpha=0.35, linewidth=0, label="p(k)"
        )
    for at, marker, ink, label in (
        (strip.mean_bin, "|", colour, "E[k]"),
        (strip.median_bin, "D", INK, "median"),
        (strip.emitted_bin, "x", RED, "emitted"),
        (strip.true_bin, "v", GREEN, "annotated"),
    ):
        ax.axvline(at, color=ink, linewidth=0.8, ymax=_HEIGHTS[label] / 1.5)
        ax.plot(at, _HEIGHTS[label], marker=marker, markersize=5, color=ink, linestyle="", label=label)
    ax.set(xlim=(low - 5, high + 5), ylim=(0, 1.5), yticks=[])
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False)


_HEIGHTS = {"E[k]": 0.8, "median": 0.98, "emitted": 1.16, "annotated": 1.34}  # a height each: marks never overlap
