"""Panels under their titles, two to a row, with a legend of what the boxes mean."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from coordexp.drawing.boxes import BoxStyle, font
from coordexp.infra.printable import printable

RIGHT = BoxStyle((0, 135, 100))
FALSE = BoxStyle((204, 30, 32))
MISSED = BoxStyle((245, 140, 0), dashed=True)
# The sign repeats in black and white what the color shows.
RIGHT_SIGN, WRONG_NAME_SIGN, FALSE_SIGN = "✓ ", "≠ ", "✗ "
SHIFTED_SIGN, BOTH_SIGN, DUPLICATE_SIGN = "~ ", "≠~ ", "dup. "
Legend = Sequence[tuple[BoxStyle, str]]
PAIRED: Legend = (  # of a pairing by IoU and name alone
    (RIGHT, "✓ correct"),
    (FALSE, "≠ wrong name"),
    (FALSE, "✗ false positive"),
    (MISSED, "missed"),
)
CAUSES: Legend = (  # TIDE's error types
    (RIGHT, "✓ correct"),
    (FALSE, "≠ classification"),
    (FALSE, "~ localization"),
    (FALSE, "≠~ both"),
    (FALSE, "dup. duplicate"),
    (FALSE, "✗ background"),
    (MISSED, "missed"),
)
FONT_PX = 18  # of titles and legend, whatever the panels measure
BAR_PX, GAP_PX = 28, 6
_SWATCH_PX, _BETWEEN_PX = 21, 14


def side_by_side(panels: Sequence[tuple[str, Image.Image]], legend: Legend = PAIRED) -> Image.Image:
    """Titled panels of one size, two to a row, the legend below; of an odd number the first has a row for itself.

    The legend is then next to that first panel.
    """
    width, height = panels[0][1].size
    columns = min(2, len(panels))
    alone = bool(len(panels) % columns)
    n_rows = -(-len(panels) // columns)
    total_width = columns * width + GAP_PX * (columns - 1)
    corner = (width + GAP_PX, BAR_PX) if alone else (0, n_rows * (height + BAR_PX))
    rows = _legend_rows(legend, total_width - corner[0])
    total_height = n_rows * (height + BAR_PX) + (0 if alone else BAR_PX * len(rows))
    picture = Image.new("RGB", (total_width, total_height), "white")
    draw = ImageDraw.Draw(picture)
    cells = [divmod(place + (alone and place > 0), columns) for place in range(len(panels))]
    for (row, column), (title, panel) in zip(cells, panels, strict=True):
        left, top = column * (width + GAP_PX), row * (height + BAR_PX)
        draw.text((left + 2, top + 3), printable(title), font=_font(), fill=(0, 0, 0))
        picture.paste(panel, (left, top + BAR_PX))
    _draw_legend(draw, corner, rows)
    return picture


def grid(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Tiles of any size in rows from left to right; a row is as high as its highest tile, a column as its widest."""
    rows = [tiles[first : first + columns] for first in range(0, len(tiles), columns)]
    widths = [max(tile.width for tile in tiles[column::columns]) for column in range(min(columns, len(tiles)))]
    heights = [max(tile.height for tile in row) for row in rows]
    size = (sum(widths) + GAP_PX * (len(widths) - 1), sum(heights) + GAP_PX * (len(heights) - 1))
    picture = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            picture.paste(tile, (sum(widths[:x]) + GAP_PX * x, sum(heights[:y]) + GAP_PX * y))
    return picture


def _font() -> ImageFont.FreeTypeFont:
    return font(FONT_PX)


def _legend_rows(legend: Legend, width: int) -> list[list[tuple[BoxStyle, str]]]:
    """The entries in as many rows as `width` pixels ask for."""
    rows: list[list[tuple[BoxStyle, str]]] = []
    left = float(width)
    for entry in legend:
        step = _SWATCH_PX + _font().getlength(entry[1]) + _BETWEEN_PX
        if not rows or left + step > width + _BETWEEN_PX:
            rows.append([])
            left = 0.0
        rows[-1].append(entry)
        left += step
    return rows


def _draw_legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int], rows: list[list[tuple[BoxStyle, str]]]) -> None:
    for row, entries in enumerate(rows):
        x, y = float(corner[0] + 2), corner[1] + BAR_PX * row
        for style, text in entries:
            for first, last in ((0, 6), (10, 16)) if style.dashed else ((0, 16),):
                draw.line((x + first, y + 14, x + last, y + 14), fill=style.colour, width=4)
            draw.text((x + _SWATCH_PX, y + 3), text, font=_font(), fill=(0, 0, 0))
            x += _SWATCH_PX + _font().getlength(text) + _BETWEEN_PX
