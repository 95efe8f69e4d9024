"""The cost of pairing a prediction with an object, and the gate that forbids pairs.

Shapes: R pairs of a prediction and an object. Boxes are xyxy in [0, 1]. Leading axes of any number broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.errors import ConfigError
from coordexp.geometry.boxes import Boxes, paired_iou_giou
from coordexp.matching.settings import MatchSettings


def paired_l1(pred_boxes_R4: Boxes, gt_boxes_R4: Boxes) -> NDArray[np.float64]:
    """Mean absolute difference of the four corner coordinates, shape (R,), in [0, 1] for boxes in [0, 1]."""
    return np.abs(pred_boxes_R4 - gt_boxes_R4).sum(axis=-1) / 4


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """How predictions lie to objects, each of shape (R,): what cost and gate are made of."""

    l1_R: NDArray[np.float64]
    iou_R: NDArray[np.float64]
    giou_R: NDArray[np.float64]

    @classmethod
    def of(cls, pred_boxes_R4: Boxes, gt_boxes_R4: Boxes) -> Pairs:
        """Compare each prediction with its object, xyxy in [0, 1]."""
        return cls(paired_l1(pred_boxes_R4, gt_boxes_R4), *paired_iou_giou(pred_boxes_R4, gt_boxes_R4))


def pair_cost(
    pairs: Pairs, settings: MatchSettings, semantic_R: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Cost of each pair (R,): `lambda_l1 * L1 + lambda_iou * (1 - GIoU) + lambda_sem * semantic`, never negative.

    `semantic_R` holds description distances, >= 0.

    Raises:
        ConfigError: if `lambda_sem` is positive and no distances are given.
    """
    cost_R = settings.lambda_l1 * pairs.l1_R
    cost_R += settings.lambda_iou * (1.0 - pairs.giou_R)
    if settings.lambda_sem > 0:
        if semantic_R is None:
            raise ConfigError(
                f"matching.lambda_sem is {settings.lambda_sem}, but this matching computes no description distances; "
                "set it to 0, or match where names are at hand (matching/names.py)."
            )
        assert semantic_R.shape == cost_R.shape, (semantic_R.shape, cost_R.shape)
        cost_R += settings.lambda_sem * semantic_R
    return cost_R


def gate_mask(pairs: Pairs, settings: MatchSettings) -> NDArray[np.bool_]:
    """True where a pair may be matched, shape (R,). The threshold itself passes."""
    if settings.gate == "iou":
        return pairs.iou_R >= settings.gate_threshold
    return pairs.l1_R <= settings.gate_threshold
