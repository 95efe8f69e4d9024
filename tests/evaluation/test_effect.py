"""Effects over images and seeds, against hand-computed values and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from coordexp.evaluation import effect as effect_module
from coordexp.evaluation.effect import FEWEST_SEEDS, Effect, Verdict, effect


def test_two_seeds_by_hand() -> None:
    # Seeds differ by 2, so s^2 = 2 and its share of the mean's variance is 1; the image term is exactly 1 as well.
    resampled = np.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    found = effect(np.array([1.0, 3.0]), resampled)
    assert found is not None
    assert (found.delta, found.se_images, found.se_seeds) == (2.0, 1.0, 1.0)
    df = (1 + 1) ** 2 / (1**2 / 1)
    widening = student.ppf(0.975, df) * np.sqrt(2) / norm.ppf(0.975)
    assert found.hi - found.delta == pytest.approx(widening * np.percentile([-1, 0, 1], 97.5))
    assert found.smallest == pytest.approx((student.ppf(0.975, df) + student.ppf(0.8, df)) * np.sqrt(2))


def test_one_seed_is_the_paired_percentile_bootstrap() -> None:
    """Of a skewed distribution too, where a normal interval would be symmetric."""
    resampled = np.random.default_rng(0).exponential(0.01, (1, 4000))
    found = effect(np.array([0.1]), resampled)
    assert found is not None
    assert found.se_seeds is None
    centred = resampled[0] - resampled.mean() + 0.1
    assert [found.lo, found.hi] == pytest.approx(np.percentile(centred, [2.5, 97.5]))
    assert found.hi - found.delta > 1.5 * (found.delta - found.lo)
    assert found.verdict == Verdict.BETTER


def test_seeds_alone_give_the_t_interval() -> None:
    """Resamples that never differ: what is left is Student's interval over the seeds."""
    found = effect(np.array([0.1, 0.3, 0.2]), np.full((3, 50), 0.2))
    assert found is not None
    assert found.hi - found.delta == pytest.approx(student.ppf(0.975, 2) * 0.1 / np.sqrt(3))


def test_pairing_cancels_what_both_sides_share() -> None:
    """Two systems that differ by a constant are told apart for certain, however much both vary with the images."""
    shared = np.random.default_rng(1).normal(0.5, 0.2, (1, 1000))
    found = effect(np.array([0.01]), (shared + 0.01) - shared)
    assert found is not None
    assert (found.lo, found.hi, found.p_superior) == (pytest.approx(0.01), pytest.approx(0.01), 1.0)
    same = effect(np.array([0.0]), shared - shared)
    assert same is not None
    assert (same.lo, same.hi, same.p_superior) == (0.0, 0.0, 0.5)
    assert same.verdict == Verdict.IDENTICAL


@pytest.mark.parametrize(
    ("differing", "verdict"), [(1, Verdict.NO_DIFFERENCE), (3, Verdict.NO_DIFFERENCE), (8, Verdict.BETTER)]
)
def test_three_images_that_differ_decide_nothing(differing: int, verdict: Verdict) -> None:
    """All in one direction, but a twentieth of the resamples have none of three."""
    weights_BI = np.random.default_rng(4).multinomial(300, np.full(300, 1 / 300), size=1000)
    found = effect(np.array([differing / 300]), weights_BI[:, :differing].sum(axis=1)[None] / 300)
    assert found is not None
    assert found.verdict == verdict


def test_superiority_counts_the_resamples_as_drawn() -> None:
    """Two wins, three ties and one loss; the undefined resample does not count, and `delta` moves the interval only."""
    resampled = np.array([[0.2, 0.1, 0.0, 0.0, 0.0, -0.1, np.nan]])
    for delta in (0.0, 0.5, -0.5):
        result = effect(np.array([delta]), resampled)
        assert result is not None
        assert result.p_superior == pytest.approx((2 + 3 / 2) / 6)
        assert result.lo <= delta <= result.hi


