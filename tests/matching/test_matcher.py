"""The matcher: cost and gate by hand, description distance, edge cases, ties, and the optimum by brute force."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from coordexp.errors import ConfigError
from coordexp.geometry.boxes import pairwise_iou
from coordexp.matching import matcher
from coordexp.matching.matcher import Pairs, gate_mask, match, match_images, pair_cost, paired_l1
from coordexp.text.meaning import name_distance
from helpers import PARAMS, changed

LEFT = np.array([[0.0, 0.0, 0.4, 0.4]])
OVERLAPPING = np.array([[0.2, 0.0, 0.6, 0.4]])  # intersection .08, union .24, hull .24
APART = np.array([[0.6, 0.0, 1.0, 0.4]])  # hull .40, union .32
CAT, DOG = [0.110, 0.310, 0.410, 0.705], [0.520, 0.285, 0.890, 0.660]
BOX = [0.2, 0.2, 0.6, 0.6]
FAR = [0.8, 0.8, 0.9, 0.9]


def matching(**changes):
    return changed(PARAMS.matching, **changes)


MATCHING = matching(lambda_l1=1.0, lambda_iou=1.0, lambda_sem=0.0, gate="iou", gate_threshold=0.3)


def test_l1_is_the_mean_over_four_corner_coordinates():
    assert paired_l1(LEFT, OVERLAPPING) == pytest.approx(np.array([0.1]))
    assert paired_l1(np.zeros((1, 4)), np.ones((1, 4))) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"lambda_l1": 1.0, "lambda_iou": 0.0}, [[0.1, 0.3]]),
        ({"lambda_l1": 0.0, "lambda_iou": 1.0}, [[1 - 1 / 3, 1 + 0.08 / 0.4]]),
        ({"lambda_l1": 2.0, "lambda_iou": 3.0}, [[0.2 + 2.0, 0.6 + 3.6]]),
        ({"lambda_l1": 1.0, "lambda_iou": 0.0, "lambda_sem": 0.5}, [[0.1 + 0.5 * 0.2, 0.3 + 0.5 * 0.8]]),
    ],
)
def test_cost_by_hand(weights, expected):
    semantic = np.array([[0.2, 0.8]])
    cost = pair_cost(Pairs.of(LEFT[:, None], np.concatenate([OVERLAPPING, APART])), matching(**weights), semantic)
    assert cost == pytest.approx(np.array(expected))


def test_semantic_weight_without_distances_is_refused():
    with pytest.raises(ConfigError, match=r"matching\.lambda_sem is 0\.5"):
        pair_cost(Pairs.of(LEFT, APART), matching(lambda_sem=0.5))


@pytest.mark.parametrize(
    ("gate", "threshold", "accepted"),
    [
        ("iou", 1 / 3 - 1e-9, [True, False]),
        ("iou", 1 / 3 + 1e-9, [False, False]),
        ("iou", 0.0, [True, True]),
        ("l1", 0.2, [True, False]),
        ("l1", 0.05, [False, False]),
        ("l1", 0.5, [True, True]),
    ],
)
def test_gate(gate, threshold, accepted):
    pairs = Pairs.of(LEFT[:, None], np.concatenate([OVERLAPPING, APART]))
    mask = gate_mask(pairs, matching(gate=gate, gate_threshold=threshold))
    assert mask.tolist() == [accepted]


def test_a_value_equal_to_the_threshold_passes():
    half = np.array([[0.0, 0.0, 0.25, 0.5]])
    whole = np.array([[0.0, 0.0, 0.5, 0.5]])
    assert gate_mask(Pairs.of(half, whole), matching(gate="iou", gate_threshold=0.5)).all()
    assert gate_mask(Pairs.of(half, whole), matching(gate="l1", gate_threshold=0.0625)).all()


@pytest.mark.parametrize(("lambda_sem", "pairs"), [(0.0, [[0, 0], [1, 1]]), (0.1, [[0, 1], [1, 0]])])
def test_names_decide_between_equal_boxes(lambda_sem, pairs):
    distances = name_distance(["dog", "cat"], ["cat", "dog"], "lexical")
    assert match([BOX, BOX], [BOX, BOX], matching(lambda_sem=lambda_sem), distances).pairs.tolist() == pairs


def shifted(box, dx):
    return [box[0] + dx, box[1], box[2] + dx, box[3]]


def random_boxes(rng, count):
    corners = rng.uniform(0, 0.7, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(0.1, 0.3, (count, 2))], axis=1)


def check_partition(result, n_pred, n_gt):
    """Every index appears exactly once, matched or not."""
    assert sorted([*result.pairs[:, 0], *result.unmatched_pred]) == list(range(n_pred))
    assert sorted([*result.pairs[:, 1], *result.unmatched_gt]) == list(range(n_gt))
    assert len(result.iou_P) == len(result.pairs)


def test_worked_example_cat_and_dog():
    predictions = [[0.120, 0.300, 0.420, 0.700], [0.500, 0.280, 0.880, 0.650]]
    result = match(predictions, [CAT, DOG], MATCHING)
    assert result.pairs.tolist() == [[0, 0], [1, 1]]
    assert result.iou_P == pytest.approx([0.902, 0.888], abs=5e-4)
    assert pairwise_iou(np.array(predictions), np.array([CAT, DOG]))[[0, 1], [1, 0]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("n_pred", "n_gt"), [(0, 0), (0, 3), (3, 0)])
def test_an_empty_side(n_pred, n_gt):
    result = match([CAT] * n_pred, [CAT] * n_gt, MATCHING)
    check_partition(result, n_pred, n_gt)
    assert result.pairs.shape == (0, 2)
    assert result.rejected_pred == n_pred


def test_all_gated_out():
    result = match([BOX, DOG], [FAR], MATCHING)
    check_partition(result, 2, 1)
    assert len(result.pairs) == 0
    assert result.rejected_pred == 2


def test_rejected_counts_predictions_not_pairs():
    result = match([BOX, FAR, shifted(BOX, 0.01)], [BOX], MATCHING)
    assert result.rejected_pred == 1
    assert result.unmatched_pred.tolist() == [1, 2]


@pytest.mark.parametrize("n_duplicates", [2, 5])
def test_the_first_of_duplicate_predictions_is_matched(n_duplicates):
    result = match([FAR, *[BOX] * n_duplicates], [BOX], MATCHING)
    assert result.pairs.tolist() == [[1, 0]]


@pytest.mark.parametrize("n_gt", [2, 3, 6])
def test_identical_objects_are_paired_in_order(n_gt):
    result = match([BOX, BOX], [BOX] * n_gt, MATCHING)
    assert result.pairs.tolist() == [[0, 0], [1, 1]]
    assert result.unmatched_gt.tolist() == list(range(2, n_gt))


@pytest.mark.parametrize("step", [0.01, -0.01, 0.02, -0.02, 0.05, -0.05])
def test_a_symmetric_tie_goes_to_the_earlier_box(step):
    # The left and right neighbors cost the same up to rounding errors, which must not decide.
    neighbours = [shifted(BOX, step), shifted(BOX, -step)]
    assert match(neighbours, [BOX], MATCHING).pairs.tolist() == [[0, 0]]
    assert match([BOX], neighbours, MATCHING).pairs.tolist() == [[0, 0]]


def test_a_real_difference_beats_the_order():
    closer = shifted(BOX, 1e-6)  # a thousandth of a bin from the object
    assert match([shifted(BOX, 2e-6), closer], [BOX], MATCHING).pairs.tolist() == [[1, 0]]
    assert match([BOX], [shifted(BOX, 2e-6), closer], MATCHING).pairs.tolist() == [[0, 1]]


def test_gating_before_differs_from_gating_after():
    # IoU is [[.95, .60], [.57, .29]]: the cheapest assignment is the diagonal, whose second pair the gate then
    # refuses. Gated first, both predictions find an object.
    predictions = [[0.20, 0.2, 0.60, 0.6], [0.08, 0.2, 0.48, 0.6]]
    objects = [[0.19, 0.2, 0.59, 0.6], [0.30, 0.2, 0.70, 0.6]]
    ious = pairwise_iou(np.array(predictions), np.array(objects))
    params = matching(gate_threshold=0.5, lambda_l1=0.0)
    cost = pair_cost(Pairs.of(np.array(predictions)[:, None], np.array(objects)), params)
    rows, columns = linear_sum_assignment(cost)
    gated_after = int((ious[rows, columns] >= 0.5).sum())
    result = match(predictions, objects, params)
    assert gated_after == 1
    assert result.pairs.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("seed", range(10))
def test_permutation_invariance(seed):
    rng = np.random.default_rng(seed)
    objects = random_boxes(rng, 9)
    predictions = np.concatenate([objects[:6] + rng.normal(0, 0.02, (6, 4)), random_boxes(rng, 4)])
    pred_order, gt_order = rng.permutation(len(predictions)), rng.permutation(len(objects))
    straight = match(predictions, objects, MATCHING)
    permuted = match(predictions[pred_order], objects[gt_order], MATCHING)
    back = {(pred_order[i], gt_order[j]) for i, j in permuted.pairs}
    assert back == {(i, j) for i, j in straight.pairs}
    assert permuted.rejected_pred == straight.rejected_pred


def best_by_enumeration(cost, allowed):
    """(size, total cost) of the cheapest among the largest sets of allowed pairs."""
    n_pred, n_gt = cost.shape
    for size in range(min(n_pred, n_gt), 0, -1):
        totals = [
            cost[list(rows), list(columns)].sum()
            for rows in combinations(range(n_pred), size)
            for columns in permutations(range(n_gt), size)
            if allowed[list(rows), list(columns)].all()
        ]
        if totals:
            return size, min(totals)
    return 0, 0.0


@pytest.mark.parametrize("gate", ["iou", "l1"])
@pytest.mark.parametrize("seed", range(15))
def test_optimum_by_brute_force(seed, gate):
    rng = np.random.default_rng(seed)
    n_pred, n_gt = rng.integers(1, 6, 2)
    predictions, objects = random_boxes(rng, n_pred), random_boxes(rng, n_gt)
    params = matching(lambda_l1=2.0, lambda_sem=0.5, gate=gate, gate_threshold=0.1)
    semantic = rng.uniform(0, 1, (n_pred, n_gt))
    cost = pair_cost(Pairs.of(predictions[:, None], objects), params, semantic)
    allowed = gate_mask(Pairs.of(predictions[:, None], objects), params)
    result = match(predictions, objects, params, semantic)
    check_partition(result, n_pred, n_gt)
    rows, columns = result.pairs.T
    assert allowed[rows, columns].all()
    size, total = best_by_enumeration(cost, allowed)
    assert len(result.pairs) == size
    assert cost[rows, columns].sum() == pytest.approx(total, abs=1e-7)


@pytest.mark.parametrize("gate", ["iou", "l1"])
@pytest.mark.parametrize("rows_at_once", [1, 30, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_many_images_are_matched_as_each_alone(monkeypatch, seed, rows_at_once, gate):
    """Empty sides, images without an allowed pair, and images of very different sizes, in parts of any size."""
    monkeypatch.setattr(matcher, "_ROWS_AT_ONCE", rows_at_once)
    rng = np.random.default_rng(seed)
    sizes = [*rng.integers(0, 9, (12, 2)).tolist(), [0, 0], [40, 30], [0, 5], [5, 0]]
    predictions = [random_boxes(rng, n_pred) for n_pred, _ in sizes] + [np.array([BOX])]
    objects = [random_boxes(rng, n_gt) for _, n_gt in sizes] + [np.array([FAR])]
    distances = [rng.uniform(0, 1, (len(p), len(g))) for p, g in zip(predictions, objects, strict=True)]
    params = matching(lambda_sem=0.5, gate=gate, gate_threshold=0.15)
    together = match_images(predictions, objects, params, distances)
    assert len(together) == len(predictions)
    for result, *image in zip(together, predictions, objects, distances, strict=True):
        alone = match(image[0], image[1], params, image[2])
        check_partition(result, len(image[0]), len(image[1]))
        for name in ("pairs", "unmatched_pred", "unmatched_gt", "iou_P"):
            np.testing.assert_array_equal(getattr(result, name), getattr(alone, name))
        assert result.rejected_pred == alone.rejected_pred


def test_no_images():
    assert match_images([], [], MATCHING) == []
