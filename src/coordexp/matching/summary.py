"""Counts of matched objects, and the ratios made from them. Counts add up over images; ratios never do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordexp.matching.matcher import MatchResult


@dataclass(frozen=True, slots=True)
class MatchCounts:
    """Sums over any number of images: predictions, annotated objects, matched pairs, and the IoU of those pairs.

    A ratio is None where there is nothing to judge: precision without a prediction, recall and F1 without an object.
    """

    n_pred: int = 0
    n_gt: int = 0
    n_matched: int = 0
    iou_sum: float = 0.0

    def __post_init__(self) -> None:
        assert 0 <= self.n_matched <= min(self.n_pred, self.n_gt), self

    @classmethod
    def from_result(cls, result: MatchResult) -> MatchCounts:
        """The counts of one image."""
        n_matched = len(result.pairs)
        return cls(
            n_pred=n_matched + len(result.unmatched_pred),
            n_gt=n_matched + len(result.unmatched_gt),
            n_matched=n_matched,
            iou_sum=float(result.iou_P.sum()),
        )

    def __add__(self, other: MatchCounts) -> MatchCounts:
        return MatchCounts(
            self.n_pred + other.n_pred,
            self.n_gt + other.n_gt,
            self.n_matched + other.n_matched,
            self.iou_sum + other.iou_sum,
        )

    @property
    def n_false_positive(self) -> int:
        """Predictions without an object."""
        return self.n_pred - self.n_matched

    @property
    def n_false_negative(self) -> int:
        """Objects without a prediction."""
        return self.n_gt - self.n_matched

    @property
    def precision(self) -> float | None:
        """Fraction of predictions that are matched; None without predictions."""
        return self.n_matched / self.n_pred if self.n_pred else None

    @property
    def recall(self) -> float | None:
        """Fraction of objects that are matched; None without objects."""
        return self.n_matched / self.n_gt if self.n_gt else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall, 0 where objects meet no prediction; None without objects."""
        counts = (self.n_matched, self.n_false_positive, self.n_false_negative)
        return float(f1_from_counts(counts)) if self.n_gt else None

    @property
    def matched_iou_mean(self) -> float | None:
        """Mean IoU over matched pairs; None without pairs."""
        return self.iou_sum / self.n_matched if self.n_matched else None


def f1_from_counts(counts: NDArray | tuple[int, int, int]) -> NDArray[np.float64]:
    """F1 = 2 TP / (2 TP + FP + FN) of (..., 3) counts tp, fp, fn summed over images; NaN where no object is counted."""
    tp, fp, fn = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    return np.divide(2 * tp, 2 * tp + fp + fn, out=np.full_like(tp, np.nan), where=tp + fn > 0)


def rounded_ratio(ratio: float | None) -> float | None:
    """A ratio with the four digits it is written with; None (JSON's null) stays None."""
    return None if ratio is None else round(ratio, 4)


def ratio_text(ratio: float | None) -> str:
    """A ratio for a log line."""
    return "undefined" if ratio is None else f"{ratio:.3f}"