def test_a_stricter_level_gives_a_wider_interval() -> None:
    resampled = np.random.default_rng(0).normal(size=(3, 500))
    deltas = np.array([0.1, 0.2, 0.4])
    wide, narrow = effect(deltas, resampled, 0.01), effect(deltas, resampled, 0.05)
    assert wide is not None
    assert narrow is not None
    assert wide.lo < narrow.lo < narrow.hi < wide.hi


def test_undefined_resamples_are_left_out_and_all_undefined_is_none() -> None:
    resampled = np.array([[1.0, np.nan, 3.0, 2.0]])
    found = effect(np.array([2.0]), resampled)
    assert found is not None
    assert found.se_images == 1.0
    assert effect(np.array([2.0]), np.full((1, 3), np.nan)) is None


@pytest.mark.parametrize(
    ("lo", "hi", "verdict"),
    [
        (0.01, 0.03, Verdict.BETTER),
        (-0.03, -0.01, Verdict.WORSE),
        (-0.01, 0.02, Verdict.NO_DIFFERENCE),
        (0.0, 0.02, Verdict.NO_DIFFERENCE),
        (0.0, 0.0, Verdict.IDENTICAL),
    ],
)
def test_the_verdict_is_whether_the_interval_excludes_zero(lo: float, hi: float, verdict: Verdict) -> None:
    assert Effect((lo + hi) / 2, lo, hi, 0.5, 0.02, 0.01, 0.01).verdict == verdict


def test_coverage_and_power_in_simulation() -> None:
    """A true effect is covered about 19 times in 20, and one of the size called showable is found 4 times in 5."""
    rng = np.random.default_rng(5)
    sd_images, sd_seeds, n_seeds, trials = 0.01, 0.008, 4, 3000
    truth = (norm.ppf(0.975) + norm.ppf(0.8)) * np.sqrt(sd_images**2 + sd_seeds**2 / n_seeds)
    covered = found_better = 0
    showable = []
    for _ in range(trials):
        image_error = rng.normal(0, sd_images)
        deltas = truth + image_error + rng.normal(0, sd_seeds, n_seeds)
        resampled = np.tile(deltas.mean() + rng.normal(0, sd_images, 200), (n_seeds, 1))
        result = effect(deltas, resampled)
        assert result is not None
        covered += result.lo <= truth <= result.hi
        found_better += result.verdict == Verdict.BETTER
        showable.append(result.smallest)
    assert 0.93 <= covered / trials <= 0.975
    assert 0.70 <= found_better / trials <= 0.85
    assert np.median(showable) == pytest.approx(truth, rel=0.15)


@pytest.mark.parametrize(("n_seeds", "lowest", "highest"), [(2, 0.09, 0.14), (FEWEST_SEEDS, 0.05, 0.09)])
def test_two_seeds_find_too_many_differences_where_training_varies(n_seeds: int, lowest: float, highest: float) -> None:
    """Without a true difference, and with twice the error of the images in the mean over seeds."""
    rng = np.random.default_rng(7)
    resampled, trials, found = np.tile(rng.normal(0, 1, 200), (n_seeds, 1)), 3000, 0
    resampled *= 1 / resampled[0].std(ddof=1)
    for _ in range(trials):
        result = effect(rng.normal() + rng.normal(0, 2 * np.sqrt(n_seeds), n_seeds), resampled)
        assert result is not None
        found += result.verdict != Verdict.NO_DIFFERENCE
    assert lowest < found / trials < highest


def test_quantiles_are_those_of_the_distributions_bit_by_bit():
    """Taken from scipy.special, because importing scipy.stats takes longer than a stage needs for all of them."""
    for q in (0.5, 0.8, 0.95, 0.975, 0.995):
        assert effect_module.normal_quantile(q) == norm.ppf(q)
        for df in (1, 2, 2.7, 9, 41.3, 1e6):
            assert effect_module.student_quantile(df, q) == student.ppf(q, df)
