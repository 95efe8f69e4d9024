"""Box terms: independent references, published gradient table, degenerate boxes."""

from __future__ import annotations

import math

import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.losses.box_terms import (
    MIN_SIDE,
    ciou_loss,
    giou,
    log_size_loss,
    ordered_boxes,
    smooth_l1,
)
from coordexp.losses.readout import read_coordinates
from loss_reference import box_sums, terms_of

BOX_TERMS = terms_of("box")

BINS = torch.arange(1000, dtype=torch.float64)


def random_boxes(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return ordered_boxes(torch.rand(n, 4, dtype=torch.float64, generator=generator))


def shapely_iou_and_giou(a: list[float], b: list[float]) -> tuple[float, float]:
    box_a, box_b = shapely.box(*a), shapely.box(*b)
    union = box_a.union(box_b)
    hull = shapely.box(*union.bounds).area
    iou = box_a.intersection(box_b).area / union.area
    return iou, iou - (hull - union.area) / hull


def ciou_by_the_paper(pred: list[float], target: list[float]) -> float:
    """Scalar, step by step: 1 - IoU + rho^2 / c^2 + alpha v (arXiv:1911.08287, eqs. 7-11), overlap by shapely."""
    iou, _ = shapely_iou_and_giou(pred, target)
    (px1, py1, px2, py2), (tx1, ty1, tx2, ty2) = pred, target
    rho_sq = ((px1 + px2) / 2 - (tx1 + tx2) / 2) ** 2 + ((py1 + py2) / 2 - (ty1 + ty2) / 2) ** 2
    c_sq = (max(px2, tx2) - min(px1, tx1)) ** 2 + (max(py2, ty2) - min(py1, ty1)) ** 2
    v = 4 / math.pi**2 * (math.atan((tx2 - tx1) / (ty2 - ty1)) - math.atan((px2 - px1) / (py2 - py1))) ** 2
    alpha = v / ((1 - iou) + v + 1e-7)
    return 1 - iou + rho_sq / c_sq + alpha * v


def test_giou_agrees_with_shapely():
    a_B4, b_B4 = random_boxes(60, 1), random_boxes(60, 2)
    expected = [shapely_iou_and_giou(a, b)[1] for a, b in zip(a_B4.tolist(), b_B4.tolist(), strict=True)]
    assert giou(a_B4, b_B4).tolist() == pytest.approx(expected, abs=1e-12)


def test_ciou_agrees_with_the_paper():
    a_B4, b_B4 = random_boxes(60, 3), random_boxes(60, 4)
    expected = [ciou_by_the_paper(a, b) for a, b in zip(a_B4.tolist(), b_B4.tolist(), strict=True)]
    assert ciou_loss(a_B4, b_B4).tolist() == pytest.approx(expected, abs=1e-12)


def test_box_ious_of_the_worked_example():
    """Cat and dog, ground truth and rollout: IoU .902 and .888; CIoU adds only a small center term."""
    target_B4 = torch.tensor([[110, 310, 410, 705], [520, 285, 890, 660]], dtype=torch.float64) / 1000
    pred_B4 = torch.tensor([[120, 300, 420, 700], [500, 280, 880, 650]], dtype=torch.float64) / 1000
    ious = [shapely_iou_and_giou(a, b)[0] for a, b in zip(pred_B4.tolist(), target_B4.tolist(), strict=True)]
    assert ious == pytest.approx([0.902, 0.888], abs=6e-4)
    assert (1 - ciou_loss(pred_B4, target_B4)).tolist() == pytest.approx(ious, abs=2e-3)


def test_ciou_does_not_differentiate_alpha():
    """The gradient is that of 1 - IoU + rho^2 / c^2 + alpha v with alpha a number, not that of the whole formula."""
    pred, target = [0.1, 0.4, 0.3, 0.9], [0.05, 0.45, 0.75, 0.6]  # wide, predicted tall
    pred_14 = torch.tensor([pred], dtype=torch.float64, requires_grad=True)
    analytic = torch.autograd.grad(ciou_loss(pred_14, torch.tensor([target], dtype=torch.float64)).sum(), pred_14)[0][0]

    def parts(box: list[float]) -> tuple[float, float, float]:
        iou, _ = shapely_iou_and_giou(box, target)
        angle = [math.atan((b[2] - b[0]) / (b[3] - b[1])) for b in (target, box)]
        v = 4 / math.pi**2 * (angle[0] - angle[1]) ** 2
        full = ciou_by_the_paper(box, target)
        alpha = v / (1 - iou + v + 1e-7)
        return full - alpha * v, v, full

    _, v0, _ = parts(pred)
    alpha0 = v0 / (1 - shapely_iou_and_giou(pred, target)[0] + v0 + 1e-7)
    step = 1e-6
    detached, attached = [], []
    for i in range(4):
        up, down = ([*pred[:i], pred[i] + sign * step, *pred[i + 1 :]] for sign in (1, -1))
        (rest_up, v_up, full_up), (rest_down, v_down, full_down) = parts(up), parts(down)
        detached.append((rest_up - rest_down + alpha0 * (v_up - v_down)) / (2 * step))
        attached.append((full_up - full_down) / (2 * step))
    assert analytic.tolist() == pytest.approx(detached, rel=1e-5)
    relative_gap = (torch.tensor(attached) - torch.tensor(detached)).norm() / torch.tensor(attached).norm()
    assert relative_gap > 0.05  # so this test can tell the two apart


@pytest.mark.parametrize("name", [name for name in BOX_TERMS if name != "bbox_ciou"])  # whose alpha is detached
def test_gradients_against_finite_differences(name):
    generator = torch.Generator().manual_seed(9)
    pred_B4, target_B4 = (torch.rand(12, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda boxes: box_sums(boxes, target_B4, 10.0, {name})[name], (pred_B4.requires_grad_(),)
    )


def test_smooth_l1_by_hand():
    """beta 10 bins: an error of 4 bins is quadratic, of 30 bins linear."""
    target_14 = torch.zeros(1, 4, dtype=torch.float64)
    pred_14 = torch.tensor([[0.004, 0.0, 0.03, 0.0]], dtype=torch.float64)
    expected = (0.004**2 / 0.02 + (0.03 - 0.005)) / 4
    assert smooth_l1(pred_14, target_14, smoothl1_beta_bins=10).item() == pytest.approx(expected, rel=1e-12)


def test_l1_and_log_size_by_hand():
    target_14 = torch.tensor([[0.2, 0.2, 0.4, 0.6]], dtype=torch.float64)
    pred_14 = torch.tensor([[0.3, 0.1, 0.7, 0.5]], dtype=torch.float64)  # twice as wide, same height
    terms = box_sums(pred_14, target_14, 10, BOX_TERMS)
    assert terms["bbox_l1"].item() == pytest.approx((0.1 + 0.1 + 0.3 + 0.1) / 4)
    assert terms["bbox_log_wh"].item() == pytest.approx(math.log(2) ** 2 / 2)
    tiny_14 = torch.tensor([[0.2, 0.2, 0.2, 0.6]], dtype=torch.float64)  # no width: counts as MIN_SIDE
    assert log_size_loss(tiny_14, target_14).item() == pytest.approx(math.log(0.2 / MIN_SIDE) - 0.5)


@pytest.mark.parametrize(
    ("side", "offset", "ciou", "ciou_grad", "quadratic", "quadratic_grad", "beta_grad"),
    [
        (16, 1, 0.063, 7.7e-2, 1.3e-7, 1.6e-7, 1.6e-5),
        (16, 5, 0.325, 6.3e-2, 3.1e-6, 8.1e-7, 8.1e-5),
        (64, 5, 0.079, 1.9e-2, 3.1e-6, 8.1e-7, 8.1e-5),
        (256, 20, 0.079, 4.8e-3, 5.0e-5, 3.3e-6, 1.6e-4),
    ],
)
def test_published_gradients_of_one_displaced_edge(side, offset, ciou, ciou_grad, quadratic, quadratic_grad, beta_grad):
    """p Gaussian (sd 3) on all four slots, left edge of a square moved inward; norms over the four slices."""
    target_4 = torch.tensor([500, 500, 500 + side, 500 + side], dtype=torch.float64)
    centre_4 = target_4 + torch.tensor([offset, 0, 0, 0])
    logits_4K = (-0.5 * ((BINS - centre_4[:, None]) / 3) ** 2).requires_grad_()
    pred_14 = read_coordinates("expectation", logits_4K, 1.0, 16)[None]

    def loss_and_norm(name: str, beta_bins: float, target_bins_4: torch.Tensor) -> tuple[float, float]:
        loss = box_sums(pred_14, target_bins_4[None] / 1000, beta_bins, {name})[name]
        return loss.item(), torch.autograd.grad(loss, logits_4K, retain_graph=True)[0].norm().item()

    loss, norm = loss_and_norm("bbox_smoothl1", 1000, target_4)
    assert (loss, norm) == pytest.approx((quadratic, quadratic_grad), rel=0.05)
    assert loss_and_norm("bbox_smoothl1", 10, target_4)[1] == pytest.approx(beta_grad, rel=0.02)
    # Three edges coincide with the target, where IoU has a kink: the published norm lies between its one-sided limits.
    outward_4 = 1e-6 * torch.tensor([-1, -1, 1, 1], dtype=torch.float64)
    sides = [loss_and_norm("bbox_ciou", 10, target_4 + sign * outward_4) for sign in (1, -1)]
    assert [value for value, _ in sides] == pytest.approx([ciou, ciou], abs=6e-4)
    assert min(n for _, n in sides) * 0.99 <= ciou_grad <= max(n for _, n in sides) * 1.01


coordinate = st.floats(min_value=0, max_value=1, width=32)
any_box = st.tuples(*[st.one_of(coordinate, st.sampled_from([0.0, 0.25, 0.5, 1.0]))] * 4)


@settings(deadline=None)
@given(pred=any_box, target=any_box)
def test_any_pair_of_boxes_has_finite_losses_and_gradients(pred, target):
    """Swapped corners, lines, points, identical boxes, disjoint boxes."""
    pred_14 = torch.tensor([pred], requires_grad=True)
    terms = box_sums(pred_14, torch.tensor([target]), 10, BOX_TERMS)
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(term) and term >= -1e-6 for term in terms.values())
    assert torch.isfinite(pred_14.grad).all()


@pytest.mark.parametrize(
    ("pred", "target", "giou_loss"),
    [
        ([0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.8, 0.8], 1),  # point inside: IoU 0, hull full
        ([0.5, 0.2, 0.5, 0.8], [0.2, 0.2, 0.8, 0.8], 1),  # line inside
        ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], 1),  # no union, no hull
        ([0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.9, 0.9], 2),  # two points: all hull, no union
    ],
)
def test_degenerate_boxes_by_hand(pred, target, giou_loss):
    pred_14 = torch.tensor([pred], requires_grad=True)
    terms = box_sums(pred_14, torch.tensor([target]), 10, BOX_TERMS)
    torch.stack(list(terms.values())).sum().backward()
    assert terms["bbox_giou"].item() == pytest.approx(giou_loss, abs=1e-6)
    assert torch.isfinite(pred_14.grad).all()


