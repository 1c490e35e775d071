"""Speed-ups of curves whose crossings are known, with and without runs that never cross."""

import doctest
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis import speedup as module
from analysis.speedup import over_seconds, speedup, time_to_target

CURVES = st.lists(st.integers(0, 30), min_size=1, max_size=12).map(lambda y: dict(enumerate(map(float, y), start=1)))


def _line(slope, end=100, start=1):
    """Rises from the origin: reaches y at y / slope."""
    return {x: slope * x for x in range(start, end + 1)}


def _lines(slopes, **options):
    return {seed: _line(slope, **options) for seed, slope in enumerate(slopes)}


def test_examples_in_the_documentation_are_true():
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@given(CURVES, st.integers(-2, 66))
def test_time_to_target_is_the_first_point_of_the_interpolated_curve_that_is_high_enough(curve, doubled):
    target = doubled / 2
    fine = np.linspace(1, len(curve), 400 * (len(curve) - 1) + 1)
    high = fine[np.interp(fine, list(curve), list(curve.values())) >= target - 1e-9]
    time = time_to_target(curve, target)
    assert (time is None) == (high.size == 0)
    if time is not None:
        assert high[0] - 1 / 400 - 1e-9 <= time <= high[0] + 1e-9


@given(CURVES, st.randoms())
def test_time_to_target_does_not_depend_on_the_order_of_keys_and_follows_the_unit(curve, random):
    shuffled = list(curve.items())
    random.shuffle(shuffled)
    time = time_to_target(curve, 11.3)
    assert time_to_target(dict(shuffled), 11.3) == time
    if time is not None:
        assert time_to_target({8 * x: y for x, y in curve.items()}, 11.3) == 8 * time
        assert time_to_target(curve, 9.1) <= time


def test_time_to_target_at_the_edges():
    curve = {2: 50.0, 4: 60.0, 6: 58.0, 8: 70.0}
    assert time_to_target(curve, 40.0) == time_to_target(curve, 50.0) == 2  # no later than the first evaluation
    assert (time_to_target(curve, 60.0), time_to_target(curve, 61.0)) == (4, 6.5)  # the dip is part of the line
    assert (time_to_target(curve, 70.0), time_to_target(curve, 70.1)) == (8, None)


def test_speedup_of_lines_is_known():
    base, method = _lines([0.5, 0.7, 0.6]), _lines([1.2, 2.4, 0.8, 1.5])  # they end at 50, 70 and 60
    own = speedup(base, method)
    assert (own.n, own.n_baseline, own.censored) == (4, 3, 0)
    assert (own.target, own.budget, own.bound) == (pytest.approx(60), 100, None)
    assert own.times == pytest.approx({0: 50, 1: 25, 2: 75, 3: 40})
    assert own.value == pytest.approx(100 / 45)
    assert 100 / 75 * 50 / 60 <= own.low < own.value < own.high <= 100 / 25 * 70 / 50


def test_budget_is_the_mean_of_where_the_baseline_ends():
    base = {0: {1: 10.0, 90: 60.0}, 1: {1: 10.0, 110: 60.0}, 2: {1: 10.0, 130: 60.0}}
    assert speedup(base, {5: _line(1.0)}).budget == 110
    assert speedup(base, {5: _line(1.0)}).value == pytest.approx(110 / 60)


def test_a_run_of_equal_final_values_reaches_their_mean():
    curve = {1: 0.05, 2: 0.1}  # (0.1 + 0.1 + 0.1) / 3 > 0.1
    own = speedup(dict.fromkeys(range(3), curve), dict.fromkeys(range(3), curve))
    assert (own.censored, own.value, own.low, own.high) == (0, 1, 1, 1)


@pytest.mark.parametrize(
    ("slopes", "censored", "value", "bound"),
    [
        ([2, 1, 0.3], 1, 1.0, None),  # times 50, 100, censored
        ([2, 0.3, 0.2], 2, None, 1.0),
        ([2, 4, 0.3, 0.2], 2, None, 100 / 75),  # times 25, 50, and two beyond 100: the median is beyond 75
        ([2, 4, 5, 0.3], 1, 100 / 37.5, None),
        ([0.3, 0.2, 0.1], 3, None, 1.0),
    ],
)
def test_censored_runs_stand_behind_all_others(slopes, censored, value, bound):
    own = speedup(_lines([1.0, 1.0]), _lines(slopes))
    assert own.censored == sum(time is None for time in own.times.values()) == censored
    assert (own.value, own.bound) == (pytest.approx(value), pytest.approx(bound))
    # The same by letting the censored runs go on: wherever they cross, the statement stays true.
    for later in (101, 130, 1e6):
        times = sorted(later if time is None else time for time in own.times.values())
        went_on = 100 / np.median(times)
        assert went_on == pytest.approx(value) if value else went_on < bound


