"""Boxes with names and scores drawn on a picture, legible also on pictures of 100 pixels.

Small pictures are enlarged first, then boxes, then labels are drawn: a label goes where it covers least.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
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
_HALO: Rgb = (20, 20, 20)
_DASH_PX, _GAP_PX = 6, 4


@dataclass(frozen=True, slots=True)
class BoxStyle:
    """How one box is drawn."""

    colour: Rgb
    dashed: bool = False


def name_style(name: str) -> BoxStyle:
    """The colour of a name: the same in every picture and every process."""
    return BoxStyle(NAME_COLOURS[zlib.crc32(name.encode()) % len(NAME_COLOURS)])


def readable_scale(width: int, height: int) -> int:
    """Whole factor that brings the longer side near 512 px: 4 for pictures of 128 px, 1 for photographs."""
    return max(1, min(MAX_SCALE, round(READABLE_SIDE_PX / max(width, height))))


def draw_detections(
    image: Image.Image,
    boxes_xyxy_px: NDArray | list[list[float]],
    labels: Sequence[str],
    scores: Sequence[float | None] | None = None,
    styles: Sequence[BoxStyle] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Draw labelled boxes on an enlarged copy of a picture.

    Args:
        image: any mode; the copy is RGB.
        boxes_xyxy_px: boxes (N, 4) in pixels of `image`.
        labels: N names.
        scores: N scores, shown with two digits; None shows none.
        styles: N styles; None colours by name.
        scale: whole factor of enlargement; None chooses one by the size of the picture.

    Returns:
        a new picture of `scale` times the size.
    """
    scale = scale or readable_scale(*image.size)
    canvas = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    boxes: list[Rect] = [(x1, y1, x2, y2) for x1, y1, x2, y2 in (as_boxes(boxes_xyxy_px) * scale).tolist()]
    chosen = list(styles) if styles is not None else [name_style(label) for label in labels]
    shown = list(scores) if scores is not None else [None] * len(boxes)
    assert len(boxes) == len(labels) == len(chosen) == len(shown), "one label, style and score per box"
    width = max(2, round(max(canvas.size) / 180))
    for box, style in zip(boxes, chosen, strict=True):
        _rectangle(draw, box, style, width)
    texts = [
        (printable(label), "" if score is None else f" {score:.2f}") for label, score in zip(labels, shown, strict=True)
    ]
    _labels(draw, canvas.size, boxes, texts, chosen)
    return canvas


def label_font(picture_side_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which covers most scripts written with letters, in a size that suits the picture."""
    return _font(max(11, round(picture_side_px / 70)))


@lru_cache(maxsize=8)
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships the file, so that pictures look the same on every machine.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size_px)


def _rectangle(draw: ImageDraw.ImageDraw, box: Rect, style: BoxStyle, width: int) -> None:
    x1, y1, x2, y2 = box
    if not style.dashed:
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_HALO, width=width + 2)
        draw.rectangle(box, outline=style.colour, width=width)
        return
    for start, end in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))):
        draw.line((*start, *end), fill=_HALO, width=width + 2)
        for first, last in _dashes(start, end):
            draw.line((*first, *last), fill=style.colour, width=width)


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
) -> None:
    font = label_font(max(size))
    placed: list[Rect] = []
    for box, (name, score), style in zip(boxes, texts, styles, strict=True):
        text = _fitting(name, score, font, size[0] - 5)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        spot = place_label((right - left + 5, bottom - top + 4), box, size, placed, boxes)
        placed.append(spot)
        draw.rectangle(spot, fill=style.colour)
        draw.text((spot[0] + 2 - left, spot[1] + 2 - top), text, font=font, fill=_ink(style.colour))


def _fitting(name: str, score: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """The label, its name cut with an ellipsis if it is wider than the picture."""
    text = name + score
    while name and font.getlength(text) > width_px:
        name = name[:-1]
        text = f"{name}…{score}"
    return text


def _ink(colour: Rgb) -> Rgb:
    """Black or white, whichever is further in luminance (ITU-R BT.601)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def place_label(
    label_wh: tuple[float, float], box: Rect, size: tuple[int, int], placed: Sequence[Rect], boxes: Sequence[Rect]
) -> Rect:
    """Where a label of one box goes: touching the box, inside the picture, covering least.

    Covering another label weighs far more than covering an object, and of equal spots the first is taken: above, below,
    inside, beside.
    """
    w, h = label_wh
    x1, y1, x2, y2 = box
    corners = [
        (x1, y1 - h), (x2 - w, y1 - h), (x1, y2), (x2 - w, y2), (x1, y1), (x1, y2 - h),
        (x2, y1), (x1 - w, y1), (x2, y2 - h), (x1 - w, y2 - h),
    ]  # fmt: skip

    def inside(left: float, top: float) -> Rect:
        left, top = max(0.0, min(left, size[0] - w)), max(0.0, min(top, size[1] - h))
        return left, top, left + w, top + h

    def cost(spot: Rect) -> float:
        hidden_labels = sum(_overlap(spot, other) for other in placed)
        return 20 * hidden_labels + sum(_overlap(spot, other) for other in boxes)

    return min((inside(*corner) for corner in corners), key=cost)


def _overlap(a: Rect, b: Rect) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
