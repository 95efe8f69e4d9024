"""One-to-one matching of predictions to annotated objects: pair cost, gate, and assignment.

    cost    lambda_l1 * L1 + lambda_iou * (1 - GIoU) + lambda_sem * distance of the descriptions
    gate    pairs with too low an IoU, or too large an L1 distance, are forbidden
    match   the maximum number of allowed pairs, at the minimum total cost

This is the bipartite matching of DETR (arXiv:2005.12872, section 3.1, eq. 1) with a gate. The gate is applied before
the assignment. Applied afterwards, an object could be assigned to a partner that is then rejected, while a good
prediction of it stays unmatched.

Shapes: N predictions and M annotated objects of an image, P matched pairs; I images, R rows (`pair_rows`: pairs of a
prediction and an object of the same image), C matched rows. Boxes are xyxy in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coordexp.config.schema import MatchingParams
from coordexp.errors import ConfigError
from coordexp.geometry.boxes import Boxes, as_boxes, paired_iou_giou
from coordexp.matching.pair_rows import Ints, PairRows, place_within, starts

# With equal costs (duplicates, symmetric neighbors), the earlier prediction and the earlier object win; the solver's
# own choice among equals is not specified. Order decides only between costs closer than this, a millionth of a bin.
_TIE_BREAK = 1e-9
_ROWS_AT_ONCE = 2**14  # keeps intermediate arrays in the CPU cache


@dataclass(frozen=True, slots=True, eq=False)
class MatchResult:
    """Matched pairs, in ascending order of the prediction index, and the unmatched rest.

    Attributes:
        pairs: (P, 2) indices of prediction and object.
        unmatched_pred: ascending indices of predictions without an object.
        unmatched_gt: ascending indices of objects without a prediction.
        iou_P: IoU of each pair.
        rejected_pred: number of predictions for which the gate allows no object at all.
    """

    pairs: Ints
    unmatched_pred: Ints
    unmatched_gt: Ints
    iou_P: NDArray[np.float64]
    rejected_pred: int


def match(
    pred_boxes_N4: NDArray | list,
    gt_boxes_M4: NDArray | list,
    params: MatchingParams,
    semantic_NM: NDArray[np.floating] | None = None,
) -> MatchResult:
    """Match the maximum number of pairs of one image that the gate allows, at the minimum total cost.

    Args:
        pred_boxes_N4: predicted boxes, in the order of generation; N may be 0.
        gt_boxes_M4: annotated boxes; M may be 0.
        params: cost weights and gate.
        semantic_NM: description distances, required if `params.lambda_sem` is positive.
    """
    return match_images([pred_boxes_N4], [gt_boxes_M4], params, None if semantic_NM is None else [semantic_NM])[0]


def match_images(
    pred_boxes: Sequence[NDArray | list],
    gt_boxes: Sequence[NDArray | list],
    params: MatchingParams,
    semantic: Sequence[NDArray[np.floating]] | None = None,
) -> list[MatchResult]:
    """`match` for many images, much faster than one call per image."""
    pred, gt = [as_boxes(boxes) for boxes in pred_boxes], [as_boxes(boxes) for boxes in gt_boxes]
    results: list[MatchResult] = []
    for part in _parts([len(p) * len(g) for p, g in zip(pred, gt, strict=True)]):
        semantic_R = None
        if semantic is not None:
            semantic_R = np.concatenate([distances.reshape(-1) for distances in semantic[part]])
        results += _match_part(pred[part], gt[part], params, semantic_R)
    return results


def _match_part(
    pred: Sequence[Boxes], gt: Sequence[Boxes], params: MatchingParams, semantic_R: NDArray[np.floating] | None
) -> list[MatchResult]:
    """Cost, gate, assignment and results of several images at once."""
    # Cost and gate are computed for all pairs of all images in one pass; only the assignment is solved per image.
    rows = PairRows.of([len(boxes) for boxes in pred], [len(boxes) for boxes in gt])
    between = Pairs.of(np.concatenate(pred)[rows.pred_R], np.concatenate(gt)[rows.gt_R])
    allowed_R = gate_mask(between, params)
    cost_R = pair_cost(between, params, semantic_R) + _TIE_BREAK * rows.lateness_R()
    chosen_C = _assign(rows, cost_R, allowed_R)
    return _results(rows, allowed_R, chosen_C, between.iou_R[chosen_C])


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """The geometric terms of cost and gate, each of shape (R,)."""

    l1_R: NDArray[np.float64]
    iou_R: NDArray[np.float64]
    giou_R: NDArray[np.float64]

    @classmethod
    def of(cls, pred_boxes_R4: Boxes, gt_boxes_R4: Boxes) -> Pairs:
        """Compare each prediction with its object, xyxy in [0, 1]."""
        return cls(paired_l1(pred_boxes_R4, gt_boxes_R4), *paired_iou_giou(pred_boxes_R4, gt_boxes_R4))


def pair_cost(
    pairs: Pairs, params: MatchingParams, semantic_R: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Cost of each pair (R,): `lambda_l1 * L1 + lambda_iou * (1 - GIoU) + lambda_sem * semantic`, never negative.

    `semantic_R` holds description distances, >= 0.

    Raises:
        ConfigError: if `lambda_sem` is positive and no distances are given.
    """
    cost_R = params.lambda_l1 * pairs.l1_R
    cost_R += params.lambda_iou * (1.0 - pairs.giou_R)
    if params.lambda_sem > 0:
        if semantic_R is None:
            raise ConfigError(
                f"matching.lambda_sem is {params.lambda_sem}, but this matching has no description distances; set it "
                "to 0, or pass the distances (text.meaning.name_distance)."
            )
        assert semantic_R.shape == cost_R.shape, (semantic_R.shape, cost_R.shape)
        cost_R += params.lambda_sem * semantic_R
    return cost_R


