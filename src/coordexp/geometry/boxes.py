"""Box arithmetic in numpy. Boxes are xyxy, in any frame (pixels, [0, 1] or bins), but one frame per call.

Shapes: N, M boxes, R pairs of boxes; the last axis is always (x1, y1, x2, y2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]
Boxes = NDArray[np.float64]  # (N, 4)


def as_boxes(boxes: NDArray | list) -> Boxes:
    """Return boxes as a float64 array of shape (N, 4), also for an empty list."""
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def area(boxes_N4: Boxes) -> NDArray[np.float64]:
    """Area of each box; a box with x2 < x1 or y2 < y1 has area 0."""
    return _area_of_sides(boxes_N4[..., 2:] - boxes_N4[..., :2])


def pairwise_intersection(a_N4: Boxes, b_M4: Boxes) -> NDArray[np.float64]:
    """Intersection areas, shape (N, M)."""
    return _paired_intersection(a_N4[:, None], b_M4[None])


def pairwise_iou(a_N4: Boxes, b_M4: Boxes) -> NDArray[np.float64]:
    """IoU matrix, shape (N, M); 0 where the union is empty."""
    return paired_iou(a_N4[:, None], b_M4[None])


def paired_iou(a_R4: Boxes, b_R4: Boxes) -> NDArray[np.float64]:
    """IoU in [0, 1] of each box and its partner, shape (R,); 0 where the union is empty. Leading axes broadcast."""
    return _iou_and_union(a_R4, b_R4)[0]


def paired_iou_giou(a_R4: Boxes, b_R4: Boxes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """IoU and generalized IoU in [-1, 1] (Rezatofighi et al. 2019, arXiv:1902.09630, algorithm 1), as `paired_iou`."""
    iou, union = _iou_and_union(a_R4, b_R4)
    top_left = np.minimum(a_R4[..., :2], b_R4[..., :2])
    bottom_right = np.maximum(a_R4[..., 2:], b_R4[..., 2:])
    hull = _area_of_sides(bottom_right - top_left)
    return iou, iou - np.divide(hull - union, hull, out=np.zeros_like(hull), where=hull > 0)


def _paired_intersection(a_R4: Boxes, b_R4: Boxes) -> NDArray[np.float64]:
    top_left = np.maximum(a_R4[..., :2], b_R4[..., :2])
    bottom_right = np.minimum(a_R4[..., 2:], b_R4[..., 2:])
    return _area_of_sides(bottom_right - top_left)


def _iou_and_union(a_R4: Boxes, b_R4: Boxes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    intersection = _paired_intersection(a_R4, b_R4)
    union = area(a_R4) + area(b_R4) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0), union


def _area_of_sides(sides: NDArray[np.float64]) -> NDArray[np.float64]:
    """Width times height; negative sides count as 0. (For a few boxes, `np.clip` and `np.prod` would dominate.)"""
    positive = np.maximum(sides, 0.0)
    return positive[..., 0] * positive[..., 1]


def reading_order(boxes_N4: Boxes) -> NDArray[np.int64]:
    """Indices that sort boxes from top left by (y1, x1), stable: the order of objects in an answer."""
    return np.lexsort((boxes_N4[:, 0], boxes_N4[:, 1]))


def xyxy_to_xywh(boxes_N4: Boxes) -> Boxes:
    """Corners to (x, y, width, height), the COCO export form."""
    return np.concatenate([boxes_N4[..., :2], boxes_N4[..., 2:] - boxes_N4[..., :2]], axis=-1)
