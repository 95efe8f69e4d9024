"""The paired difference of a metric over images and seeds, and the single rule behind every verdict.

There are two sources of variation: the sample of evaluated images, and the randomness of training. For S seeds, each
trained once per arm, with the paired difference d_s of a metric on the same images:

    delta  = mean_s d_s
    SE^2   = Var_images(delta) + Var_s(d_s) / S
    df     = SE^4 / ((Var_s(d_s) / S)^2 / (S - 1))                                            (Welch-Satterthwaite)
    interval = delta + (t_(1 - a/2, df) SE) / (z_.975 SE_images) * the 95 % interval of the bootstrap around its mean

With one seed at the 95 % level the factor is 1: the interval is that of the paired percentile bootstrap over images. It
does not include training noise, and the verdict states that. More seeds and stricter levels scale the interval and keep
its shape. Two seeds can agree by chance, and then the interval is too narrow: where training adds one to four times the
error of the images, two seeds find a difference that is not there in 7 to 13 % of simulated tests instead of 5, three
seeds in 6 to 8 %. So a claim about training needs FEWEST_SEEDS. The minimum detectable effect is the true difference
that a test of this level finds with 80 % probability.

Legend: S seeds, B bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.special import ndtri as normal_quantile
from scipy.special import stdtrit as student_quantile

from coordexp.evaluation.bootstrap import INTERVAL
from coordexp.evaluation.table import Floats

LEVEL = 0.05  # probability of "better" or "worse" without a true difference
POWER = 0.8
FEWEST_SEEDS = 3  # a claim about training is not decided by fewer


class Verdict(StrEnum):
    """The outcome of a paired comparison."""

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference shown"
    IDENTICAL = "the same in every resample and seed"
    UNDEFINED = "not defined"
    NOT_JUDGED = "not evaluated"  # the answers of one side are unsound: evaluation/parse.py


def verdict_of_interval(lo: float, hi: float) -> Verdict:
    """The rule, fixed in advance: there is a verdict if and only if the interval excludes 0.

    For a metric where higher is better. "No difference shown" does not mean that there is no difference.
    """
    if lo <= 0 <= hi:
        return Verdict.NO_DIFFERENCE
    return Verdict.BETTER if lo > 0 else Verdict.WORSE


@dataclass(frozen=True, slots=True)
class Effect:
    """The difference arm - reference of one metric."""

    delta: float
    lo: float
    hi: float
    p_superior: float  # P(arm > reference) + P(equal) / 2 over the resamples
    smallest: float  # true difference that is found with 80 % probability
    se_images: float
    se_seeds: float | None  # None with one seed

    @property
    def verdict(self) -> Verdict:
        """The verdict for a metric where higher is better."""
        return Verdict.IDENTICAL if self.lo == self.hi == 0 else verdict_of_interval(self.lo, self.hi)


def effect(deltas_S: Floats, resampled_SB: Floats, level: float = LEVEL) -> Effect | None:
    """The effect from the paired difference of each seed and its bootstrap resamples.

    `p_superior` counts the resamples without centering: the bias that centering removes from an interval is the same on
    both sides of a pair, and shifting the differences would break ties.

    Args:
        deltas_S: arm minus reference on the evaluated images, one value per seed.
        resampled_SB: the same in each resample of the images; a resample has the same images for all seeds.
        level: two-sided probability of excluding a true 0.

    Returns None if no resample has a value.
    """
    delta, n_seeds = float(deltas_S.mean()), len(deltas_S)
    mean_B = resampled_SB.mean(axis=0)
    mean_B = mean_B[~np.isnan(mean_B)]
    if not mean_B.size or np.isnan(delta):
        return None
    var_images = float(mean_B.var(ddof=1)) if mean_B.size > 1 else 0.0
    var_seeds = float(deltas_S.var(ddof=1)) / n_seeds if n_seeds > 1 else 0.0
    se_images, se = float(np.sqrt(var_images)), float(np.sqrt(var_images + var_seeds))
    found, likely = _quantiles(var_images, var_seeds, n_seeds, level)
    if se_images > 1e-6 * se:  # otherwise the resamples are equal up to rounding, and have no shape to scale
        low, high = np.percentile(mean_B - mean_B.mean(), INTERVAL) * (found * se / (_Z95 * se_images))
    else:
        low, high = -found * se, found * se
    lo, hi = delta + float(low), delta + float(high)
    # The images that differ are so few that some resamples have none of them: these resamples show no difference.
    if (mean_B == 0).mean() > LEVEL / 2:
        lo, hi = min(lo, 0.0), max(hi, 0.0)
    return Effect(
        delta=delta,
        lo=lo,
        hi=hi,
        p_superior=float((mean_B > 0).mean() + (mean_B == 0).mean() / 2),
        smallest=(found + likely) * se,
        se_images=se_images,
        se_seeds=float(np.sqrt(var_seeds)) if n_seeds > 1 else None,
    )


_Z95 = float(normal_quantile(0.975))


def _quantiles(var_images: float, var_seeds: float, n_seeds: int, level: float) -> tuple[float, float]:
    """Quantiles of the two-sided test and of its power; those of the normal distribution if seeds add no variance."""
    if not var_seeds:
        return float(normal_quantile(1 - level / 2)), float(normal_quantile(POWER))
    df = (var_images + var_seeds) ** 2 / (var_seeds**2 / (n_seeds - 1))
    return float(student_quantile(df, 1 - level / 2)), float(student_quantile(df, POWER))
