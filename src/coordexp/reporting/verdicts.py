"""The paired differences of metrics.json with their verdicts, and the rule in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordexp.evaluation.effect import Verdict, verdict_of_interval

RULE = (
    "A difference is called **better** or **worse** when its 95 % interval (paired bootstrap over images) excludes 0, "
    "and **no difference shown** otherwise. The interval covers the choice of images, not of the training seed."
)


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference new - old with its 95 % interval."""

    delta: float
    lo: float
    hi: float
    p_superior: float

    @property
    def half_width(self) -> float:
        """About the smallest true difference that this many images could tell from 0."""
        return (self.hi - self.lo) / 2

    @property
    def verdict(self) -> Verdict:
        """The verdict, for a metric of which higher is better; all compared metrics are of that kind."""
        return verdict_of_interval(self.lo, self.hi)


def difference_from(row: Mapping[str, Any] | None) -> Difference | None:
    """The difference of one row of metrics.json's `comparison`; None where a metric is undefined on either side."""
    return None if row is None else Difference(row["delta"], row["lo"], row["hi"], row["p_superior"])


def verdict_of(difference: Difference | None) -> Verdict:
    """The verdict, or `not defined`."""
    return Verdict.UNDEFINED if difference is None else difference.verdict
