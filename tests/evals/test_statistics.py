"""Statistics against independent implementations, published examples and numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as scipy_stats

from holdfast.evals import statistics as ours

counts = st.integers(1, 400).flatmap(
    lambda n: st.integers(0, n).flatmap(
        lambda n12: st.tuples(st.just(n), st.just(n12), st.integers(0, n - n12))
    )
)


# --- Tango ------------------------------------------------------------------------------------


def test_tango_by_hand() -> None:
    """n = 100, n12 = 2, n21 = 5, margin 0.05, step by step through the closed form.

    D = -0.05, A = 200, B = -7 + 203 * -0.05 = -17.15, C = 5 * 0.05 * 1.05 = 0.2625;
    sqrt(B^2 - 4AC) = sqrt(294.1225 - 210) = 9.17183; q21 = (9.17183 + 17.15) / 400 = 0.0658046;
    variance = 100 (2 * 0.0658046 - 0.05 * 1.05) = 7.91092; Z = (2 - 5 + 5) / 2.81264 = 0.71108.
    """
    assert ours.tango_z(100, 2, 5, 0.05) == pytest.approx(0.71108, abs=5e-6)


def test_tango_without_any_disagreement_by_hand() -> None:
    """q21 = m, so that Z = n m / sqrt(n m (1 - m)) = sqrt(n m / (1 - m))."""
    assert ours.tango_z(52, 0, 0, 0.05) == pytest.approx(math.sqrt(52 * 0.05 / 0.95))
    assert ours.tango_z(51, 0, 0, 0.05) < 1.6449 < ours.tango_z(52, 0, 0, 0.05)


def test_tango_at_margin_zero_is_the_mcnemar_score() -> None:
    """At delta = 0 the statistic is (n12 - n21) / sqrt(n12 + n21)."""
    assert ours.tango_z(50, 9, 4, 0.0) == pytest.approx(5 / math.sqrt(13))
    assert ours.tango_z(50, 0, 0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("n", "n12", "n21", "low", "high"),
    [
        (161, 6, 16, -0.1240, -0.0054),  # Cavo et al. 2012, in R's contingencytables 3.0
        (21, 1, 7, -0.517, -0.026),  # Bentur et al. 2009, in Fagerland et al. 2014
    ],
)
def test_tango_interval_of_published_tables(n: int, n12: int, n21: int, low: float, high: float) -> None:
    found = ours.tango_interval(n, n12, n21, 0.025)
    digits = 4 if n == 161 else 3
    assert tuple(round(end, digits) for end in found) == (low, high)


def independent_tango(n: int, n12: int, n21: int, margin: float) -> float:
    """The score statistic with the nuisance parameter found by a numerical optimiser."""

    def minus_log_likelihood(q21: float) -> float:
        q12 = q21 - margin
        cells = ((n12, q12), (n21, q21), (n - n12 - n21, 1 - q12 - q21))
        return -sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

    found = optimize.minimize_scalar(
        minus_log_likelihood,
        bounds=(margin, (1 + margin) / 2),
        method="bounded",
        options={"xatol": 1e-12},
    )
    variance = n * (2 * found.x - margin - margin**2)
    return (n12 - n21 + n * margin) / math.sqrt(variance)


@settings(deadline=None, max_examples=150)
@given(counts, st.sampled_from([0.01, 0.05, 0.1, 0.3]))
def test_tango_against_numerical_maximum_likelihood(table: tuple[int, int, int], margin: float) -> None:
    n, n12, n21 = table
    ours_z = ours.tango_z(n, n12, n21, margin)
    assert ours_z == pytest.approx(independent_tango(n, n12, n21, margin), rel=1e-3, abs=1e-3)


@given(counts, st.sampled_from([0.01, 0.05, 0.2]))
def test_the_interval_keeps_exactly_the_margins_that_the_test_keeps(
    table: tuple[int, int, int], margin: float
) -> None:
    n, n12, n21 = table
    z = ours.tango_z(n, n12, n21, margin)
    low, high = ours.tango_interval(n, n12, n21, 0.05)
    assert -1.0 <= low <= (n12 - n21) / n <= high <= 1.0
    if abs(z - ours.normal_quantile(0.95)) > 1e-6:
        assert (z >= ours.normal_quantile(0.95)) == (low >= -margin)


@given(counts)
def test_one_more_lost_prompt_never_helps(table: tuple[int, int, int]) -> None:
    n, n12, n21 = table
    if n12 + n21 < n:
        assert ours.tango_z(n, n12, n21 + 1, 0.05) < ours.tango_z(n, n12, n21, 0.05)


def test_type_one_error_of_tango_is_near_nominal() -> None:
    """True loss exactly at the margin: the test passes in about 5 % of samples, not 10 %."""
    rng = np.random.default_rng(7)
    samples = rng.multinomial(200, [0.02, 0.07, 0.91], size=4000)
    passed = sum(ours.tango_z(200, int(a), int(b), 0.05) >= 1.6449 for a, b, _ in samples)
    assert 0.02 <= passed / 4000 <= 0.06


@pytest.mark.parametrize("table", [(10, -1, 0), (10, 0, -1), (10, 6, 5), (-1, 0, 0)])
def test_impossible_counts_are_refused(table: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="Expected 0 <= n12"):
        ours.tango_z(*table, 0.05)


def test_margins_outside_the_open_interval_are_refused() -> None:
    with pytest.raises(ValueError, match="margin inside"):
        ours.tango_z(10, 0, 0, 1.0)


# --- McNemar, Holm, Wilson --------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_against_scipy(n12: int, n21: int) -> None:
    expected = 1.0
    if n12 + n21:
        expected = scipy_stats.binomtest(n21, n12 + n21, 0.5, alternative="greater").pvalue
    assert ours.mcnemar_exact(n12, n21) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand() -> None:
    assert ours.mcnemar_exact(0, 5) == 1 / 32
    assert ours.mcnemar_exact(1, 5) == 7 / 64  # (C(6,5) + C(6,6)) / 2^6
    assert ours.mcnemar_exact(0, 0) == 1.0


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, then made monotone."""
    assert ours.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert ours.holm([0.9]) == [0.9]
    assert ours.holm([0.6, 0.7]) == [1.0, 1.0]


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_against_scipy(sample: tuple[int, int]) -> None:
    successes, n = sample
    expected = scipy_stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    low, high = ours.wilson_interval(successes, n, 0.05)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("sample", [(0, 0), (3, 2), (-1, 2)])