def gate_mask(pairs: Pairs, params: MatchingParams) -> NDArray[np.bool_]:
    """True where a pair may be matched, shape (R,); a value equal to the threshold passes."""
    if params.gate == "iou":
        return pairs.iou_R >= params.gate_threshold
    return pairs.l1_R <= params.gate_threshold


def _assign(rows: PairRows, cost_R: NDArray[np.float64], allowed_R: NDArray[np.bool_]) -> Ints:
    """Rows of the assignment with the most allowed pairs and, among those, the minimum cost, image by image.

    The images are ragged (N x M differs), so each is a block of consecutive rows that is reshaped for the solver:
    scipy's modified Jonker-Volgenant algorithm (Crouse 2016, doi:10.1109/TAES.2016.140952), exact in O(n^3).
    """
    # `reduceat` needs non-empty pieces, so images without an allowed pair are left out of everything below.
    start = starts(rows.n_rows_I)
    n_allowed_I = np.diff(starts(allowed_R.astype(np.int64))[start]).astype(np.int64)
    some = np.flatnonzero(n_allowed_I)
    if not len(some):
        return np.empty(0, np.int64)
    allowed_costs, first_allowed = cost_R[allowed_R], starts(n_allowed_I[some])[:-1]
    low, high = (extreme.reduceat(allowed_costs, first_allowed) for extreme in (np.minimum, np.maximum))
    # The solver always assigns min(N, M) pairs, so forbidden pairs get a finite cost and are removed afterwards. One
    # forbidden pair must cost more than any rearrangement of allowed pairs can save: then the number of allowed pairs
    # is maximal. This is the smallest such bound; with a huge constant, the solver's float64 sums would lose the costs.
    forbidden_I = np.zeros(len(n_allowed_I))
    forbidden_I[some] = 1.0 + high + np.minimum(rows.n_pred_I, rows.n_gt_I)[some] * (high - low)
    solved_R = np.where(allowed_R, cost_R, np.repeat(forbidden_I, rows.n_rows_I))
    chosen = []
    for begin, end, width in zip(
        start[some].tolist(), start[some + 1].tolist(), rows.n_gt_I[some].tolist(), strict=True
    ):
        pred_index, gt_index = linear_sum_assignment(solved_R[begin:end].reshape(-1, width))
        chosen.append(begin + pred_index * width + gt_index)
    # The solver also returns forbidden pairs if it has no better partner for a row: drop them.
    chosen_C = np.concatenate(chosen)
    return chosen_C[allowed_R[chosen_C]]


def paired_l1(pred_boxes_R4: Boxes, gt_boxes_R4: Boxes) -> NDArray[np.float64]:
    """Mean absolute difference of the four corner coordinates, shape (R,), in [0, 1] for boxes in [0, 1]."""
    return np.abs(pred_boxes_R4 - gt_boxes_R4).sum(axis=-1) / 4


def _parts(n_rows_I: Sequence[int]) -> Iterator[slice]:
    """Split images into consecutive parts of at most _ROWS_AT_ONCE rows, but at least one image each."""
    first, rows = 0, 0
    for i, n_rows in enumerate(n_rows_I):
        if i > first and rows + n_rows > _ROWS_AT_ONCE:
            yield slice(first, i)
            first, rows = i, 0
        rows += n_rows
    if n_rows_I:
        yield slice(first, len(n_rows_I))


def _results(
    rows: PairRows, allowed_R: NDArray[np.bool_], chosen_C: Ints, iou_C: NDArray[np.float64]
) -> list[MatchResult]:
    """Split the results of all images into one per image, with indices counted within the image."""
    n_pred_I, n_gt_I = rows.n_pred_I, rows.n_gt_I
    place_P, place_G = place_within(n_pred_I), place_within(n_gt_I)
    image_P = np.repeat(np.arange(len(n_pred_I)), n_pred_I)
    taken_P, taken_G = rows.pred_R[chosen_C], rows.gt_R[chosen_C]
    pairs_C2 = np.stack([place_P[taken_P], place_G[taken_G]], axis=1)
    n_pairs_I = np.bincount(image_P[taken_P], minlength=len(n_pred_I))
    is_left_P, is_left_G = np.ones(len(place_P), bool), np.ones(len(place_G), bool)
    is_left_P[taken_P] = is_left_G[taken_G] = False
    is_near_P = np.zeros(len(place_P), bool)
    is_near_P[rows.pred_R[allowed_R]] = True
    return [
        MatchResult(*parts)
        for parts in zip(
            _cut(pairs_C2, n_pairs_I),
            _cut(place_P[is_left_P], n_pred_I - n_pairs_I),
            _cut(place_G[is_left_G], n_gt_I - n_pairs_I),
            _cut(iou_C, n_pairs_I),
            (n_pred_I - np.bincount(image_P[is_near_P], minlength=len(n_pred_I))).tolist(),
            strict=True,
        )
    ]


def _cut(values: NDArray, counts: Ints) -> Iterator[NDArray]:
    """Split values into consecutive pieces of these lengths."""
    return (values[begin:end] for begin, end in pairwise(starts(counts).tolist()))
