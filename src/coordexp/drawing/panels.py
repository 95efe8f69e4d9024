"""Panels side by side under their titles, with a legend of what the boxes mean."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from coordexp.drawing.boxes import BoxStyle, label_font
from coordexp.infra.printable import printable

RIGHT = BoxStyle((0, 158, 115))
FALSE = BoxStyle((214, 39, 40))
MISSED = BoxStyle((245, 140, 0), dashed=True)
# The sign says in black and white what the colour says.
RIGHT_SIGN, WRONG_NAME_SIGN, FALSE_SIGN = "✓ ", "≠ ", "✗ "
SHIFTED_SIGN, DUPLICATE_SIGN = "~ ", "2 "
BAR_FONT_SIDE_PX = 512  # titles and legend keep one font size, whatever the panels measure
_BAR_PX, _GAP_PX = 18, 6


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Titled panels of one height from left to right, the legend below."""
    font = label_font(BAR_FONT_SIDE_PX)
    width = sum(panel.width for _, panel in panels) + _GAP_PX * (len(panels) - 1)
    picture = Image.new("RGB", (width, panels[0][1].height + 2 * _BAR_PX), "white")
    draw = ImageDraw.Draw(picture)
    left = 0
    for title, panel in panels:
        draw.text((left + 2, 2), printable(title), font=font, fill=(0, 0, 0))
        picture.paste(panel, (left, _BAR_PX))
        left += panel.width + _GAP_PX
    draw_legend(draw, (2, picture.height - _BAR_PX), width)
    return picture


def grid(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Tiles of any size in rows from left to right; a row is as high as its highest tile, a column as its widest."""
    rows = [tiles[first : first + columns] for first in range(0, len(tiles), columns)]
    widths = [max(tile.width for tile in tiles[column::columns]) for column in range(min(columns, len(tiles)))]
    heights = [max(tile.height for tile in row) for row in rows]
    size = (sum(widths) + _GAP_PX * (len(widths) - 1), sum(heights) + _GAP_PX * (len(heights) - 1))
    picture = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            picture.paste(tile, (sum(widths[:x]) + _GAP_PX * x, sum(heights[:y]) + _GAP_PX * y))
    return picture


def draw_legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int], width: int) -> None:
    """What the three styles mean, as far as `width` pixels reach."""
    font = label_font(BAR_FONT_SIDE_PX)
    x, y = map(float, corner)
    for style, text in (
        (RIGHT, "✓ right"),
        (FALSE, "✗ nothing there, ≠ wrong name, ~ badly placed, 2 found twice"),
        (MISSED, "missed"),
    ):
        step = 14 + draw.textlength(text, font=font) + 10
        if x + step > width + 10:
            return
        if style.dashed:
            draw.line((x, y + 9, x + 4, y + 9), fill=style.colour, width=3)
            draw.line((x + 7, y + 9, x + 11, y + 9), fill=style.colour, width=3)
        else:
            draw.line((x, y + 9, x + 11, y + 9), fill=style.colour, width=3)
        draw.text((x + 14, y + 2), text, font=font, fill=(0, 0, 0))
        x += step
