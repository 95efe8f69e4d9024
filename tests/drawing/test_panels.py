"""Panels keep their pixels and their places."""

from __future__ import annotations

import numpy as np
from PIL import Image

from coordexp.drawing.panels import grid, side_by_side

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)


def test_panels_stand_in_order_between_titles_and_legend() -> None:
    picture = side_by_side([("a", Image.new("RGB", (40, 30), RED)), ("b", Image.new("RGB", (50, 30), BLUE))])
    assert picture.size == (40 + 6 + 50, 30 + 2 * 18)
    pixels = np.asarray(picture)[18:48]
    assert (pixels[:, :40] == RED).all()
    assert (pixels[:, 40:46] == 255).all()
    assert (pixels[:, 46:] == BLUE).all()


def test_a_grid_gives_each_row_and_column_the_room_that_its_largest_tile_needs() -> None:
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
