"""Simulated tables: intervals cover and tests err as often as they say.

Every bound is the promised rate and four standard errors of the simulated one.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import (
    against_published,
    holm,
    paired_difference,
    sign_flip_p,
    smallest_detectable,
    t_interval,
    wilcoxon_p,
)

TABLES = 10_000


def _four_errors(rate, trials=TABLES):
    return 4 * math.sqrt(rate * (1 - rate) / trials)


@pytest.mark.parametrize("n", [2, 5])
def test_the_interval_covers_the_truth_in_95_percent(n):
    tables = np.random.default_rng(n).normal(0.3, 2.0, (TABLES, n))
    hits = sum(low <= 0.3 <= high for low, high in map(t_interval, tables))
    assert abs(hits / TABLES - 0.95) < 0.01


def test_the_paired_interval_covers_the_true_difference_in_95_percent_although_pairs_are_alike():
    rng = np.random.default_rng(0)
    seeds = rng.normal(70, 1, (TABLES, 5))  # what the two runs of one seed share
    treated, baseline = seeds + 0.4 + rng.normal(0, 0.3, seeds.shape), seeds + rng.normal(0, 0.2, seeds.shape)
    found = [paired_difference(*pair) for pair in zip(treated, baseline, strict=True)]
    assert abs(np.mean([d.low <= 0.4 <= d.high for d in found]) - 0.95) < 0.01
    assert abs(np.mean([d.low > 0.4 for d in found]) - 0.025) < _four_errors(0.025)


def test_under_the_null_hypothesis_the_paired_p_is_small_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [paired_difference(rng.normal(size=6), rng.normal(size=6)).p_t for _ in range(2000)]
    for level in (0.05, 0.25, 0.5):
        assert abs(np.mean(np.array(found) <= level) - level) < _four_errors(level, 2000)


def _family_error(p_values, nulls):
    """How often Holm's adjustment finds at least one of the first ``nulls`` hypotheses, which are all true."""
    adjusted = np.array([holm(row) for row in p_values.tolist()])
    return np.mean((adjusted[:, :nulls] <= 0.05).any(axis=1))


@pytest.mark.parametrize("real", [0, 18])
def test_holm_errs_in_5_percent_of_tables_of_independent_models(real):
    d = np.random.default_rng(real).normal(0, 0.4, (TABLES, 36, 5))
    d[:, 36 - real :] += 1000  # so large that their p is 0 in effect: Holm's last 18 factors are left for the nulls
    error = _family_error(stats.ttest_1samp(d, 0, axis=2).pvalue, 36 - real)
    exact = 1 - (1 - 0.05 / (36 - real)) ** (36 - real)
    assert abs(error - exact) < _four_errors(exact)
    assert error < 0.05 + _four_errors(0.05)


def test_holm_errs_in_at_most_5_percent_of_tables_whose_methods_share_a_baseline():
    rng = np.random.default_rng(2)
    d = rng.normal(size=(TABLES, 6, 5)) - rng.normal(size=(TABLES, 1, 5))
    error = _family_error(stats.ttest_1samp(d, 0, axis=2).pvalue, 6)
    assert 0.025 < error < 0.05 + _four_errors(0.05)  # dependence costs power, and is no reason to err more


@pytest.mark.parametrize("draw", ["normal", "laplace", "standard_cauchy"])
def test_the_sign_flip_test_errs_as_often_as_its_patterns_allow(draw):
    d = getattr(np.random.default_rng(3), draw)(size=(TABLES, 7))
    p = np.array([sign_flip_p(row) for row in d])
    for level in (0.05, 0.25):
        attained = math.floor(level * 64) / 64  # p is one of 1/64, 2/64, ..., each as likely
        assert abs(np.mean(p <= level) - attained) < _four_errors(attained)
        assert attained <= level


def test_the_signed_rank_test_errs_as_often_as_its_ranks_allow():
    d = np.random.default_rng(4).laplace(size=(TABLES, 10))
    sums = np.array([np.dot(signs, range(1, 11)) for signs in itertools.product((-1, 1), repeat=10)])
    reachable = [np.mean(np.abs(sums) >= abs(w)) for w in set(sums.tolist())]
    attained = max(p for p in reachable if p <= 0.05)
    found = np.mean([wilcoxon_p(row) <= 0.05 for row in d])
    assert abs(found - attained) < _four_errors(attained)


def test_the_signed_rank_test_errs_no_more_often_with_ties_and_zeros():
    d = np.random.default_rng(5).integers(-2, 3, size=(TABLES, 12))
    p = [wilcoxon_p(row) for row in d]
    assert np.mean([value is not None and value <= 0.05 for value in p]) < 0.05 + _four_errors(0.05)


@pytest.mark.parametrize("published", [None, 5])
def test_equivalence_is_claimed_in_5_percent_of_cases_at_the_margin(published):
    rng = np.random.default_rng(6)
    trials = TABLES // 2
    for std, least in ((0.1, 0.04), (2.0, 0.0)):  # a precise experiment uses the level up, a noisy one does not
        ours, theirs = rng.normal(70.5, std, (trials, 5)), rng.normal(70, std, (trials, 5))
        stated = [(70.0,)] * trials if published is None else [(y.mean(), y.std(ddof=1), 5) for y in theirs]
        found = [against_published(x, *given).p_equivalence for x, given in zip(ours, stated, strict=True)]
        assert least <= np.mean(np.array(found) < 0.05) < 0.05 + _four_errors(0.05, trials)


@pytest.mark.parametrize(("std", "stated"), [(0.2, 0.94), (0.4, 0.19)])
def test_the_default_margin_shows_equivalence_as_often_as_documented(std, stated):
    rng = np.random.default_rng(7)
    ours, theirs = rng.normal(70, std, (2, TABLES // 2, 5))
    summaries = zip(ours, theirs.mean(axis=1), theirs.std(axis=1, ddof=1), strict=True)
    shown = [against_published(x, mean, s, 5).p_equivalence < 0.05 for x, mean, s in summaries]
    assert abs(np.mean(shown) - stated) < 0.005 + _four_errors(stated, TABLES // 2)


def test_the_interval_about_a_published_number_covers_the_truth():
    rng = np.random.default_rng(8)
    ours, theirs = rng.normal(70.3, 0.5, (TABLES // 2, 5)), rng.normal(70, 0.2, (TABLES // 2, 3))
    summaries = zip(ours, theirs.mean(axis=1), theirs.std(axis=1, ddof=1), strict=True)
    found = [against_published(x, mean, s, 3) for x, mean, s in summaries]
    hits = np.mean([d.low <= 0.3 <= d.high for d in found])
    assert abs(hits - 0.95) < 0.02  # Welch's degrees of freedom are an approximation


@pytest.mark.parametrize(("n", "power"), [(2, 0.5), (5, 0.8), (10, 0.9)])
def test_the_smallest_detectable_difference_is_found_with_its_power(n, power):
    delta = smallest_detectable(0.3, n, power=power)
    d = np.random.default_rng(n).normal(delta, 0.3, (TABLES, n))
    found = np.mean(stats.ttest_1samp(d, 0, axis=1).pvalue <= 0.05)
    assert abs(found - power) < _four_errors(power)
