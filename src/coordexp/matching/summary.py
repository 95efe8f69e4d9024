"""Counts of matched objects, and the ratios made from them. Counts add up over images; ratios never do."""

from __future__ import annotations

from dataclasses import dataclass

from coordexp.matching.assign import MatchResult


@dataclass(frozen=True, slots=True)
class MatchCounts:
    """Sums over any number of images: predictions, annotated objects, matched pairs, and the IoU of those pairs.

    Precision is 1 when nothing is predicted and recall is 1 when nothing is annotated, so that an empty image that is
    left empty scores 1.
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
    def precision(self) -> float:
        """Share of predictions that are matched."""
        return self.n_matched / self.n_pred if self.n_pred else 1.0

    @property
    def recall(self) -> float:
        """Share of objects that are matched."""
        return self.n_matched / self.n_gt if self.n_gt else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 when both are."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0

    @property
    def matched_iou_mean(self) -> float:
        """Mean IoU over matched pairs; 0 when nothing is matched."""
        return self.iou_sum / self.n_matched if self.n_matched else 0.0
