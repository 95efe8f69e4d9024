"""One-to-one assignment of predictions to annotated objects, gated before it is solved.

Shapes: N predictions, M annotated objects, P matched pairs. Boxes are xyxy in [0, 1].

Gating before the assignment matters: gated afterwards, an object can be spent on a partner that is then refused, while
a good prediction of it goes unmatched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coordexp.geometry.boxes import as_boxes
from coordexp.matching.cost import Pairs, gate_mask, pair_cost
from coordexp.matching.settings import MatchSettings

# Equal costs (duplicates, symmetric neighbours) go to the earlier prediction and the earlier object. Order decides only
# between costs closer than this, a millionth of a bin.
_TIE_BREAK = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class MatchResult:
    """Matched pairs, rising in the prediction index, and what is left over.

    Attributes:
        pairs: (P, 2) indices of prediction and object.
        unmatched_pred: rising indices of predictions without an object.
        unmatched_gt: rising indices of objects without a prediction.
        iou_P: IoU of each pair.
        rejected_pred: number of predictions that the gate lets near no object at all.
    """

    pairs: NDArray[np.int64]
    unmatched_pred: NDArray[np.int64]
    unmatched_gt: NDArray[np.int64]
    iou_P: NDArray[np.float64]
    rejected_pred: int


def match(
    pred_boxes_N4: NDArray | list,
    gt_boxes_M4: NDArray | list,
    settings: MatchSettings,
    semantic_NM: NDArray[np.floating] | None = None,
) -> MatchResult:
    """Match as many pairs as the gate allows, at the least total cost.

    Args:
        pred_boxes_N4: predicted boxes, in the order of generation; N may be 0.
        gt_boxes_M4: annotated boxes; M may be 0.
        settings: cost weights and gate.
        semantic_NM: description distances, needed if `settings.lambda_sem` is positive.
    """
    pred, gt = as_boxes(pred_boxes_N4), as_boxes(gt_boxes_M4)
    between = Pairs.of(pred, gt)
    allowed_NM = gate_mask(between, settings)
    pairs = _solve(pair_cost(between, settings, semantic_NM), allowed_NM)
    return MatchResult(
        pairs=pairs,
        unmatched_pred=_others(pairs[:, 0], len(pred)),
        unmatched_gt=_others(pairs[:, 1], len(gt)),
        iou_P=between.iou_NM[pairs[:, 0], pairs[:, 1]],
        rejected_pred=len(pred) - int(np.count_nonzero(allowed_NM.any(axis=1))),
    )


def _others(taken: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The indices below n that are not taken, rising."""
    is_left = np.ones(n, bool)
    is_left[taken] = False
    return np.flatnonzero(is_left)


def _solve(cost_NM: NDArray[np.float64], allowed_NM: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Allowed pairs (P, 2) of the cheapest among the largest assignments."""
    if not allowed_NM.any():
        return np.empty((0, 2), dtype=np.int64)
    cost_NM = cost_NM + _TIE_BREAK * _lateness(*cost_NM.shape)
    allowed_costs = cost_NM[allowed_NM]
    low, high = allowed_costs.min(), allowed_costs.max()
    # One forbidden pair costs more than any rearrangement of allowed ones can save. A bound, not a huge constant, so
    # that the solver keeps its precision.
    forbidden = 1.0 + high + min(cost_NM.shape) * (high - low)
    rows, columns = linear_sum_assignment(np.where(allowed_NM, cost_NM, forbidden))
    keep = allowed_NM[rows, columns]
    return np.stack([rows[keep], columns[keep]], axis=1).astype(np.int64)


def _lateness(n_pred: int, n_gt: int) -> NDArray[np.float64]:
    """Matrix in [0, 1) that rises with both indices and is cheapest when equals are paired in order."""
    earliness_N = np.arange(n_pred, 0, -1) / n_pred
    earliness_M = np.arange(n_gt, 0, -1) / n_gt
    return 1.0 - earliness_N[:, None] * earliness_M[None, :]
