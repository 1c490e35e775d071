"""Statistics by two routes: ours beside scipy, statsmodels, brute force and simulation."""

import doctest
import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_ind

from analysis import grouping, rendering, statistics
from analysis.statistics import (
    against_published,
    holm,
    paired_difference,
    paired_t_p,
    sign_flip_p,
    smallest_detectable,
    summarise,
    t_interval,
    wilcoxon_p,
)

SIZES = (2, 3, 5, 9)


def _pairs(n, seed=0):
    rng = np.random.default_rng([n, seed])
    return rng.normal(71, 1, n), rng.normal(70, 1, n)


@pytest.mark.parametrize("module", [statistics, grouping, rendering])
def test_examples_in_the_documentation_are_true(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("n", SIZES)
def test_summary_is_numpys(n):
    x, _ = _pairs(n)
    summary = summarise(x)
    assert (summary.n, summary.mean, summary.std) == (n, np.mean(x), np.std(x, ddof=1))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_interval_is_scipys(n, level):
    x, _ = _pairs(n)
    assert t_interval(x, level) == pytest.approx(stats.ttest_1samp(x, 0).confidence_interval(level), rel=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_paired_difference_is_scipys(n):
    a, b = _pairs(n)
    own, oracle = paired_difference(a, b), stats.ttest_rel(a, b)
    assert own.n == n
    assert own.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert own.p_t == pytest.approx(oracle.pvalue, rel=1e-12)
    assert (own.low, own.high) == pytest.approx(oracle.confidence_interval(0.95), rel=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_permutation_p_is_scipys_exact_one(n):
    a, b = _pairs(n, seed=1)
    oracle = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert paired_difference(a, b).p_permutation == pytest.approx(oracle.pvalue, rel=1e-12)


@pytest.mark.parametrize("n", range(1, 9))
def test_permutation_p_counts_all_sign_patterns_and_ties(n):
    for seed in range(20):
        d = np.random.default_rng([n, seed]).integers(-3, 4, n)  # whole numbers: many exact ties
        patterns = itertools.product((-1, 1), repeat=n)
        count = sum(abs(np.dot(signs, d)) >= abs(d.sum()) for signs in patterns)
        assert sign_flip_p(d) == count / 2**n
        assert sign_flip_p(0.1 * d) == count / 2**n


def test_permutation_p_of_many_pairs_is_exact_and_approaches_the_normal_limit():
    d = np.random.default_rng(0).normal(0.2, 1, 40)
    limit = 2 * stats.norm.sf(abs(d.sum()) / np.sqrt((d**2).sum()))
    assert sign_flip_p(d) == pytest.approx(limit, abs=0.01)
    with pytest.raises(ValueError, match="expected 1 to 40"):
        sign_flip_p(np.ones(41))


@pytest.mark.parametrize("seed", range(20))
def test_ties_within_the_rounding_of_stored_values_are_ties(seed):
    hundredths = np.random.default_rng(seed).integers(-3, 4, 6)  # accuracies on a grid of 0.01
    base = 71 + np.arange(6) / 10
    stored_a, stored_b = (base + hundredths / 100).astype(np.float32), base.astype(np.float32)
    patterns = itertools.product((-1, 1), repeat=6)
    count = sum(abs(np.dot(signs, hundredths)) >= abs(hundredths.sum()) for signs in patterns)
    spacing = float(np.spacing(np.float32(72)))
    assert paired_difference(stored_a, stored_b, spacing).p_permutation == count / 64


def test_permutation_and_t_p_do_not_depend_on_direction():
    a, b = _pairs(6)
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert (forth.p_permutation, forth.p_t) == (back.p_permutation, back.p_t)
    assert (forth.mean, forth.low, forth.high) == (-back.mean, -back.high, -back.low)


def test_cases_that_define_nothing_give_none_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing, one = paired_difference([], []), paired_difference([71.0], [70.0])
        equal, shifted = paired_difference([70.0, 71.0], [70.0, 71.0]), paired_difference([70.1, 71.1], [70.0, 71.0])
    assert (nothing.n, nothing.mean, nothing.low, nothing.p_t, nothing.p_permutation) == (0, None, None, None, None)
    assert (one.n, one.mean, one.low, one.high, one.p_t, one.p_permutation) == (1, 1.0, None, None, None, 1.0)
    assert (equal.mean, equal.low, equal.high, equal.p_t, equal.p_permutation) == (0, 0, 0, None, 1.0)
    assert (shifted.p_t, shifted.p_permutation) == (None, 0.5)
    assert shifted.low == pytest.approx(0.1)
    assert (summarise([]).mean, summarise([1.0]).std, t_interval([1.0]), paired_t_p([1.0])) == (None, None, None, None)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="finite"):
        summarise([1.0, math.nan])
    with pytest.raises(ValueError, match="expected pairs, got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_statsmodels(seed):
    p = np.random.default_rng(seed).choice([0.001, 0.01, 0.02, 0.04, 0.2, 0.6, 1.0], size=1 + seed)
    assert holm(list(p)) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)


def test_holm_leaves_out_what_is_not_defined():
    assert holm([None, 0.03, None, 0.01]) == [None, *holm([0.03]), None, 0.02]
    assert holm([]) == []


@pytest.mark.parametrize("n", [1, 2, 5, 12, 36])
def test_wilcoxon_without_ties_is_scipys_exact_one(n):
    for seed in range(3):
        d = np.random.default_rng([n, seed]).normal(0.3, 1, n)
        assert wilcoxon_p(d) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue, rel=1e-9)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_wilcoxon_with_ties_and_zeros_counts_all_sign_patterns_of_the_mean_ranks(whole):
    kept = np.array([d for d in whole if d != 0])
    if kept.size == 0:
        assert wilcoxon_p(whole) is None
        return
    ranks = [sum(abs(kept) < abs(d)) + (sum(abs(kept) == abs(d)) + 1) / 2 for d in kept]
    observed = abs(np.dot(np.sign(kept), ranks))
    count = sum(abs(np.dot(signs, ranks)) >= observed for signs in itertools.product((-1, 1), repeat=kept.size))
    assert wilcoxon_p(whole) == count / 2**kept.size
    assert wilcoxon_p(0.7 + 0.1 * np.array(whole) - 0.7) == count / 2**kept.size  # 0.7 + 0.1 - 0.7 < 0.1 in floats


def test_wilcoxon_takes_differences_within_rounding_as_tied():
    base, spacing = 70 + np.arange(6) / 7, float(np.spacing(np.float32(72)))
    unlike = 0
    for seed in range(20):
        hundredths = np.random.default_rng(seed).integers(-3, 4, 6)
        stored = (base + hundredths / 100).astype(np.float32).astype(float) - base.astype(np.float32)
        assert wilcoxon_p(stored, 2 * spacing) == wilcoxon_p(hundredths)
        unlike += wilcoxon_p(stored) != wilcoxon_p(hundredths)
    assert unlike > 0


def test_wilcoxon_of_many_differences_is_scipys_and_meets_the_exact_one():
    d = np.random.default_rng(3).integers(-9, 12, 40)
    kept = d[d != 0]
    assert wilcoxon_p(kept) == pytest.approx(stats.wilcoxon(kept, method="asymptotic").pvalue, rel=0.05)
    more = np.concatenate([d, d])
    assert wilcoxon_p(more) == stats.wilcoxon(more, method="asymptotic").pvalue
    distinct = np.random.default_rng(4).normal(0.2, 1, 45)
    assert wilcoxon_p(distinct) == pytest.approx(stats.wilcoxon(distinct, method="exact").pvalue, rel=1e-9)


def _power(effect, n, level):
    """P(|Z + sqrt(n) effect| > t chi / sqrt(n - 1)), integrated over the density of chi."""
    critical, shift = stats.t.isf(level / 2, n - 1), math.sqrt(n) * effect

    def given(chi):
        bound = critical * chi / math.sqrt(n - 1)
        return (stats.norm.sf(bound - shift) + stats.norm.cdf(-bound - shift)) * stats.chi.pdf(chi, n - 1)

    ends = [0.0, *stats.chi.ppf([1e-4, 0.5, 1 - 1e-4], n - 1), stats.chi.isf(1e-12, n - 1)]
    return sum(integrate.quad(given, *pair, limit=200)[0] for pair in itertools.pairwise(ends))


@pytest.mark.parametrize("n", [2, 3, 5, 36, 500])
@pytest.mark.parametrize(("level", "power"), [(0.05, 0.8), (0.01, 0.9), (0.05, 0.2), (1e-4, 0.99)])
def test_smallest_detectable_difference_has_its_power_by_quadrature(n, level, power):
    effect = smallest_detectable(0.3, n, level, power) / 0.3
    assert _power(effect, n, level) == pytest.approx(power, abs=1e-6)
    assert smallest_detectable(0.6, n, level, power) == pytest.approx(0.6 * effect, rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 36])
