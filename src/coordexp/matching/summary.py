"""Counts of matched objects, and the ratios computed from them. Counts can be added over images; ratios cannot."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from coordexp.matching.matcher import MatchResult

_Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class MatchCounts:
    """Sums over any number of images: predictions, annotated objects, matched pairs, and the IoU of those pairs.

    An undefined ratio is None: precision without predictions, recall and F1 without objects.
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
        """Harmonic mean of precision and recall, 0 without predictions; None without objects."""
        counts = (self.n_matched, self.n_false_positive, self.n_false_negative)
        return float(f1_from_counts(counts)) if self.n_gt else None

    @property
    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """95 % intervals of precision, recall and F1, as if boxes and objects were sampled independently.

        Each is a Wilson interval of a fraction. For F1 the fraction is J = TP / (TP + FP + FN); its bounds map to F1
        by the monotonic function F1 = 2 J / (1 + J).
        """
        n_matched, n_either = self.n_matched, self.n_pred + self.n_gt - self.n_matched
        jaccard = wilson(n_matched, n_either) if self.n_gt else None
        return {
            "precision": wilson(n_matched, self.n_pred) if self.n_pred else None,
            "recall": wilson(n_matched, self.n_gt) if self.n_gt else None,
            "f1": None if jaccard is None else (2 * jaccard[0] / (1 + jaccard[0]), 2 * jaccard[1] / (1 + jaccard[1])),
        }

    @property
    def matched_iou_mean(self) -> float | None:
        """Mean IoU over matched pairs; None without pairs."""
        return self.iou_sum / self.n_matched if self.n_matched else None


def f1_from_counts(counts: NDArray | tuple[int, int, int]) -> NDArray[np.float64]:
    """F1 = 2 TP / (2 TP + FP + FN) of (..., 3) counts tp, fp, fn summed over images; NaN without objects."""
    tp, fp, fn = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    return np.divide(2 * tp, 2 * tp + fp + fn, out=np.full_like(tp, np.nan), where=tp + fn > 0)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % score interval of a fraction (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    fraction, z2 = hits / n, _Z95**2
    center = (fraction + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * float(np.sqrt(fraction * (1 - fraction) / n + z2 / (4 * n**2)))
    # Exactly 0 and 1 at the ends: rounding errors would otherwise put the fraction outside its own interval.
    return 0.0 if hits == 0 else center - half, 1.0 if hits == n else center + half


def rounded_ratio(ratio: float | None) -> float | None:
    """A ratio rounded to the four digits that are written; None (JSON null) stays None."""
    return None if ratio is None else round(ratio, 4)


def ratio_text(ratio: float | None) -> str:
    """Format a ratio for a log line."""
    return "undefined" if ratio is None else f"{ratio:.3f}"
