"""The cost of pairing a prediction with an object, and the gate that forbids pairs.

Shapes: N predictions, M annotated objects. Boxes are xyxy in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.errors import ConfigError
from coordexp.geometry.boxes import Boxes, pairwise_iou_giou
from coordexp.matching.settings import MatchSettings


def pairwise_l1(pred_boxes_N4: Boxes, gt_boxes_M4: Boxes) -> NDArray[np.float64]:
    """Mean absolute difference of the four corner coordinates, shape (N, M), in [0, 1] for boxes in [0, 1]."""
    return np.abs(pred_boxes_N4[:, None, :] - gt_boxes_M4[None, :, :]).sum(axis=-1) / 4


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """How every prediction lies to every object, each of shape (N, M): what cost and gate are made of."""

    l1_NM: NDArray[np.float64]
    iou_NM: NDArray[np.float64]
    giou_NM: NDArray[np.float64]

    @classmethod
    def of(cls, pred_boxes_N4: Boxes, gt_boxes_M4: Boxes) -> Pairs:
        """Compare all boxes, xyxy in [0, 1]."""
        return cls(pairwise_l1(pred_boxes_N4, gt_boxes_M4), *pairwise_iou_giou(pred_boxes_N4, gt_boxes_M4))


def pair_cost(
    pairs: Pairs, settings: MatchSettings, semantic_NM: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Cost matrix (N, M): `lambda_l1 * L1 + lambda_iou * (1 - GIoU) + lambda_sem * semantic`, never negative.

    `semantic_NM` holds description distances, >= 0.

    Raises:
        ConfigError: if `lambda_sem` is positive and no distances are given.
    """
    cost_NM = settings.lambda_l1 * pairs.l1_NM
    cost_NM += settings.lambda_iou * (1.0 - pairs.giou_NM)
    if settings.lambda_sem > 0:
        if semantic_NM is None:
            raise ConfigError(
                f"matching.lambda_sem is {settings.lambda_sem}, but this matching computes no description distances; "
                "set it to 0, or match where names are at hand (matching/names.py)."
            )
        assert semantic_NM.shape == cost_NM.shape, (semantic_NM.shape, cost_NM.shape)
        cost_NM += settings.lambda_sem * semantic_NM
    return cost_NM


def gate_mask(pairs: Pairs, settings: MatchSettings) -> NDArray[np.bool_]:
    """True where a pair may be matched, shape (N, M). The threshold itself passes."""
    if settings.gate == "iou":
        return pairs.iou_NM >= settings.gate_threshold
    return pairs.l1_NM <= settings.gate_threshold
