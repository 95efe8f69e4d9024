"""The rule that turns an interval into a word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.evaluation.effect import Verdict
from coordexp.reporting.verdicts import Difference, difference_from, verdict_of


@pytest.mark.parametrize(
    ("lo", "hi", "verdict"),
    [
        (0.001, 0.02, Verdict.BETTER),
        (-0.02, -0.001, Verdict.WORSE),
        (-0.01, 0.02, Verdict.NO_DIFFERENCE),
        (0.0, 0.02, Verdict.NO_DIFFERENCE),  # touching 0 does not exclude it
        (-0.02, 0.0, Verdict.NO_DIFFERENCE),
        (0.0, 0.0, Verdict.NO_DIFFERENCE),
    ],
)
def test_only_an_interval_without_zero_decides(lo: float, hi: float, verdict: Verdict) -> None:
    assert Difference(delta=(lo + hi) / 2, lo=lo, hi=hi, p_superior=0.5).verdict is verdict


@given(st.floats(-1, 1), st.floats(0, 1))
def test_swapping_the_sides_swaps_the_verdict(lo: float, width: float) -> None:
    swapped = {
        Verdict.BETTER: Verdict.WORSE,
        Verdict.WORSE: Verdict.BETTER,
        Verdict.NO_DIFFERENCE: Verdict.NO_DIFFERENCE,
    }
    one = Difference(delta=lo, lo=lo, hi=lo + width, p_superior=0.5)
    other = Difference(delta=-lo, lo=-one.hi, hi=-one.lo, p_superior=0.5)
    assert other.verdict is swapped[one.verdict]
    assert other.half_width == pytest.approx(one.half_width)


def test_an_undefined_metric_gets_no_verdict() -> None:
    assert verdict_of(difference_from(None)) is Verdict.UNDEFINED
    row = {"delta": 0.1, "lo": 0.05, "hi": 0.15, "p_superior": 1.0}
    assert verdict_of(difference_from(row)) is Verdict.BETTER
