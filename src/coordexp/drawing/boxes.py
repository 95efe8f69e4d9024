"""Boxes with category names and scores on an image, legible on images of 100 pixels too.

Small images are enlarged first, then the boxes are drawn, then the labels: a label goes where it covers least.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import distribution

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from coordexp.geometry.boxes import as_boxes
from coordexp.infra.printable import printable

Rgb = tuple[int, int, int]
Point = tuple[float, float]
Rect = tuple[float, float, float, float]  # xyxy in output pixels

# Okabe and Ito 2008 without black and yellow (labels in white must stay readable), plus two dark tones.
NAME_COLOURS: tuple[Rgb, ...] = (
    (0, 114, 178), (213, 94, 0), (0, 135, 100), (170, 70, 130),
    (60, 130, 180), (150, 100, 0), (90, 60, 150), (120, 40, 40),
)  # fmt: skip
READABLE_SIDE_PX = 512
MAX_SCALE = 4
_CASING: Rgb = (255, 255, 255)
_DASH_PX, _GAP_PX = 9, 7


@dataclass(frozen=True, slots=True)
class BoxStyle:
    """How one box is drawn."""

    colour: Rgb
    dashed: bool = False


def name_style(name: str) -> BoxStyle:
    """The color of a category name, the same in every panel and every process."""
    return BoxStyle(NAME_COLOURS[zlib.crc32(name.encode()) % len(NAME_COLOURS)])


def readable_scale(width: int, height: int) -> int:
    """Whole factor that brings the longer side near 512 px: 4 for images of 128 px, 1 for photographs."""
    return max(1, min(MAX_SCALE, round(READABLE_SIDE_PX / max(width, height))))


def draw_detections(
    image: Image.Image,
    boxes_xyxy_px: NDArray | list[list[float]],
    labels: Sequence[str],
    scores: Sequence[float | None] | None = None,
    styles: Sequence[BoxStyle] | None = None,
    scale: int | None = None,
    font_px: int | None = None,
) -> Image.Image:
    """Draw labeled boxes on an enlarged copy of an image.

    Large boxes come first, and where a box runs along the outline of an earlier one it is dashed, so that no box hides
    another.

    Args:
        image: any mode; the copy is RGB.
        boxes_xyxy_px: boxes (N, 4) in pixels of `image`.
        labels: N category names.
        scores: N scores, shown with two digits; None shows none.
        styles: N styles; None colors by category name.
        scale: whole factor of enlargement; None chooses one by the size of the image.
        font_px: size of the labels in output pixels; None chooses one by the size of the output.

    Returns:
        a new image of `scale` times the size.
    """
    scale = scale or readable_scale(*image.size)
    canvas = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    boxes: list[Rect] = [(x1, y1, x2, y2) for x1, y1, x2, y2 in (as_boxes(boxes_xyxy_px) * scale).tolist()]
    chosen = list(styles) if styles is not None else [name_style(label) for label in labels]
    shown = list(scores) if scores is not None else [None] * len(boxes)
    assert len(boxes) == len(labels) == len(chosen) == len(shown), "one label, style and score per box"
    width = max(3, round(max(canvas.size) / 180))
    large_first = sorted(range(len(boxes)), key=lambda i: -_area(boxes[i]))
    for place, i in enumerate(large_first):
        _outline(draw, boxes[i], chosen[i], width, [boxes[j] for j in large_first[:place]])
    texts = [
        (printable(label), "" if score is None else f" {score:.2f}") for label, score in zip(labels, shown, strict=True)
    ]
    _labels(draw, canvas.size, boxes, texts, chosen, font(font_px or max(13, round(max(canvas.size) / 56))))
    return canvas


@lru_cache(maxsize=8)
def font(size_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which covers most scripts written with letters."""
    # matplotlib ships the file, so that panels look the same on every machine. Importing the package to find it would
    # take a third of a second.
    file = distribution("matplotlib").locate_file("matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf")
    return ImageFont.truetype(str(file), size_px)


def _outline(draw: ImageDraw.ImageDraw, box: Rect, style: BoxStyle, width: int, below: Sequence[Rect]) -> None:
    """One box over those `below`: a casing, then the color, in dashes where a side runs along one of theirs."""
    x1, y1, x2, y2 = box
    sides = (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x1, y2), (x2, y2)), ((x1, y1), (x1, y2)))
    shared = [any(_runs_along(side, other, width) for other in below) for side in sides]
    for side, covers in zip(sides, shared, strict=True):
        if not covers:
            _line(draw, side, _CASING, width + 3)
    for side, covers in zip(sides, shared, strict=True):
        for piece in _dashes(*side) if covers or style.dashed else [side]:
            _line(draw, piece, style.colour, width)


