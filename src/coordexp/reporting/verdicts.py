"""The paired differences of metrics.json with their verdicts, and what outranks a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordexp.config.paths import CHECKPOINTS, COMPARISONS
from coordexp.evaluation.effect import Verdict, verdict_of_interval
from coordexp.evaluation.soundness import FAULTS, MOST_FAULTY, faults_of
from coordexp.reporting.inputs import Json, Metrics, metric

RULE = (
    "A difference is called **better** or **worse** when its 95 % interval (paired bootstrap over images) excludes 0, "
    "and **no difference shown** otherwise. The interval covers the choice of images, not of the training seed."
)


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference new - old with its 95 % interval; `judged` is False if the answers of a side are unsound."""

    delta: float
    lo: float
    hi: float
    p_superior: float
    judged: bool = True

    @property
    def half_width(self) -> float:
        """About the smallest true difference that this many images could tell from 0."""
        return (self.hi - self.lo) / 2

    @property
    def verdict(self) -> Verdict:
        """The verdict, for a metric of which higher is better; all compared metrics are of that kind."""
        return verdict_of_interval(self.lo, self.hi) if self.judged else Verdict.NOT_JUDGED


def difference_from(row: Mapping[str, Any] | None, *, judged: bool = True) -> Difference | None:
    """The difference of one row of metrics.json's `comparison`; None where a metric is undefined on either side."""
    return None if row is None else Difference(row["delta"], row["lo"], row["hi"], row["p_superior"], judged)


def compared(
    metrics: Metrics, comparison: Mapping[str, Mapping[str, Json | None]], name: str
) -> dict[str, Difference | None]:
    """Metric -> difference of one comparison; none is judged if a side's answers are cut, loop or do not parse."""
    judged = not any(checkpoint_faults(metrics, checkpoint) for checkpoint in COMPARISONS[name])
    return {key: difference_from(row, judged=judged) for key, row in comparison[name].items()}


def verdict_of(difference: Difference | None) -> Verdict:
    """The verdict, or `not defined`."""
    return Verdict.UNDEFINED if difference is None else difference.verdict


def checkpoint_faults(metrics: Metrics, checkpoint: str) -> list[str]:
    """What is wrong with the answers of a checkpoint, in words; raises DataError if the evaluation did not count it."""
    for key in FAULTS:
        metric(metrics, checkpoint, key)
    return faults_of(metrics[checkpoint])


def warnings(metrics: Metrics) -> list[str]:
    """One line for each checkpoint that is not judged, and why; empty if all answers are sound."""
    found = {name: checkpoint_faults(metrics, name) for name in CHECKPOINTS}
    return [
        f"**{name} is not judged**: {', '.join(faults)} (of {metrics[name]['coco']['n_images']} on val; "
        f"above {100 * MOST_FAULTY:g} %, no score says how well it detects)."
        for name, faults in found.items()
        if faults
    ]
