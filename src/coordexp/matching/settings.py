"""What the matching is told: the weights of the pair cost, and the gate."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from coordexp.errors import ConfigError, closest

Gate = Literal["iou", "l1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchSettings:
    """Weights of the pair cost and the condition that a pair must meet. Boxes are xyxy in [0, 1].

    Attributes:
        lambda_l1: weight of the mean absolute corner difference, in [0, 1].
        lambda_iou: weight of 1 - GIoU, in [0, 2].
        lambda_sem: weight of the description distance that the caller gives; 0 needs none.
        gate: "iou" accepts pairs of IoU >= gate_threshold, "l1" those of mean corner difference <= gate_threshold.
        gate_threshold: in [0, 1].

    Raises:
        ConfigError: if a value is of the wrong type or out of range, or all three weights are 0.
    """

    lambda_l1: float = 1.0
    lambda_iou: float = 1.0
    lambda_sem: float = 0.0
    gate: Gate = "iou"
    gate_threshold: float = 0.3

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name != "gate"):
            _require_number(f"matching.{name}", getattr(self, name))
        if self.gate not in get_args(Gate):
            hint = closest(str(self.gate), get_args(Gate))
            raise ConfigError(f"matching.gate is {self.gate!r}, expected one of {list(get_args(Gate))}.{hint}")
        if self.gate_threshold > 1:
            raise ConfigError(f"matching.gate_threshold is {self.gate_threshold}, expected a number in [0, 1].")
        if self.lambda_l1 == self.lambda_iou == self.lambda_sem == 0:
            raise ConfigError(
                "matching.lambda_l1, matching.lambda_iou and matching.lambda_sem are all 0, so that every pair costs "
                "the same; expected at least one positive weight."
            )


def _require_number(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{key} is {value!r}, expected a finite number of at least 0.")
