"""Means, intervals and tests for a handful of seeds.

Letters: n runs (or pairs), x values, d differences. A quantity that its data do not define
is ``None``, never nan: the documentation of each function says when.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

MOST_PAIRS = 40  # the exact permutation test enumerates 2^(n/2) sums


@dataclass(frozen=True)
class Summary:
    """Mean and spread of n values."""

    n: int
    mean: float | None  # None for n = 0
    std: float | None  # None for n < 2


@dataclass(frozen=True)
class PairedDifference:
    """A method minus the baseline, over the seeds that both have."""

    n: int
    mean: float | None  # None for n = 0
    low: float | None  # None for n < 2, as is high
    high: float | None
    p_t: float | None  # None for n < 2 and for differences without spread
    p_permutation: float | None  # None for n = 0 and for n > MOST_PAIRS


@dataclass(frozen=True)
class PublishedDifference:
    """Our mean minus a published one."""

    n: int  # of our values
    difference: float | None  # None for n = 0
    low: float | None  # None for n < 2, as is high
    high: float | None
    p_equivalence: float | None  # None for n < 2 and for values without spread
    margin: float  # the differences that are equivalent lie between -margin and margin
    published_exact: bool  # no std and n were published, so the interval leaves out their chance


def summarise(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation, s^2 = sum (x - mean)^2 / (n - 1).

    Example:
        >>> summarise([1.0, 2.0, 3.0])
        Summary(n=3, mean=2.0, std=1.0)
        >>> summarise([5.0])
        Summary(n=1, mean=5.0, std=None)
    """
    x = _finite(values)
    mean = float(x.mean()) if x.size else None
    std = float(x.std(ddof=1)) if x.size > 1 else None
    return Summary(x.size, mean, std)


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of a mean: mean -+ t_(n-1, (1 + level) / 2) s / sqrt(n).

    Returns:
        (low, high); both are the mean where all values are equal; ``None`` for n < 2.
    """
    x = _finite(values)
    if x.size < 2:
        return None
    half = stats.t.ppf((1 + level) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size)
    return float(x.mean() - half), float(x.mean() + half)


def paired_difference(
    treated: Sequence[float], baseline: Sequence[float], resolution: float = 0.0, level: float = 0.95
) -> PairedDifference:
    """Compare two methods pair by pair: d_i = treated_i - baseline_i.

    Args:
        treated: values of the method, in the order of their seeds.
        baseline: values of the baseline with the same seeds, in the same order.
        resolution: rounding of the values as stored; differences that agree to it are equal.
        level: of the interval.

    Raises:
        ValueError: different lengths, or a value that is not finite.
    """
    a, b = _finite(treated), _finite(baseline)
    if a.size != b.size:
        raise ValueError(f"expected pairs, got {a.size} and {b.size} values; match them by seed.")
    d = a - b
    low, high = t_interval(d, level) or (None, None)
    rounding = 2 * resolution + 64 * np.finfo(float).eps * max(np.abs(a).max(), np.abs(b).max()) if d.size else 0.0
    p_permutation = sign_flip_p(d, rounding) if 0 < d.size <= MOST_PAIRS else None
    return PairedDifference(d.size, summarise(d).mean, low, high, paired_t_p(d, rounding), p_permutation)


def paired_t_p(differences: Sequence[float], rounding: float = 0.0) -> float | None:
    """Two-sided p of Student's paired test: t = mean(d) / (s / sqrt(n)) with n - 1 degrees.

    Returns:
        ``None`` for n < 2, and where the differences spread by no more than ``rounding``:
        t is then 0/0 or infinite, and says nothing about other seeds.
    """
    d = _finite(differences)
    if d.size < 2 or np.ptp(d) <= rounding:
        return None
    t = d.mean() / (d.std(ddof=1) / math.sqrt(d.size))
    return float(2 * stats.t.sf(abs(t), d.size - 1))


def sign_flip_p(differences: Sequence[float], rounding: float = 0.0) -> float:
    """Exact two-sided permutation p: were the two methods alike, each d_i could as well be -d_i.

    p = #{s in {-1, 1}^n : |sum_i s_i d_i| >= |sum_i d_i|} / 2^n, so p >= 2^(1 - n).

    All 2^n patterns are counted by halves: a sum is l + r with l from the first half of the
    pairs and r from the second; for each l the fitting r are a range of the sorted r.

    Args:
        differences: d, 1 to ``MOST_PAIRS`` of them.
        rounding: error of one difference; sums that agree to n times it are tied.

    Raises:
        ValueError: no difference, more than ``MOST_PAIRS``, or one that is not finite.

    Example:
        >>> sign_flip_p([1.0, 1.0, 1.0])
        0.25
    """
    d = _finite(differences)
    if not 0 < d.size <= MOST_PAIRS:
        raise ValueError(f"expected 1 to {MOST_PAIRS} differences, got {d.size}; use a paired t-test for more.")
    threshold = abs(d.sum()) - d.size * rounding - 1e-12 * np.abs(d).sum()
    if threshold <= 0:
        return 1.0
    left, right = _signed_sums(d[: d.size // 2]), np.sort(_signed_sums(d[d.size // 2 :]))
    above = right.size - np.searchsorted(right, threshold - left, side="left")
    below = np.searchsorted(right, -threshold - left, side="right")
    return float((above.sum() + below.sum()) / 2.0**d.size)


def wilcoxon_p(differences: Sequence[float], rounding: float = 0.0) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test, for one difference per model.

    W = sum_i sign(d_i) r_i with r_i the rank of |d_i|. Differences of 0 are left out before ranking
    (Wilcoxon's own rule), tied |d_i| share the mean of their ranks. p is that of :func:`sign_flip_p`
    for the signed ranks, so it is exact also with ties; beyond ``MOST_PAIRS`` differences it is scipy's:
    exact up to 50 without ties, else the normal limit with the variance corrected for ties.

    Source: Wilcoxon, Individual comparisons by ranking methods, 1945. The null hypothesis is that every d_i
    is distributed symmetrically about 0, independently of the others.

    Args:
        differences: d, one per model.
        rounding: error of one difference; up to it a difference is 0, and neighbours in size are tied.

    Returns:
        ``None`` where no difference is left.

    Raises:
        ValueError: a value that is not finite.

    Example:
        >>> wilcoxon_p([0.3, 0.1, 0.2, 0.0])
        0.25
    """
    d = _finite(differences)
    d = d[np.abs(d) > rounding]
    if d.size == 0:
        return None
    signed_ranks = np.sign(d) * _ranks(np.abs(d), rounding)
    return sign_flip_p(signed_ranks) if d.size <= MOST_PAIRS else float(stats.wilcoxon(signed_ranks).pvalue)


