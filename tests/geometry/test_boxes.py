"""Box arithmetic against shapely's polygons, and its symmetries."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from coordexp.geometry.boxes import (
    area,
    as_boxes,
    paired_iou_giou,
    pairwise_intersection,
    pairwise_iou,
    reading_order,
    xyxy_to_xywh,
)

sides = st.integers(0, 40).map(float)


@st.composite
def box_lists(draw, min_size=1, smallest_side=1):
    def box():
        x, y = draw(sides), draw(sides)
        return [x, y, x + smallest_side + draw(sides), y + smallest_side + draw(sides)]

    return as_boxes([box() for _ in range(draw(st.integers(min_size, 5)))])


def pairwise_giou(a_N4, b_M4):
    return paired_iou_giou(a_N4[:, None], b_M4)[1]


def polygons(boxes_N4):
    return [shapely.box(*box) for box in boxes_N4]


@given(box_lists(), box_lists())
def test_iou_and_giou_equal_shapely(a, b):
    for i, p in enumerate(polygons(a)):
        for j, q in enumerate(polygons(b)):
            union, hull = p.union(q).area, shapely.box(*p.union(q).bounds).area
            iou = p.intersection(q).area / union
            assert pairwise_intersection(a, b)[i, j] == pytest.approx(p.intersection(q).area)
            assert pairwise_iou(a, b)[i, j] == pytest.approx(iou)
            assert paired_iou_giou(a[:, None], b)[0][i, j] == pytest.approx(iou)
            assert pairwise_giou(a, b)[i, j] == pytest.approx(iou - (hull - union) / hull)


@given(box_lists(smallest_side=0), box_lists(smallest_side=0))
def test_bounds_and_symmetry_hold_for_degenerate_boxes_too(a, b):
    iou, giou = pairwise_iou(a, b), pairwise_giou(a, b)
    assert np.isfinite(iou).all()
    assert np.isfinite(giou).all()
    assert ((iou >= 0) & (iou <= 1)).all()
    assert ((giou >= -1) & (giou <= iou + 1e-12)).all()
    np.testing.assert_allclose(pairwise_iou(b, a), iou.T)
    np.testing.assert_allclose(pairwise_giou(b, a), giou.T)


@given(box_lists(), st.floats(0.1, 10), st.floats(-50, 50))
def test_iou_does_not_depend_on_the_frame(boxes, scale, shift):
    moved = boxes * scale + shift
    np.testing.assert_allclose(pairwise_iou(moved, moved), pairwise_iou(boxes, boxes), atol=1e-9)
    np.testing.assert_allclose(pairwise_giou(moved, moved), pairwise_giou(boxes, boxes), atol=1e-9)


@given(box_lists())
def test_a_box_equals_itself(boxes):
    np.testing.assert_allclose(np.diag(pairwise_iou(boxes, boxes)), 1)
    np.testing.assert_allclose(np.diag(pairwise_giou(boxes, boxes)), 1)


def test_giou_by_hand():
    # Two unit squares one apart: union 2, hull 3, no overlap.
    assert pairwise_giou(as_boxes([[0, 0, 1, 1]]), as_boxes([[2, 0, 3, 1]])).item() == pytest.approx(-1 / 3)


def test_worked_example_of_two_objects():
    predictions = as_boxes([[120, 300, 420, 700], [500, 280, 880, 650]])
    objects = as_boxes([[110, 310, 410, 705], [520, 285, 890, 660]])
    iou = pairwise_iou(predictions, objects)
    np.testing.assert_allclose(iou, [[0.902, 0], [0, 0.888]], atol=5e-4)


def test_no_boxes_give_empty_matrices():
    none, one = as_boxes([]), as_boxes([[0, 0, 1, 1]])
    assert none.shape == (0, 4)
    assert pairwise_iou(none, one).shape == (0, 1)
    assert pairwise_giou(one, none).shape == (1, 0)
    assert reading_order(none).tolist() == []


def test_area_of_inverted_boxes_is_zero():
    assert area(as_boxes([[0, 0, 2, 3], [2, 0, 0, 3], [0, 3, 2, 0], [2, 3, 0, 0]])).tolist() == [6, 0, 0, 0]


@given(box_lists(smallest_side=0))
def test_corner_and_size_forms_are_inverse(boxes):
    xywh = xyxy_to_xywh(boxes)
    np.testing.assert_allclose(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1), boxes)
    np.testing.assert_allclose(np.prod(xyxy_to_xywh(boxes)[:, 2:], axis=1), area(boxes))


@given(box_lists(smallest_side=0))
def test_reading_order_sorts_by_top_then_left_and_is_stable(boxes):
    order = reading_order(boxes).tolist()
    assert order == sorted(range(len(boxes)), key=lambda i: (boxes[i, 1], boxes[i, 0]))