def test_smallest_detectable_difference_is_statsmodels(n):
    oracle = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8, alternative="two-sided")
    assert smallest_detectable(1.0, n) == pytest.approx(oracle, rel=1e-5)


def test_smallest_detectable_difference_approaches_that_of_a_known_standard_deviation():
    z = stats.norm.isf(0.025) + stats.norm.isf(0.2)  # the other tail is about 1e-6
    assert smallest_detectable(2.0, 10**6) == pytest.approx(2.0 * z / 1000, rel=1e-5)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_a_published_mean_without_spread_is_compared_by_scipys_one_sample_t(n, level):
    x, _ = _pairs(n)
    own = against_published(x, 70.3, margin=0.7, level=level)
    oracle = stats.ttest_1samp(x - 70.3, 0)
    assert (own.n, own.published_exact, own.margin) == (n, True, 0.7)
    assert own.difference == pytest.approx(np.mean(x) - 70.3)
    assert (own.low, own.high) == pytest.approx(oracle.confidence_interval(level), rel=1e-9)
    assert own.p_equivalence == pytest.approx(DescrStatsW(x - 70.3).ttost_mean(-0.7, 0.7)[0], rel=1e-9)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("m", [2, 4, 30])
def test_a_published_mean_with_spread_is_compared_by_welchs_t(n, m):
    x, y = _pairs(n)[0], np.random.default_rng(m).normal(70.5, 0.4, m)
    own = against_published(x, y.mean(), y.std(ddof=1), m, margin=0.8)
    oracle = stats.ttest_ind(x, y, equal_var=False)
    means = CompareMeans(DescrStatsW(x), DescrStatsW(y))
    assert not own.published_exact
    assert own.difference == pytest.approx(np.mean(x) - np.mean(y))
    assert (own.low, own.high) == pytest.approx(oracle.confidence_interval(0.95), rel=1e-9)
    assert (own.low, own.high) == pytest.approx(means.tconfint_diff(usevar="unequal"), rel=1e-9)
    assert own.p_equivalence == pytest.approx(ttost_ind(x, y, -0.8, 0.8, usevar="unequal")[0], rel=1e-9)


