"""The gate's statistics: paired tests on counts, intervals, and what a sample could have shown.

Paired counts over `n` prompts: `n12` = candidate safe and reference unsafe, `n21` = reference safe
and candidate unsafe; `delta = (n12 - n21) / n` is the candidate's gain. numpy and the standard
library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_NORMAL = NormalDist()
Array = NDArray[np.float64]


def tango_z(n: int, n12: int, n21: int, margin_frac: float) -> float:
    """Tango's score statistic for `H0: delta <= -margin` (Statist. Med. 17, 1998, 891-908).

    Arguments:
        margin_frac: in (-1, 1) as a loss; negative values test a gain.

    Returns:
        Z; non-inferiority is shown when `Z >= z_(1-alpha)`.

    Raises:
        ValueError: counts that no sample can have, or a margin outside (-1, 1).
    """
    _check_counts(n, n12, n21)
    if not -1.0 < margin_frac < 1.0:
        raise ValueError(f"Expected a margin inside (-1, 1), got {margin_frac}.")
    delta = -margin_frac
    a = 2.0 * n
    b = -n12 - n21 + (2.0 * n - n12 + n21) * delta
    c = -n21 * delta * (1.0 - delta)
    q21 = (math.sqrt(max(b * b - 4.0 * a * c, 0.0)) - b) / (2.0 * a)
    variance = n * (2.0 * q21 + delta * (1.0 - delta))
    distance = n12 - n21 - n * delta
    if variance <= 0.0:  # only at delta = 0 without any disagreement
        return 0.0 if distance == 0.0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def tango_interval(n: int, n12: int, n21: int, alpha: float) -> tuple[float, float]:
    """Score interval of delta with error `alpha` on each side: the margins that Tango's test keeps.

    Non-inferiority at margin m is shown exactly when the lower end is at least -m.
    """
    lower = _tango_lower(n, n12, n21, alpha)
    return lower, -_tango_lower(n, n21, n12, alpha)


def _tango_lower(n: int, n12: int, n21: int, alpha: float) -> float:
    """Smallest delta that is not rejected from below; bisection, since Z falls with delta."""
    wanted = normal_quantile(1.0 - alpha)
    low, high = -1.0, (n12 - n21) / n
    if high == low:  # every prompt lost
        return low
    for _ in range(60):
        middle = (low + high) / 2.0
        if tango_z(n, n12, n21, -middle) >= wanted:
            low = middle
        else:
            high = middle
    return low


def mcnemar_exact(n12: int, n21: int) -> float:
    """One-sided exact McNemar p-value of damage, `P(Bin(n12 + n21, 1/2) >= n21)`."""
    _check_counts(n12 + n21, n12, n21)
    total = n12 + n21
    tail = sum(math.comb(total, k) for k in range(n21, total + 1))
    return float(Fraction(tail, 2**total))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def wilson_interval(successes: int, n: int, alpha: float) -> tuple[float, float]:
    """Wilson's score interval of a share (1927), two-sided at level `1 - alpha`.

    Raises:
        ValueError: no data, or more successes than trials.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"Expected 0 <= successes <= n and n >= 1, got {successes} of {n}.")
    z = normal_quantile(1.0 - alpha / 2.0)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(
    columns: Array,
    statistic: Callable[[Array], Array],
    *,
    alpha: float,
    repeats: int,
    seed: int,
) -> tuple[float, float] | None:
    """Percentile interval of a function of column means, prompts resampled as wholes.

    Arguments:
        columns: float64 [prompts, models], each prompt's score under each model.
        statistic: [repeats, models] column means to [repeats] values; NaN where undefined.
        alpha: two-sided error.

    Returns:
        The interval, or None where the statistic is undefined in more than `alpha / 2` of the
        resamples: then no honest interval exists.
    """
    prompts = len(columns)
    if prompts == 0:
        raise ValueError("Expected at least one prompt to resample, got none.")
    shares = np.full(prompts, 1.0 / prompts)
    counts = np.random.default_rng(seed).multinomial(prompts, shares, size=repeats)
    values = statistic(counts @ columns / prompts)
    defined = values[np.isfinite(values)]
    if len(defined) < repeats * (1.0 - alpha / 2.0):
        return None
    low, high = np.quantile(defined, [alpha / 2.0, 1.0 - alpha / 2.0])
    return float(low), float(high)