def test_an_interval_is_open_below_where_censoring_reaches_its_quantile():
    base = dict.fromkeys(range(8), _line(1.0))
    rare = speedup(base, _lines([2, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 0.1]))
    often = speedup(base, _lines([2, 2.1, 2.2, 2.3, 2.4, 0.1, 0.1, 0.1]))
    most = speedup(base, _lines([2, 2.1, 2.2, 0.1, 0.1, 0.1, 0.1, 0.1]))
    never = speedup(base, _lines([0.1] * 8))
    assert rare.low >= 2  # four of eight draws of the one run: 0.013
    assert (often.low, most.low, never.low) == (None, None, None)
    assert often.value is not None
    assert often.value < often.high <= 2.4
    assert most.value is None
    assert most.bound < most.high <= 2.2
    assert (never.bound, never.high) == (1, 1)


def test_what_is_not_defined_is_none_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing, one = speedup({}, _lines([1.0])), speedup(_lines([1.0]), _lines([2.0]))
        lonely, censored = speedup(_lines([1.0, 1.0]), {}), speedup(_lines([1.0, 1.0]), _lines([0.5, 0.5]))
    assert (nothing.n, nothing.n_baseline, nothing.target, nothing.value, nothing.times) == (1, 0, None, None, {})
    assert (lonely.n, lonely.value, lonely.bound, lonely.high) == (0, None, None, None)
    assert (one.value, one.low, one.high) == (2, None, None)
    assert (censored.censored, censored.value, censored.bound) == (2, None, 1)


def test_censored_runs_never_arrive_for_the_lower_end_and_arrive_where_they_end_for_the_upper_one():
    base = _lines(np.linspace(0.9, 1.1, 9))
    arrived = _lines(np.linspace(1.1, 1.3, 8))
    own, early, never = (speedup(base, arrived | {8: curve}) for curve in ({20: 1.0}, {20: 1e9}, {10**6: 1.0}))
    assert (own.censored, never.censored, early.censored) == (1, 1, 0)
    assert own.value == never.value < early.value
    assert (own.low, own.high) == (never.low, early.high)
    assert (early.low > own.low, own.high > never.high) == (True, True)


def test_an_open_end_is_never_mixed_with_a_known_one():
    base, method = dict.fromkeys(range(5), _line(1.0)), _lines([2, 2.1, 2.2, 0.1, 0.1])
    found = [speedup(base, method, resamples=5, seed=seed).low for seed in range(30)]
    assert all(low is None or low >= 2 for low in found)
    assert 0 < found.count(None) < 30


def test_the_interval_is_the_same_every_time_and_leaves_the_global_generator_alone():
    slopes = np.random.default_rng(0).uniform(1, 1.3, (2, 9))
    base, method = _lines(slopes[0]), _lines(2 * slopes[1])
    before = np.random.get_state()[1].tolist()
    assert speedup(base, method) == speedup(base, method) == speedup(base, dict(reversed(method.items())))
    assert np.random.get_state()[1].tolist() == before
    assert speedup(base, method, seed=1).low != speedup(base, method).low


def test_the_speedup_has_no_unit():
    base, method = _lines([1, 1.1, 1.2]), _lines([2, 0.5, 3])
    in_seconds = [{s: {8 * x: y for x, y in curve.items()} for s, curve in side.items()} for side in (base, method)]
    own, other = speedup(base, method), speedup(*in_seconds)
    assert (own.value, own.low, own.high) == pytest.approx((other.value, other.low, other.high))


def _ratio(base, method):
    """The speed-up of lines by the formula: it ends at 100 slope, and reaches y at y / slope."""
    target = np.mean(100 * np.asarray(base), axis=-1)
    return 100 / np.median(target[..., None] / np.asarray(method), axis=-1)


def _is_between_scipys_quantiles(ends, oracle, resamples):
    for end, share in zip(ends, (0.025, 0.975), strict=True):
        error = 5 * math.sqrt(2 * share * (1 - share) / resamples)  # two simulated quantiles
        low, high = np.quantile(oracle.bootstrap_distribution, [share - error, share + error])
        assert low - 1e-12 <= end <= high + 1e-12
        assert high - low < 0.25 * np.ptp(oracle.bootstrap_distribution)


@pytest.mark.parametrize("together", [True, False])
def test_without_censoring_the_interval_is_scipys_bootstrap(together):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.9, 1.1, 9)
    method = 2 * base + rng.normal(0, 0.03, 9)
    own = speedup(_lines(base), {seed + (not together): _line(slope) for seed, slope in enumerate(method)})

    def statistic(i, j, axis):
        return _ratio(base[i.astype(int)], method[j.astype(int)])

    options = {"paired": together, "n_resamples": 10_000, "method": "percentile", "rng": 1, "vectorized": True}
    oracle = stats.bootstrap((np.arange(9.0), np.arange(9.0)), statistic, **options)
    assert own.value == pytest.approx(_ratio(base, method))
    _is_between_scipys_quantiles((own.low, own.high), oracle, 10_000)


def test_runs_of_the_same_seeds_are_drawn_together():
    base = np.linspace(0.8, 1.2, 9)
    paired = speedup(_lines(base), _lines(2 * base))
    apart = speedup(_lines(base), {seed + 1: _line(2 * slope) for seed, slope in enumerate(base)})
    assert paired.value == apart.value
    assert paired.high - paired.low < 0.8 * (apart.high - apart.low)