def smallest_detectable(std: float | None, n: int, level: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest true mean difference that a two-sided paired t-test finds with that power.

    The delta with P(|T| > t_(n-1, 1 - level / 2)) = power, T noncentral t with n - 1 degrees and
    noncentrality sqrt(n) delta / std. Source: Cohen, Statistical power analysis, 1988, chapter 2.

    Args:
        std: of the differences; the power holds for this value as the true one.
        n: pairs.
        level: of the test.
        power: probability of p <= level.

    Returns:
        0 for ``std`` 0, the limit; ``None`` for n < 2 or without ``std``.

    Raises:
        ValueError: not 0 < level < power < 1, or a ``std`` that is negative or not finite.

    Example:
        >>> round(smallest_detectable(1.0, 5), 3)
        1.682
    """
    if not 0 < level < power < 1:
        raise ValueError(f"expected 0 < level < power < 1, got level {level} and power {power}.")
    if std is None or n < 2:
        return None
    _require_std(std)
    critical = stats.t.isf(level / 2, n - 1)

    def excess(noncentrality: float) -> float:
        # the lower tail by symmetry: nct.cdf is nan far out
        return stats.nct.sf(critical, n - 1, [noncentrality, -noncentrality]).sum() - power

    # T = (Z + c) / sqrt(chi2 / (n - 1)): beyond this c, Z and chi2 each spoil it with half of 1 - power at most.
    miss = (1 - power) / 2
    enough = critical * math.sqrt(stats.chi2.isf(miss, n - 1) / (n - 1)) + stats.norm.isf(miss)
    return float(std / math.sqrt(n) * optimize.brentq(excess, 0.0, enough))


def against_published(
    values: Sequence[float],
    mean: float,
    std: float | None = None,
    n: int | None = None,
    margin: float = 0.5,
    level: float = 0.95,
) -> PublishedDifference:
    """Compare our values x with a published mean: is there a difference, are the two equivalent?

    D = mean(x) - mean, se^2 = s^2 / n_x + std^2 / n, and nu degrees of freedom by Welch and Satterthwaite,
    nu = se^4 / ((s^2 / n_x)^2 / (n_x - 1) + (std^2 / n)^2 / (n - 1)). The interval is D -+ t_nu se.
    Without ``std`` and ``n`` the published mean counts as exact, std = 0 and nu = n_x - 1, as ``published_exact`` says:
    the interval is then too narrow by what their seeds vary, so a difference from 0 is easily found.

    Equivalence, TOST (Schuirmann 1987): p is the larger one of the one-sided tests of D <= -margin, with
    t = (D + margin) / se, and D >= margin, with t = (D - margin) / se. p < 0.05 says that the 90 % interval
    lies within the margin. A p above says only that equivalence was not shown.

    Args:
        values: ours, one per seed.
        mean: the published number.
        std: the published sample standard deviation.
        n: the number of seeds behind it.
        margin: what counts as the same, in the values' unit. The default, half a percentage point of accuracy, is a
            choice: five seeds on both sides with a standard deviation of 0.2 show equivalence in 94 % of
            all cases without a true difference, with 0.4 in 19 %, so a smaller margin would ask for more seeds.
        level: of the interval.

    Raises:
        ValueError: only one of ``std`` and ``n``, n < 2, a margin that is not positive, or a value that is not finite.

    Example:
        >>> against_published([71.0, 71.2, 71.4], 71.2).difference
        0.0
    """
    x = _finite(values)
    _require_published(mean, std, n, margin)
    exact = std is None
    if x.size < 2:
        return PublishedDifference(x.size, float(x.mean() - mean) if x.size else None, *[None] * 3, margin, exact)
    difference = float(x.mean() - mean)
    ours, theirs = x.var(ddof=1) / x.size, 0.0 if exact else std**2 / n
    error = math.sqrt(ours + theirs)
    if error <= 64 * np.finfo(float).eps * np.abs(x).max():
        return PublishedDifference(x.size, difference, difference, difference, None, margin, exact)
    degrees = (ours + theirs) ** 2 / (ours**2 / (x.size - 1) + (0.0 if exact else theirs**2 / (n - 1)))
    half = float(stats.t.ppf((1 + level) / 2, degrees) * error)
    p = float(stats.t.sf((margin - abs(difference)) / error, degrees))  # of the nearer end, which has the larger p
    return PublishedDifference(x.size, difference, difference - half, difference + half, p, margin, exact)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment: p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)), m p-values.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979. ``None``
    stays ``None`` and is not one of the m.

    Example:
        >>> holm([0.01, None, 0.04])
        [0.02, None, 0.04]
    """
    known = [i for i, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _ranks(sizes: np.ndarray, rounding: float) -> np.ndarray:
    """Mean ranks; neighbours in size that agree to ``rounding`` are tied."""
    order = np.argsort(sizes)
    apart = np.diff(sizes[order]) > rounding + 1e-12 * sizes.max()
    groups = np.zeros(sizes.size)
    groups[order[1:]] = np.cumsum(apart)
    return stats.rankdata(groups)


def _require_published(mean: float, std: float | None, n: int | None, margin: float) -> None:
    if not math.isfinite(mean):
        raise ValueError(f"expected a finite published mean, got {mean}.")
    if (std is None) != (n is None) or (n is not None and n < 2):
        raise ValueError(f"expected std and n >= 2 of the published mean, or neither, got std {std} and n {n}.")
    if std is not None:
        _require_std(std)
    if not 0 < margin < math.inf:
        raise ValueError(f"expected a positive margin of equivalence, got {margin}.")


def _require_std(std: float) -> None:
    if not 0 <= std < math.inf:
        raise ValueError(f"expected a standard deviation of at least 0, got {std}.")


def _signed_sums(d: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums - value, sums + value])
    return sums


def _finite(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if not np.isfinite(x).all():
        raise ValueError(f"expected finite values, got {x[~np.isfinite(x)][0]}; leave that run out.")
    return x
