"""What the evaluator may be told; every number in a report is taken under one of these values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from coordexp.errors import ConfigError
from coordexp.matching.settings import MatchSettings

# pycocotools' own construction: np.arange would put some thresholds slightly above their name.
COCO_IOUS = np.linspace(0.5, 0.95, 10)
RECALL_GRID = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100  # per image and category, highest score first


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """Settings of one evaluation.

    `area_edges_px2` are the object areas that part small from medium and medium from large (COCO: 32^2 and 96^2).
    `coco_backend` "auto" takes pycocotools, the number of record, up to 50,000 predictions and the identical but
    faster faster-coco-eval beyond. `matching` is the training-time Hungarian matching of the `rollout` area.

    `mapping` says how far a description may be from the category it names: its exact name, its normalised name, or (by
    a frozen text encoder) the category nearest in meaning, if their cosine reaches `semantic_floor` and leads that of
    the runner-up by `semantic_margin`.
    """

    bootstrap_resamples: int = 1000
    f1_ious: tuple[float, ...] = (0.3, 0.5, 0.75, 0.95)
    duplicate_ious: tuple[float, ...] = (0.9, 0.95)
    area_edges_px2: tuple[float, float] = (32.0**2, 96.0**2)
    coco_backend: Literal["auto", "pycocotools", "faster-coco-eval"] = "auto"
    calibration_bins: int = 10
    mapping: Literal["exact", "normalised", "semantic"] = "normalised"
    semantic_floor: float = 0.5
    semantic_margin: float = 0.05
    matching: MatchSettings = field(default_factory=MatchSettings)
    seed: int = 17

    def __post_init__(self) -> None:
        for name in ("f1_ious", "duplicate_ious"):
            ious = getattr(self, name)
            if not ious or not all(0 < u <= 1 for u in ious) or len({iou_key(u) for u in ious}) < len(ious):
                raise ConfigError(
                    f"eval.{name} is {ious!r}, expected thresholds in (0, 1] that differ by at least 0.01."
                )
        for name in ("bootstrap_resamples", "calibration_bins"):
            if getattr(self, name) < 1:
                raise ConfigError(f"eval.{name} is {getattr(self, name)!r}, expected a whole number of at least 1.")
        for name in ("semantic_floor", "semantic_margin"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"eval.{name} is {getattr(self, name)!r}, expected a cosine in [0, 1).")
        small, large = self.area_edges_px2
        if not 0 < small < large:
            raise ConfigError(f"eval.area_edges_px2 is {self.area_edges_px2!r}, expected 0 < small edge < large edge.")

    @property
    def all_f1_ious(self) -> tuple[float, ...]:
        """The F1 thresholds, with .50 and .95 always among them: published are F1 at .50, at .95, and the mean."""
        return tuple(sorted({*self.f1_ious, 0.5, 0.95}))


def iou_key(iou: float) -> str:
    """The way a threshold appears in a metric name: 0.5 is "50", 0.95 is "95"."""
    return f"{round(100 * iou):02d}"