@pytest.mark.parametrize("n", [5, 7, 11, 19])
def test_with_a_fixed_target_the_ends_are_order_statistics_known_from_the_binomial_distribution(n):
    """The bootstrap's median of odd n is at most the j-th time where more than half of n draws are among the j."""
    slopes = np.sort(np.random.default_rng(n).uniform(1.5, 3, n))
    own = speedup(dict.fromkeys(range(n), _line(1.0)), _lines(slopes))
    reached = stats.binom.sf(n // 2, n, np.arange(1, n + 1) / n)
    first = int(np.argmax(reached >= 0.025))
    assert abs(reached - 0.025).min() > 4 * math.sqrt(0.025 * 0.975 / 10_000)  # the simulation finds the same one
    assert (own.low, own.high) == pytest.approx((slopes[first], slopes[n - 1 - first]))


@pytest.mark.parametrize(("n", "stated"), [(3, 0.75), (5, 0.94)])
def test_few_seeds_cover_as_documented(n, stated):
    rng, trials, hits = np.random.default_rng(n), 1500, 0
    base = dict.fromkeys(range(n), _line(1.0, start=100))
    for slopes in 2 * np.exp(rng.normal(0, 0.1, (trials, n))):
        own = speedup(base, _lines(slopes, start=20), resamples=1000)  # the median time is 100 / 2
        hits += own.low <= 2 <= own.high
    exact = 1 - 2.0 ** (1 - n)
    assert exact == pytest.approx(stated, abs=0.005)
    assert abs(hits / trials - exact) < 4 * math.sqrt(exact * (1 - exact) / trials)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("late", [0.0, 0.2])
def test_the_interval_covers_the_true_speedup(together, late):
    """20 seeds; with ``late`` that share of runs never arrives, and the true median is the quantile of the others."""
    n, trials, rng = 20, 500, np.random.default_rng([together, round(10 * late)])
    true = 1.5 * math.exp(0.1 * stats.norm.isf(0.5 / (1 - late)))
    hits = 0
    for _ in range(trials):
        base = rng.normal(1.0, 0.02, n)
        slopes = np.where(rng.random(n) < late, 0.1, 1.5 * np.exp(rng.normal(0, 0.1, n)))
        method = {seed + (not together): _line(slope, start=40) for seed, slope in enumerate(slopes)}
        own = speedup(_lines(base, start=99), method, resamples=500, seed=1)
        hits += (own.low or 0) <= true <= own.high
    assert abs(hits / trials - 0.95) < 0.02 + 4 * math.sqrt(0.95 * 0.05 / trials)  # a percentile interval of 20 seeds


def test_seconds_are_cumulated_over_the_evaluated_epochs():
    curve, seconds = {2: 50.0, 4: 60.0, 5: 61.0}, {2: 20.0, 4: 18.0, 5: 9.5}
    assert over_seconds(curve, seconds, every=2) == {20.0: 50.0, 38.0: 60.0, 47.5: 61.0}
    assert over_seconds({1: 50.0}, {1: 3.0, 2: 4.0}) == {3.0: 50.0}  # later epochs do not matter
    assert over_seconds({2: 50.0, 1: 40.0}, {2: 1.0, 1: 3.0}) == {3.0: 40.0, 4.0: 50.0}
    assert over_seconds({1: 40.0, 3: 50.0}, {1: 1.0, 2: 1.0, 3: 1.0}) == {1.0: 40.0, 3.0: 50.0}


@pytest.mark.parametrize(
    ("curve", "seconds", "every"),
    [
        ({}, {}, 1),
        ({1: 50.0, 2: 60.0}, {1: 3.0}, 1),
        ({1: 50.0, 2: 60.0}, {2: 3.0}, 1),
        ({1: 50.0, 3: 60.0}, {1: 3.0, 3: 3.0}, 1),  # epoch 2 is missing in both
        ({1: 50.0, 2**62: 60.0}, {1: 3.0, 2**62: 3.0}, 1),  # nobody counts so far
        ({2: 50.0, 4: 60.0}, {2: 3.0, 4: 3.0}, 1),  # evaluated every two epochs, which the caller must say
        ({2: 50.0, 4: 60.0}, {1: 3.0, 2: 3.0, 3: 3.0, 4: 3.0}, 2),  # seconds of other evaluations
        ({1: 40.0, 2: 50.0, 4: 60.0}, {2: 3.0, 4: 3.0}, 2),
        ({1: 50.0}, {1: math.nan}, 1),
        ({1: 50.0}, {1: math.inf}, 1),
        ({1: 50.0}, {1: 0.0}, 1),
    ],
)
def test_seconds_with_a_gap_are_refused(curve, seconds, every):
    assert over_seconds(curve, seconds, every) is None


@pytest.mark.parametrize("curve", [{}, {1: math.nan}, {1: math.inf}, {0: 50.0, 1: 60.0}, {math.inf: 50.0}])
def test_bad_curves_are_refused_in_a_sentence(curve):
    for call in (lambda: time_to_target(curve, 50.0), lambda: speedup({0: curve}, {0: _line(1.0)})):
        with pytest.raises(ValueError, match="expected .*; leave that run out"):
            call()