def test_swapped_corners_give_the_same_loss_and_gradient():
    target_14 = torch.tensor([[0.2, 0.3, 0.6, 0.9]], dtype=torch.float64)
    straight_14 = torch.tensor([[0.1, 0.35, 0.5, 0.8]], dtype=torch.float64, requires_grad=True)
    swapped_14 = torch.tensor([[0.5, 0.8, 0.1, 0.35]], dtype=torch.float64, requires_grad=True)
    for name in BOX_TERMS:
        loss, swapped_loss = (box_sums(box, target_14, 10, {name})[name] for box in (straight_14, swapped_14))
        grad, swapped_grad = torch.autograd.grad(loss, straight_14)[0], torch.autograd.grad(swapped_loss, swapped_14)[0]
        assert loss.item() == pytest.approx(swapped_loss.item(), rel=1e-12)
        torch.testing.assert_close(grad[0, [2, 3, 0, 1]], swapped_grad[0], rtol=1e-12, atol=1e-12)


def test_a_perfect_box_has_zero_loss():
    boxes_B4 = random_boxes(8, 5)
    for name, term in box_sums(boxes_B4, boxes_B4, 10, BOX_TERMS).items():
        assert term.item() == pytest.approx(0, abs=1e-12), name


def test_batch_equals_singles_and_no_boxes():
    pred_B4, target_B4 = random_boxes(5, 6), random_boxes(5, 7)
    for name, total in box_sums(pred_B4, target_B4).items():
        singles = [box_sums(pred_B4[i : i + 1], target_B4[i : i + 1], 10, {name})[name].item() for i in range(5)]
        assert total.item() == pytest.approx(sum(singles), rel=1e-12)
    empty_04 = torch.zeros(0, 4, requires_grad=True)
    empty = torch.stack(list(box_sums(empty_04, torch.zeros(0, 4)).values()))
    empty.sum().backward()
    assert not empty.any()
    assert empty_04.grad.shape == (0, 4)


def test_nan_propagates_to_the_loss():
    pred_14 = torch.tensor([[0.1, torch.nan, 0.5, 0.6]])
    terms = box_sums(pred_14, torch.tensor([[0.1, 0.2, 0.5, 0.6]]), 10, BOX_TERMS)
    assert all(torch.isnan(term) for term in terms.values())