def test_a_share_of_nothing_is_refused(sample: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        ours.wilson_interval(*sample, 0.05)


# --- bootstrap --------------------------------------------------------------------------------


def means_of_first(means: np.ndarray) -> np.ndarray:
    return means[:, 0]


def test_bootstrap_of_a_mean_matches_its_normal_interval() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, size=(400, 1))
    low, high = ours.paired_bootstrap(values, means_of_first, alpha=0.05, repeats=4000, seed=1)  # type: ignore[misc]
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_bootstrap_keeps_pairs_together() -> None:
    """The same column twice: the ratio is 1 in every resample, so the interval has no width."""
    column = np.random.default_rng(0).integers(0, 2, size=(100, 1)).astype(float)
    both = np.hstack([column, column, np.zeros_like(column)])
    interval = ours.paired_bootstrap(both, ours.retention, alpha=0.05, repeats=500, seed=0)
    assert interval == pytest.approx((1.0, 1.0))


def test_bootstrap_repeats_with_its_seed() -> None:
    values = np.random.default_rng(0).normal(size=(50, 1))
    first, again, other = (
        ours.paired_bootstrap(values, means_of_first, alpha=0.1, repeats=200, seed=s) for s in (3, 3, 4)
    )
    assert first == again != other


def test_retention_is_undefined_where_alignment_added_nothing() -> None:
    flat = np.zeros((30, 3))
    assert ours.paired_bootstrap(flat, ours.retention, alpha=0.05, repeats=100, seed=0) is None
    assert np.isnan(ours.retention(np.array([[0.5, 0.4, 0.4]]))).all()


def test_retention_by_hand() -> None:
    """Aligned 0.9, twin 0.1, candidate 0.7: three quarters of what alignment added are left."""
    assert ours.retention(np.array([[0.7, 0.9, 0.1]]))[0] == pytest.approx(0.75)


def test_bootstrap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        ours.paired_bootstrap(np.zeros((0, 1)), means_of_first, alpha=0.05, repeats=10, seed=0)


# --- what a sample could have shown -----------------------------------------------------------


@pytest.mark.parametrize(("n", "expected"), [(200, 0.044), (1000, 0.020)])
def test_detectable_loss_of_known_designs(n: int, expected: float) -> None:
    """5 % disagreement, 80 % power, 2.5 % one-sided: 4.4 and 2.0 points."""
    found = ours.detectable_loss(n, 0.05, alpha=0.025)
    assert found == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize(("n", "loss", "disagreement"), [(60, 0.1, 0.12), (200, 0.04, 0.05)])
def test_power_against_simulation(n: int, loss: float, disagreement: float) -> None:
    lost, gained = (disagreement + loss) / 2, (disagreement - loss) / 2
    rng = np.random.default_rng(5)
    samples = rng.multinomial(n, [gained, lost, 1 - disagreement], size=4000)
    found = sum(ours.mcnemar_exact(int(a), int(b)) <= 0.05 for a, b, _ in samples) / 4000
    assert ours.detection_power(n, loss, disagreement, 0.05) == pytest.approx(found, abs=0.025)


def test_power_by_hand() -> None:
    """Every prompt disagrees and is lost: five prompts reach 1/32 <= 0.05, four only 1/16."""
    assert ours.detection_power(5, 1.0, 1.0, 0.05) == pytest.approx(1.0)
    assert ours.detection_power(4, 1.0, 1.0, 0.05) == 0.0
    assert ours.detection_power(100, 0.0, 0.0, 0.05) == 0.0


def test_more_prompts_detect_smaller_losses() -> None:
    found = [ours.detectable_loss(n, 0.05, alpha=0.05) for n in (20, 100, 500, 2000)]
    assert found == sorted(found, reverse=True)
    assert ours.detectable_loss(4, 0.05, alpha=0.05) is None


def test_prompts_needed() -> None:
    assert ours.prompts_needed(10, 0, 0, 0.05, 0.05) == 52  # z^2 (1 - m) / m = 51.4
    assert ours.prompts_needed(100, 0, 5, 0.05, 0.05) is None  # the loss is the margin
    needed = ours.prompts_needed(100, 2, 5, 0.05, 0.05)
    assert needed is not None
    assert ours.tango_z(100, 2, 5, 0.05) * math.sqrt(needed / 100) >= 1.6448
    assert ours.tango_z(100, 2, 5, 0.05) * math.sqrt((needed - 1) / 100) < 1.6449


def test_normal_tail() -> None:
    assert ours.normal_upper_tail(1.6448536) == pytest.approx(0.05, abs=1e-6)
    assert (ours.normal_upper_tail(math.inf), ours.normal_upper_tail(-math.inf)) == (0.0, 1.0)
