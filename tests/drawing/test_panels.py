"""Panels keep their pixels and their places."""

from __future__ import annotations

import numpy as np
from PIL import Image

from coordexp.drawing.panels import BAR_PX, CAUSES, GAP_PX, MISSED, RIGHT, grid, side_by_side

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)


def test_two_panels_are_next_to_each_other_between_titles_and_legend() -> None:
    panels = [(name, Image.new("RGB", (400, 30), colour)) for name, colour in (("a", RED), ("b", BLUE))]
    pixels = np.asarray(side_by_side(panels))
    assert pixels.shape == (BAR_PX + 30 + BAR_PX, 400 + GAP_PX + 400, 3)
    assert (pixels[BAR_PX : BAR_PX + 30, :400] == RED).all()
    assert (pixels[BAR_PX : BAR_PX + 30, 400 : 400 + GAP_PX] == 255).all()
    assert (pixels[BAR_PX : BAR_PX + 30, 400 + GAP_PX :] == BLUE).all()


def test_of_three_panels_the_first_has_its_own_row_with_the_legend() -> None:
    panels = [(name, Image.new("RGB", (400, 200), colour)) for name, colour in (("a", RED), ("b", BLUE), ("c", GREEN))]
    pixels = np.asarray(side_by_side(panels, CAUSES))
    assert pixels.shape == (2 * (BAR_PX + 200), 400 + GAP_PX + 400, 3)
    assert (pixels[BAR_PX : BAR_PX + 200, :400] == RED).all()
    second_row = slice(2 * BAR_PX + 200, None)
    assert (pixels[second_row, :400] == BLUE).all()
    assert (pixels[second_row, 400 + GAP_PX :] == GREEN).all()
    assert shows(pixels[: BAR_PX + 200, 400 + GAP_PX :], MISSED.colour)


def test_a_legend_is_whole_whatever_the_width_of_the_panels() -> None:
    for width in (150, 300, 900):
        pixels = np.asarray(side_by_side([("a", Image.new("RGB", (width, 30), BLUE))], CAUSES))
        assert shows(pixels, RIGHT.colour)
        assert shows(pixels, MISSED.colour)  # the last entry


def shows(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((pixels == colour).all(axis=-1).any())


def test_a_row_and_a_column_of_a_grid_are_as_large_as_their_largest_tile() -> None:
    tiles = [Image.new("RGB", size, colour) for size, colour in (((10, 20), RED), ((30, 5), BLUE), ((25, 8), GREEN))]
    picture = np.asarray(grid(tiles, columns=2))
    assert picture.shape == (20 + 6 + 8, 25 + 6 + 30, 3)
    assert (picture[:20, :10] == RED).all()
    assert (picture[:5, 31:61] == BLUE).all()
    assert (picture[26:, :25] == GREEN).all()
    assert (picture[20:26] == 255).all()


def test_one_tile_is_its_own_grid() -> None:
    tile = Image.new("RGB", (7, 9), RED)
    assert (np.asarray(grid([tile], columns=2)) == np.asarray(tile)).all()