def _line(draw: ImageDraw.ImageDraw, side: tuple[Point, Point], colour: Rgb, width: int) -> None:
    """A line along an axis with square ends, so that two meet in a full corner."""
    (x1, y1), (x2, y2) = ((round(x) - width // 2, round(y) - width // 2) for x, y in side)
    draw.rectangle((x1, y1, x2 + width - 1, y2 + width - 1), fill=colour)


def _runs_along(side: tuple[Point, Point], box: Rect, width: int) -> bool:
    """Whether a side lies on a parallel side of `box` within a line's width, over a third of its length or more."""
    (ax, ay), (bx, by) = side
    x1, y1, x2, y2 = box
    if ay == by:
        near, common = min(abs(ay - y1), abs(ay - y2)), min(bx, x2) - max(ax, x1)
    else:
        near, common = min(abs(ax - x1), abs(ax - x2)), min(by, y2) - max(ay, y1)
    return near <= width + 2 and common > max(bx - ax, by - ay) / 3


def _area(box: Rect) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _dashes(start: Point, end: Point) -> list[tuple[Point, Point]]:
    (x1, y1), (x2, y2) = start, end
    length = max(abs(x2 - x1), abs(y2 - y1))  # sides are parallel to an axis
    if length == 0:
        return []
    dashes = []
    position = 0.0
    while position < length:
        a, b = position / length, min(position + _DASH_PX, length) / length
        dashes.append(((x1 + a * (x2 - x1), y1 + a * (y2 - y1)), (x1 + b * (x2 - x1), y1 + b * (y2 - y1))))
        position += _DASH_PX + _GAP_PX
    return dashes


def _labels(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    boxes: list[Rect],
    texts: list[tuple[str, str]],
    styles: list[BoxStyle],
    typeface: ImageFont.FreeTypeFont,
) -> None:
    """Small boxes choose first: they leave their labels the fewest places."""
    placed: list[Rect] = []
    for i in sorted(range(len(boxes)), key=lambda i: _area(boxes[i])):
        text = _fitting(*texts[i], typeface, size[0] - 8)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=typeface)
        spot = place_label((right - left + 8, bottom - top + 6), boxes[i], size, placed, boxes)
        placed.append(spot)
        if not _touches(spot, boxes[i]):
            _leader(draw, spot, boxes[i], styles[i].colour)
        draw.rectangle(spot, fill=styles[i].colour)
        draw.text((spot[0] + 4 - left, spot[1] + 3 - top), text, font=typeface, fill=_ink(styles[i].colour))


def _touches(a: Rect, b: Rect) -> bool:
    return a[0] <= b[2] + 1 and b[0] <= a[2] + 1 and a[1] <= b[3] + 1 and b[1] <= a[3] + 1


def _leader(draw: ImageDraw.ImageDraw, label: Rect, box: Rect, colour: Rgb) -> None:
    """A line from a label that found no place at its box to the nearest point of that."""
    start = ((label[0] + label[2]) / 2, (label[1] + label[3]) / 2)
    end = (min(max(start[0], box[0]), box[2]), min(max(start[1], box[1]), box[3]))
    draw.line((*start, *end), fill=_CASING, width=4)
    draw.line((*start, *end), fill=colour, width=2)


def _fitting(name: str, score: str, typeface: ImageFont.FreeTypeFont, width_px: int) -> str:
    """The label; a name that makes it wider than the image is cut with an ellipsis."""
    text = name + score
    while name and typeface.getlength(text) > width_px:
        name = name[:-1]
        text = f"{name}…{score}"
    return text


def _ink(colour: Rgb) -> Rgb:
    """Black or white, whichever differs more in luminance (ITU-R BT.601)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def place_label(
    label_wh: tuple[float, float], box: Rect, size: tuple[int, int], placed: Sequence[Rect], boxes: Sequence[Rect]
) -> Rect:
    """Where a label of one box goes: inside the image, off other labels, and covering as little as can be.

    It touches the box (above, below, inside, next to it; of equal spots the first) unless every such spot is on another
    label: then it is the free spot nearest to the box, if there is one.
    """
    w, h = label_wh
    placed_P4, boxes_N4 = (np.array(rects, dtype=np.float64).reshape(-1, 4) for rects in (placed, boxes))

    def inside(corners_S2: NDArray) -> NDArray:
        corners_S2 = np.maximum(0.0, np.minimum(corners_S2, (size[0] - w, size[1] - h)))
        return np.hstack([corners_S2, corners_S2 + label_wh])

    def cost(spots_S4: NDArray) -> NDArray:
        return 20 * _covered(spots_S4, placed_P4) + _covered(spots_S4, boxes_N4)

    spots_S4 = inside(np.array(_spots_at(box, w, h)))
    best_4 = spots_S4[np.argmin(cost(spots_S4))]
    if _covered(best_4[None], placed_P4)[0]:
        tops, lefts = np.arange(0, max(1, size[1] - h), h / 2), np.arange(0, max(1, size[0] - w), w / 4)
        grid_S4 = inside(np.stack(np.meshgrid(lefts, tops), axis=-1).reshape(-1, 2))
        free_S4 = grid_S4[_covered(grid_S4, placed_P4) == 0]
        if len(free_S4):
            best_4 = free_S4[np.lexsort((cost(free_S4), _gaps(free_S4, box)))[0]]
    left, top, right, bottom = best_4.tolist()
    return left, top, right, bottom


def _spots_at(box: Rect, w: float, h: float) -> list[Point]:
    """Upper left corners of labels that touch a box, the preferred ones first."""
    x1, y1, x2, y2 = box
    along_x, along_y = (x1, x2 - w, (x1 + x2 - w) / 2), (y1, y2 - h, (y1 + y2 - h) / 2)
    spots = [(x, y) for y in (y1 - h, y2, y1, y2 - h) for x in along_x]
    return spots + [(x, y) for x in (x2, x1 - w) for y in along_y]


def _gaps(spots_S4: NDArray, box: Rect) -> NDArray:
    """Distance (S,) of each spot to the box along the axes, 0 if they touch."""
    apart_S2 = np.maximum(0.0, np.maximum(spots_S4[:, :2] - box[2:], np.array(box[:2]) - spots_S4[:, 2:]))
    return apart_S2.sum(axis=1)


def _covered(spots_S4: NDArray, rects_R4: NDArray) -> NDArray:
    """The area (S,) of all rectangles that each spot covers, in px^2."""
    ends_RS2 = np.minimum(spots_S4[None, :, 2:], rects_R4[:, None, 2:])
    starts_RS2 = np.maximum(spots_S4[None, :, :2], rects_R4[:, None, :2])
    return np.maximum(0.0, ends_RS2 - starts_RS2).prod(axis=-1).sum(axis=0)
