"""One figure of the method on one answer of the run: tokens, a distribution over bins, the box, the matched set.

    1 the answer as generated: a coordinate is one of 1000 tokens
    2 the distribution over these at one coordinate, with its expectation E[k]
    3 the box whose four edges are the expectations
    4 these boxes matched one to one to the annotations, at minimum cost, as stage 2 matches a rollout

Legend: N predictions, M annotated objects, K bins.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

from coordexp.config.schema import MatchingParams
from coordexp.geometry.bins import COORD_PATTERN, NUM_BINS, box_scale
from coordexp.geometry.boxes import Box
from coordexp.matching.matcher import MatchResult, match
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult
from coordexp.records.images import read_record_rgb
from coordexp.reporting.figures_coordinates import Strip, all_strips, draw_density
from coordexp.reporting.gallery import image_ranks
from coordexp.reporting.inputs import Distributions
from coordexp.reporting.outcomes import Outcomes
from coordexp.reporting.style import GREEN, INK, LOOKS, RED, WIDTH_IN, figure_style, new_figure, save_figure

METHOD = "method.png"
OBJECTS = range(2, 5)  # annotated, and predicted: what four small panels can show
SLOT_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")  # of x1, y1, x2, y2
TINY_FRACTION = 0.02  # of the image's area
MISSED_COLOUR = "#E69F00"
_LINE_CHARS, _LINES, _MONO_PT = 43, 9, 8.4
_KEY_LINES = 6  # below the matched set: more would take the space of the panels
_BREAK = re.compile(r"(?<=, )(?=\{)|(?=\"bbox_2d\")|(?=<\|im_end)")  # before an object, its box, and the end
_ABOVE = (0, 1.01, 1, 0.16)  # of an image: where the distributions of x are
_COLOURS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """The answer that is shown, how its boxes match, and the coordinate whose distribution is shown."""

    result: ImageResult
    objects: tuple[GroundTruth, ...]
    boxes: tuple[Box, ...]  # of the expectations, in pixels
    matched: MatchResult
    strip: Strip


def choose_method(
    outcome: Outcomes, distributions: Mapping[int, Distributions], matching: MatchingParams, seed: int
) -> Method | None:
    """A complete answer that is easy to see, selected by rule and, among equals, by the seed.

    Preferred in this order: few objects; different names; pairs as well as a false positive and a false negative; no
    tiny object; an image at least as wide as high, as the panels are. None if no answer has distributions and a match.
    """
    strips: dict[int, list[Strip]] = defaultdict(list)
    for strip in all_strips(outcome):
        strips[strip.image_id].append(strip)
    found = [
        method
        for result in outcome.results
        if result.image_id in distributions
        and result.parse is not None
        and result.parse.ok
        and (method := _method(result, strips[result.image_id], matching))
    ]
    rank = image_ranks(sorted(m.result.image_id for m in found), seed)

    def preference(method: Method) -> tuple[int, bool, int, bool, bool, int]:
        beyond = sum(max(OBJECTS.start - n, n - OBJECTS.stop + 1, 0) for n in (len(method.boxes), len(method.objects)))
        distinct = all(len({one.desc for one in side}) == len(side) for side in (method.objects, method.result.pred))
        matched, size = method.matched, (method.result.width, method.result.height)
        kinds = sum(map(bool, map(len, (matched.pairs, matched.unmatched_pred, matched.unmatched_gt))))
        boxes_G4 = np.array([gt.bbox_xyxy_px for gt in method.objects]) / box_scale(*size)
        smallest = (boxes_G4[:, 2:] - boxes_G4[:, :2]).prod(axis=1).min()
        tiny, wide = smallest < TINY_FRACTION, size[0] >= size[1]
        return beyond, not distinct, -kinds, tiny, not wide, rank[method.result.image_id]

    return min(found, key=preference, default=None)


def _method(result: ImageResult, strips: Sequence[Strip], matching: MatchingParams) -> Method | None:
    """An answer with its matched set; the distribution of its coordinate of median width."""
    objects = tuple(gt for gt in result.gt if not gt.iscrowd)
    if not strips or any("expectation" not in pred.boxes_xyxy_px for pred in result.pred):
        return None
    boxes = tuple(pred.boxes_xyxy_px["expectation"] for pred in result.pred)
    scale = box_scale(result.width, result.height)
    by_place = matching.model_copy(update={"lambda_sem": 0.0})  # distances of names need the text encoder
    matched = match(np.array(boxes) / scale, np.array([gt.bbox_xyxy_px for gt in objects]) / scale, by_place)
    by_width = sorted(strips, key=lambda strip: strip.sd_bins)
    return Method(result, objects, boxes, matched, by_width[len(by_width) // 2])


def write_method(
    method: Method, distributions: Mapping[int, Distributions], matching: MatchingParams, image_root: Path, path: Path
) -> None:
    """Draw the four steps as PNG, small enough for git."""
    image = read_record_rgb(image_root, method.result.image)
    probs_N4K = distributions[method.result.image_id]
    with figure_style():
        figure = new_figure(WIDTH_IN, 5.6)
        axes = figure.subplot_mosaic("td;bm", height_ratios=(6, 10))
        _tokens(axes["t"], method.result.raw_text)
        axes["t"].set_title("1  Answer: an edge is one token of 1000", loc="left")
        _distribution(axes["d"], method, probs_N4K)
        _box(axes["b"], method, probs_N4K, image)
        _matched(axes["m"], method, matching, image)
        save_figure(figure, path, _COLOURS)


def _tokens(ax: Axes, text: str) -> None:
    """The answer, an object on two lines; a coordinate token is a chip with its bin, in the color of its slot."""
    ax.set(xlim=(0, _LINE_CHARS), ylim=(_LINES, 0))
    ax.set_axis_off()
    slot = 0
    lines = [line for line in _BREAK.sub("\n", text).split("\n") if line]
    for row, line in enumerate([*lines[: _LINES - 1], "…"] if len(lines) > _LINES else lines):
        column, at = 0, 0
        for found in [*COORD_PATTERN.finditer(line), None]:
            plain = line[at : found.start()] if found else line[at:]
            _mono(ax, column, row, plain[: _LINE_CHARS - column], None)
            column += len(plain)
            if found:
                _mono(ax, column, row, found.group(1), SLOT_COLOURS[slot % 4])
                slot, column, at = slot + 1, column + len(found.group(1)), found.end()


def _mono(ax: Axes, column: int, row: int, text: str, colour: str | None) -> None:
    chip = {"boxstyle": "round,pad=0.1", "facecolor": colour, "edgecolor": "none", "alpha": 0.6} if colour else None
    ax.text(column, row + 0.5, text, fontsize=_MONO_PT, family="DejaVu Sans Mono", va="center", bbox=chip)


def _distribution(ax: Axes, method: Method, probs_N4K: Distributions) -> None:
    strip = method.strip
    draw_density(ax, strip, probs_N4K)
    ax.set_title(f"2  Distribution of {strip.slot} of “{strip.desc}”", loc="left")
    ax.set_xlabel("bin k of 1000")
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.3), ncols=5, fontsize=7.5, columnspacing=0.8,
              handletextpad=0.2, handlelength=1.2)  # fmt: skip


def _box(ax: Axes, method: Method, probs_N4K: Distributions, image: Image.Image) -> None:
    """The image with one box; along its borders the distributions of the four edges."""
    _show(ax, image)
    x1, y1, x2, y2 = method.boxes[method.strip.pred]
    _outline(ax, (x1, y1, x2, y2), LOOKS["stage2"].colour)
    above, right = ax.inset_axes(_ABOVE, sharex=ax), ax.inset_axes((1.01, 0, 0.16, 1), sharey=ax)
    for n, (edge, colour) in enumerate(zip((x1, y1, x2, y2), SLOT_COLOURS, strict=True)):
        p_K = probs_N4K[method.strip.pred, n].astype(np.float64)
        places_px = np.arange(NUM_BINS) / NUM_BINS * (image.height if n % 2 else image.width)
        if n % 2:
            right.fill_betweenx(places_px, p_K / p_K.max(), color=colour, linewidth=0)
            right.axhline(edge, color=INK, linewidth=0.8)
        else:
            above.fill_between(places_px, p_K / p_K.max(), color=colour, linewidth=0)
            above.axvline(edge, color=INK, linewidth=0.8)
        line = ax.axhline if n % 2 else ax.axvline
        line(edge, color=colour, linewidth=1, linestyle=":")
    for inset in (above, right):
        inset.set_axis_off()
    ax.set(xlim=(-0.5, image.width - 0.5), ylim=(image.height - 0.5, -0.5))
    above.set_title(f"3  Box of “{method.strip.desc}”: E[k] of each edge", loc="left")


def _matched(ax: Axes, method: Method, matching: MatchingParams, image: Image.Image) -> None:
    """Predictions as numbered solid boxes, annotations dashed; below, the pairs and what is left over."""
    _show(ax, image)
    partner = {int(j): int(i) for i, j in method.matched.pairs}
    for i, box in enumerate(method.boxes):
        colour = GREEN if i in partner.values() else RED
        _outline(ax, box, colour)
        ax.text(box[0], box[1], str(i + 1), fontsize=8, color="white", va="bottom",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2})  # fmt: skip
    for j, gt in enumerate(method.objects):
        _outline(ax, gt.bbox_xyxy_px, GREEN if j in partner else MISSED_COLOUR, dashed=True)
    names = [pred.desc for pred in method.result.pred]
    key = [
        f"{i + 1} {names[i]} ↔ annotated {method.objects[j].desc}, IoU {iou:.2f}"
        for (i, j), iou in zip(method.matched.pairs.tolist(), method.matched.iou_P.tolist(), strict=True)
    ]
    key += [f"{i + 1} {names[i]}: false positive" for i in method.matched.unmatched_pred.tolist()]
    key += [f"- - {method.objects[j].desc}: false negative" for j in method.matched.unmatched_gt.tolist()]
    if len(key) > _KEY_LINES:
        key[_KEY_LINES - 1 :] = [f"… and {len(key) - _KEY_LINES + 1} more"]
    gate = "IoU ≥" if matching.gate == "iou" else "L1 ≤"
    above = ax.inset_axes(_ABOVE)
    above.set_axis_off()
    above.set_title(f"4  Matched set, gate: {gate} {matching.gate_threshold:g}", loc="left")
    ax.set_xlabel("\n".join(["solid: predicted, dashed: annotated", *key]), loc="left", fontsize=8)


def _show(ax: Axes, image: Image.Image) -> None:
    ax.imshow(np.asarray(image), interpolation="nearest")
    ax.set(xticks=[], yticks=[], anchor="NW")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def _outline(ax: Axes, box: Box, colour: str, dashed: bool = False) -> None:
    x1, y1, x2, y2 = box
    style = (0, (3, 2)) if dashed else "-"
    casing = [Stroke(linewidth=3.4, foreground="white"), Normal()]
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.7, linestyle=style,
                           path_effects=casing))  # fmt: skip