@given(st.lists(st.floats(69, 72), min_size=2, max_size=6, unique=True), st.floats(70, 71), st.floats(0.1, 3))
def test_equivalence_is_shown_where_the_90_percent_interval_lies_within_the_margin(x, mean, margin):
    own = against_published(x, mean, margin=margin, level=0.9)
    if own.p_equivalence is not None and abs(own.p_equivalence - 0.05) > 1e-9:
        assert (own.p_equivalence < 0.05) == (-margin < own.low and own.high < margin)


def test_what_a_published_number_leaves_undefined_is_none():
    nothing, one, equal = (against_published(x, 70.0) for x in ([], [70.2], [70.2, 70.2]))
    assert (nothing.n, nothing.difference, nothing.low, nothing.p_equivalence) == (0, None, None, None)
    assert (one.n, one.low, one.high, one.p_equivalence) == (1, None, None, None)
    assert one.difference == pytest.approx(0.2)
    assert equal.low == equal.high == equal.difference == pytest.approx(0.2)
    assert equal.p_equivalence is None
    assert against_published([70.2, 70.2], 70.0, 0.1, 5).p_equivalence is not None
    assert against_published([70.2, 70.3], 70.0, 0.0, 5).published_exact is False
    undefined = (smallest_detectable(0.3, 1), smallest_detectable(None, 5), wilcoxon_p([]), wilcoxon_p([0.0, 0.0]))
    assert undefined == (None, None, None, None)
    assert smallest_detectable(0.0, 3) == 0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: against_published([70.0, 71.0], 70.0, std=0.2), "expected std and n >= 2 of the published mean"),
        (lambda: against_published([70.0, 71.0], 70.0, n=3), "or neither, got std None and n 3"),
        (lambda: against_published([70.0, 71.0], 70.0, 0.2, 1), "got std 0.2 and n 1"),
        (lambda: against_published([70.0, 71.0], 70.0, -0.2, 3), "standard deviation of at least 0, got -0.2"),
        (lambda: against_published([70.0, 71.0], math.nan), "finite published mean"),
        (lambda: against_published([70.0, math.inf], 70.0), "expected finite values"),
        (lambda: against_published([70.0, 71.0], 70.0, margin=0), "positive margin of equivalence, got 0"),
        (lambda: smallest_detectable(math.nan, 5), "standard deviation of at least 0, got nan"),
        (lambda: smallest_detectable(1.0, 5, power=0.01), "expected 0 < level < power < 1"),
        (lambda: wilcoxon_p([math.nan]), "expected finite values"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
