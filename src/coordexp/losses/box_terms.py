"""Loss terms on boxes decoded from coordinate slots: SmoothL1, L1, GIoU, CIoU, log size.

Boxes are xyxy in [0, 1]. Predicted corners may arrive in any order. They are sorted per axis and clamped to the image,
so a box with swapped corners is valid and keeps its gradient. `_ratio` protects the areas and MIN_SIDE the side
lengths: a box without area has a finite loss and a finite gradient.

B boxes. Computation is in float32 (float64 inputs stay float64).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.geometry.bins import NUM_BINS
from coordexp.losses.terms import at_least_float32, term

MIN_SIDE = 0.1 / NUM_BINS  # a tenth of a bin: the shortest side in logarithms and aspect ratios
MIN_AREA = 1e-12  # far below one square bin (1e-6)
CIOU_EPS = 1e-7


@dataclass(frozen=True, slots=True)
class BoxPairs:
    """B predicted boxes and their ground truth, corners sorted; `smoothl1_beta_bins` as in `smooth_l1`."""

    pred_B4: Tensor
    target_B4: Tensor
    smoothl1_beta_bins: float


def box_pairs(pred_boxes_B4: Tensor, target_boxes_B4: Tensor, smoothl1_beta_bins: float) -> BoxPairs:
    """Pair decoded boxes with annotated ones, xyxy in [0, 1], corners in any order (B may be 0)."""
    pred_B4 = ordered_boxes(at_least_float32(pred_boxes_B4))
    return BoxPairs(pred_B4, ordered_boxes(target_boxes_B4.detach().to(pred_B4)), smoothl1_beta_bins)


def ordered_boxes(boxes_B4: Tensor) -> Tensor:
    """Boxes with x1 <= x2, y1 <= y2, clamped to [0, 1]; NaN stays NaN for the objective to report."""
    first_B2, second_B2 = boxes_B4[:, :2], boxes_B4[:, 2:]
    corners = [torch.minimum(first_B2, second_B2), torch.maximum(first_B2, second_B2)]
    return torch.cat(corners, dim=-1).clamp(0, 1)


@term("bbox_smoothl1", "box")
def smooth_l1(pred_B4: Tensor, target_B4: Tensor, smoothl1_beta_bins: float) -> Tensor:
    """(B,) mean over the 4 coordinates of e^2 / (2 beta) below beta, |e| - beta / 2 above.

    This is the Huber loss of Fast R-CNN (Girshick 2015, arXiv:1504.08083, eq. 3) with beta in bins. In [0, 1] units
    every error is below the customary beta of 1, so the loss would always be e^2 / 2 (5e-5 for 10 bins) and its
    gradient thousands of times weaker than that of CIoU. With a beta of a few bins the gradient reaches its full 1 / 4
    per coordinate as soon as an edge is off by more than beta.
    """
    beta = smoothl1_beta_bins / NUM_BINS
    return F.smooth_l1_loss(pred_B4, target_B4, beta=beta, reduction="none").mean(-1)


@term("bbox_l1", "box")
def l1(pred_B4: Tensor, target_B4: Tensor) -> Tensor:
    """(B,) mean absolute error over the 4 coordinates."""
    return (pred_B4 - target_B4).abs().mean(-1)


@term("bbox_giou", "box")
def giou_loss(pred_B4: Tensor, target_B4: Tensor) -> Tensor:
    """(B,) 1 - GIoU of ordered boxes, in [0, 2]."""
    return 1 - giou(pred_B4, target_B4)


def giou(pred_B4: Tensor, target_B4: Tensor) -> Tensor:
    """(B,) generalised IoU in [-1, 1] of ordered boxes (Rezatofighi et al. 2019, arXiv:1902.09630, algorithm 1)."""
    iou_B, union_B = _iou_and_union(pred_B4, target_B4)
    hull_B = _hull_sides(pred_B4, target_B4).prod(-1)
    return iou_B - _ratio(hull_B - union_B, hull_B)


@term("bbox_ciou", "box")
def ciou_loss(pred_B4: Tensor, target_B4: Tensor) -> Tensor:
    """(B,) 1 - IoU + rho^2 / c^2 + alpha v of ordered boxes (Zheng et al. 2020, arXiv:1911.08287, eqs. 7-11).

    alpha weights the aspect-ratio term and is not optimized: it is detached, as in the paper.
    """
    iou_B, _ = _iou_and_union(pred_B4, target_B4)
    centre_gap_B2 = (pred_B4[:, :2] + pred_B4[:, 2:] - target_B4[:, :2] - target_B4[:, 2:]) / 2
    diagonal_sq_B = _hull_sides(pred_B4, target_B4).square().sum(-1)
    distance_B = _ratio(centre_gap_B2.square().sum(-1), diagonal_sq_B)
    v_B = (4 / math.pi**2) * (_aspect_angle(target_B4) - _aspect_angle(pred_B4)).square()
    alpha_B = (v_B / (1 - iou_B + v_B + CIOU_EPS)).detach()
    return 1 - iou_B + distance_B + alpha_B * v_B


@term("bbox_log_wh", "box")
def log_size_loss(pred_B4: Tensor, target_B4: Tensor) -> Tensor:
    """(B,) SmoothL1 of log width plus SmoothL1 of log height (beta = 1 nat, a factor of e): a scale-free size error."""
    log_B2, target_log_B2 = _sides(pred_B4).log(), _sides(target_B4).log()
    return F.smooth_l1_loss(log_B2, target_log_B2, beta=1.0, reduction="none").sum(-1)


def _iou_and_union(pred_B4: Tensor, target_B4: Tensor) -> tuple[Tensor, Tensor]:
    top_left_B2 = torch.maximum(pred_B4[:, :2], target_B4[:, :2])
    bottom_right_B2 = torch.minimum(pred_B4[:, 2:], target_B4[:, 2:])
    intersection_B = (bottom_right_B2 - top_left_B2).clamp(min=0).prod(-1)
    union_B = _area(pred_B4) + _area(target_B4) - intersection_B
    return _ratio(intersection_B, union_B), union_B


def _area(boxes_B4: Tensor) -> Tensor:
    return (boxes_B4[:, 2:] - boxes_B4[:, :2]).prod(-1)


def _hull_sides(pred_B4: Tensor, target_B4: Tensor) -> Tensor:
    """(B, 2) width and height of the smallest box that encloses both."""
    top_left_B2 = torch.minimum(pred_B4[:, :2], target_B4[:, :2])
    return torch.maximum(pred_B4[:, 2:], target_B4[:, 2:]) - top_left_B2


def _sides(boxes_B4: Tensor) -> Tensor:
    return (boxes_B4[:, 2:] - boxes_B4[:, :2]).clamp(min=MIN_SIDE)


def _aspect_angle(boxes_B4: Tensor) -> Tensor:
    """(B,) atan(width / height)."""
    width_B, height_B = _sides(boxes_B4).unbind(-1)
    return torch.atan2(width_B, height_B)


def _ratio(numerator_B: Tensor, denominator_B: Tensor) -> Tensor:
    """numerator / denominator; 0 with zero gradient where the denominator vanishes.

    The inner `where` keeps 0 / 0 out of the graph: masking the result alone would leave NaN in the gradient.
    """
    empty_B = denominator_B <= MIN_AREA  # False for NaN, so NaN passes through
    safe_B = torch.where(empty_B, torch.ones_like(denominator_B), denominator_B)
    return torch.where(empty_B, torch.zeros_like(numerator_B), numerator_B / safe_B)