def retention(means: Array) -> Array:
    """`(S_candidate - S_twin) / (S_reference - S_twin)`, NaN where the reference gains nothing.

    Arguments:
        means: [repeats, 3], the columns candidate, reference, twin.
    """
    candidate, reference, twin = means.T
    gap = reference - twin
    safe_gap = np.where(gap > 0.0, gap, 1.0)
    return np.where(gap > 0.0, (candidate - twin) / safe_gap, np.nan)


# --- what a sample could have shown -----------------------------------------------------------


def detection_power(n: int, loss_frac: float, disagreement_frac: float, alpha: float) -> float:
    """Probability that the exact one-sided McNemar test detects a true loss.

    Exact: the number of disagreements is Bin(n, disagreement), the number lost among them binomial
    with share `(disagreement + loss) / (2 disagreement)`.

    Arguments:
        loss_frac: true share lost minus share gained, in [0, disagreement].
        disagreement_frac: true share of prompts where the two models differ.
    """
    if disagreement_frac <= 0.0:
        return 0.0
    totals = np.arange(n + 1)
    weights = _binomial_pmf(totals, n, disagreement_frac)
    kept = totals[weights > 1e-9]
    lost_share = min(1.0, (disagreement_frac + loss_frac) / (2.0 * disagreement_frac))
    powers = [_upper_tail(t, _critical_value(t, alpha), lost_share) for t in kept.tolist()]
    return float(np.dot(weights[kept], powers))


def detectable_loss(n: int, disagreement_frac: float, *, alpha: float, power: float = 0.8) -> float | None:
    """Smallest true loss that `n` prompts detect with this power, or None where even a loss on
    every prompt would be missed.

    Arguments:
        disagreement_frac: share of prompts that flip anyway; a larger loss brings its own flips.
    """

    def enough(loss: float) -> bool:
        return detection_power(n, loss, max(loss, disagreement_frac), alpha) >= power

    if not enough(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2.0
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def prompts_needed(
    n: int, n12: int, n21: int, margin_frac: float, alpha: float, *, most: int = 100_000
) -> int | None:
    """Fewest prompts on which the same shares would show non-inferiority; None beyond `most`."""
    wanted = normal_quantile(1.0 - alpha)

    def shows(prompts: int) -> bool:  # Z is homogeneous of degree 1/2 in the counts
        return tango_z(n, n12, n21, margin_frac) * math.sqrt(prompts / n) >= wanted

    if not shows(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high


def normal_quantile(share: float) -> float:
    """z with `P(N(0, 1) <= z) = share`."""
    return _NORMAL.inv_cdf(share)


def normal_upper_tail(z: float) -> float:
    """`P(N(0, 1) >= z)`."""
    return 1.0 - _NORMAL.cdf(z) if math.isfinite(z) else float(z < 0)


def _check_counts(n: int, n12: int, n21: int) -> None:
    if n12 < 0 or n21 < 0 or n12 + n21 > n or n < 0:
        raise ValueError(f"Expected 0 <= n12 + n21 <= n, got n={n}, n12={n12}, n21={n21}.")


def _binomial_pmf(counts: NDArray[np.int64], n: int, share: float) -> Array:
    """`P(Bin(n, share) = k)` for each k, through logarithms so that large n do not overflow."""
    if share in (0.0, 1.0):
        return np.asarray(counts == round(n * share), dtype=np.float64)
    logs = np.array([_log_choose(n, k) for k in counts.tolist()])
    return np.asarray(np.exp(logs + counts * math.log(share) + (n - counts) * math.log1p(-share)))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@lru_cache(maxsize=4096)
def _critical_value(total: int, alpha: float) -> int:
    """Smallest number lost of `total` disagreements that the exact test calls damage."""
    pmf = _binomial_pmf(np.arange(total + 1), total, 0.5)
    tails = np.cumsum(pmf[::-1])[::-1]  # tails[k] = P(Bin >= k)
    significant = np.flatnonzero(tails <= alpha)
    return int(significant[0]) if len(significant) else total + 1


def _upper_tail(total: int, least: int, share: float) -> float:
    return float(_binomial_pmf(np.arange(least, total + 1), total, share).sum())
