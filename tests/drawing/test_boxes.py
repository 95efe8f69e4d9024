"""Boxes where they belong, labels inside the picture and off each other."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coordexp.drawing.boxes import BoxStyle, draw_detections, font, name_style, place_label, readable_scale

GREEN = BoxStyle((0, 158, 115))


def blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 200, 200))


def painted(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of a colour."""
    return np.argwhere((np.asarray(picture) == colour).all(axis=-1))


def test_the_typeface_is_the_one_that_matplotlib_ships() -> None:
    assert Path(font(12).path) == Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@pytest.mark.parametrize(("side", "scale"), [(96, 4), (128, 4), (160, 3), (192, 3), (640, 1), (4000, 1)])
def test_small_pictures_are_enlarged(side: int, scale: int) -> None:
    assert readable_scale(side, side // 2) == scale


def test_a_box_is_drawn_at_its_scaled_position() -> None:
    picture = draw_detections(blank(100, 80), [[10, 30, 60, 70]], [""], styles=[GREEN], scale=3)
    assert picture.size == (300, 240)
    rows, columns = painted(picture, GREEN.colour).T
    assert rows.max() == pytest.approx(210, abs=2)
    assert columns.min() == pytest.approx(30, abs=2)
    assert columns.max() == pytest.approx(180, abs=2)
    assert np.asarray(picture)[150, 105].tolist() == [200, 200, 200]  # the inside stays visible


def test_the_source_picture_is_not_changed() -> None:
    source = blank(64, 64)
    draw_detections(source, [[1, 1, 60, 60]], ["cat"], [0.5])
    assert painted(source, (200, 200, 200)).shape[0] == 64 * 64


def test_a_dashed_box_has_gaps() -> None:
    solid, dashed = (
        draw_detections(blank(128, 128), [[20, 40, 100, 110]], [""], styles=[BoxStyle(GREEN.colour, d)], scale=2)
        for d in (False, True)
    )
    n_solid, n_dashed = (len(painted(picture, GREEN.colour)) for picture in (solid, dashed))
    assert 0.3 * n_solid < n_dashed < 0.85 * n_solid


def test_no_boxes_and_odd_names() -> None:
    assert draw_detections(blank(50, 50), [], [], None).size == (200, 200)
    draw_detections(blank(50, 50), [[0, 0, 0, 0], [0, 0, 50, 50]], ["a\nb \t", "x" * 400], [None, -3.25])


def test_names_keep_their_colour() -> None:
    assert name_style("cat") == name_style("cat")
    assert len({name_style(f"name {n}").colour for n in range(100)}) == 8


boxes = st.tuples(st.integers(0, 280), st.integers(0, 180), st.integers(1, 120), st.integers(1, 100)).map(
    lambda b: (float(b[0]), float(b[1]), float(min(300, b[0] + b[2])), float(min(200, b[1] + b[3])))
)


@given(st.lists(boxes, min_size=1, max_size=8))
def test_labels_stay_inside_the_picture(all_boxes: list[tuple[float, float, float, float]]) -> None:
    placed: list[tuple[float, float, float, float]] = []
    for box in all_boxes:
        x1, y1, x2, y2 = place_label((60, 15), box, (300, 200), placed, all_boxes)
        assert 0 <= x1 <= x2 <= 300
        assert 0 <= y1 <= y2 <= 200
        placed.append((x1, y1, x2, y2))


def test_labels_of_a_crowd_do_not_cover_each_other() -> None:
    row = [(x, 80.0, x + 50.0, 120.0) for x in (10.0, 65.0, 120.0, 175.0, 230.0)]
    placed: list[tuple[float, float, float, float]] = []
    for box in row:
        placed.append(place_label((75, 15), box, (300, 200), placed, row))
    for i, (ax1, ay1, ax2, ay2) in enumerate(placed):
        for bx1, by1, bx2, by2 in placed[:i]:
            assert min(ax2, bx2) <= max(ax1, bx1) or min(ay2, by2) <= max(ay1, by1)


def test_a_label_covers_another_only_without_free_space() -> None:
    """Boxes on top of each other leave no free place that touches them; the picture has many."""
    same = [(100.0, 80.0, 160.0, 120.0)] * 14
    placed: list[tuple[float, float, float, float]] = []
    for box in same:
        placed.append(place_label((75, 15), box, (300, 200), placed, same))
    for i, (ax1, ay1, ax2, ay2) in enumerate(placed):
        for bx1, by1, bx2, by2 in placed[:i]:
            assert min(ax2, bx2) <= max(ax1, bx1) or min(ay2, by2) <= max(ay1, by1)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_boxes_at_the_same_position_are_both_visible(shift: int, order: tuple[int, int]) -> None:
    red = BoxStyle((204, 30, 32))
    boxes = [[20, 20, 90, 90], [20 + shift, 20, 90 + shift, 90]]
    styles = [GREEN, red]
    picture = draw_detections(
        blank(128, 128), [boxes[i] for i in order], ["", ""], styles=[styles[i] for i in order], scale=1
    )
    assert all(len(painted(picture, style.colour)) > 80 for style in styles)


def test_a_small_box_is_over_a_large_one_in_any_order() -> None:
    boxes, styles = [[10, 10, 120, 120], [50, 5, 70, 30]], [GREEN, BoxStyle((204, 30, 32))]
    pictures = [
        draw_detections(
            blank(128, 128), [boxes[i] for i in order], ["", ""], styles=[styles[i] for i in order], scale=1
        )
        for order in ((0, 1), (1, 0))
    ]
    crossing = [np.asarray(picture)[10, 50].tolist() for picture in pictures]
    assert crossing == [[204, 30, 32]] * 2
