"""How much earlier a method reaches the accuracy at which the baseline ends.

A curve is ``{x: value}`` of one run, x in epochs or in seconds (:func:`over_seconds`), with larger values
better. A run that never reaches the target is censored: its time is not known, only that its own end came first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.load import expected_epochs

Curve = Mapping[float, float]
_Points = tuple[np.ndarray, np.ndarray]  # x ascending, values


@dataclass(frozen=True)
class Speedup:
    """The baseline's budget over the method's median time to the baseline's final value."""

    n: int  # runs of the method
    n_baseline: int
    censored: int  # runs of the method that never reach the target
    target: float | None  # None without baseline, as is budget
    budget: float | None
    times: dict[int, float | None]  # by seed; None where censored, and without a target
    value: float | None  # None where half of the method's runs or more are censored
    bound: float | None  # in that case the speed-up is smaller than this
    low: float | None  # None where open, down to 0: censoring reaches this quantile
    high: float | None  # None, as is low, for fewer than two runs on either side


def over_seconds(curve: Mapping[int, float], seconds: Mapping[int, float], every: int = 1) -> dict[float, float] | None:
    """A curve over epochs as one over seconds: x(e) = sum of ``seconds`` over the evaluated epochs up to e.

    At an evaluated epoch ``time/epoch_seconds`` holds what passed since the evaluation before, evaluations
    included and interruptions left out.

    Args:
        curve: {epoch: value}.
        seconds: {epoch: seconds since the evaluation before}.
        every: the run's ``eval_every``.

    Returns:
        ``None`` for an empty curve, and where the epochs with seconds up to the curve's last one are not exactly
        the evaluated ones, or their seconds not positive and finite: a sum with gaps would be too early.

    Example:
        >>> over_seconds({1: 50.0, 2: 60.0}, {1: 10.0, 2: 8.0})
        {10.0: 50.0, 18.0: 60.0}
    """
    if not curve or len(seconds) < max(curve) // every:
        return None
    epochs = sorted(expected_epochs(max(curve), every))
    if not set(curve) <= set(epochs) or epochs != sorted(epoch for epoch in seconds if epoch <= max(curve)):
        return None
    if not all(0 < seconds[epoch] < math.inf for epoch in epochs):
        return None
    passed = dict(zip(epochs, np.cumsum([seconds[epoch] for epoch in epochs]).tolist(), strict=True))
    return {passed[epoch]: curve[epoch] for epoch in sorted(curve)}


def time_to_target(curve: Curve, target: float) -> float | None:
    """The first x with value >= target, on straight lines between evaluations.

    x = x_(k-1) + (x_k - x_(k-1)) (target - y_(k-1)) / (y_k - y_(k-1)) with k the first evaluation with
    y_k >= target. Where that is the very first evaluation, x is its x: the crossing came no later.

    Returns:
        ``None`` (censored) where no evaluation reaches the target.

    Raises:
        ValueError: an empty curve, a value that is not finite, an x that is not positive.

    Example:
        >>> time_to_target({1: 50.0, 2: 60.0}, 55.0)
        1.5
    """
    time = float(_crossings(*_points(curve), np.array([target], dtype=float))[0])
    return time if math.isfinite(time) else None


def speedup(
    baseline: Mapping[int, Curve],
    method: Mapping[int, Curve],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Speedup:
    """How many times earlier the method reaches what the baseline reaches in its whole budget.

    target = mean of the baseline's final values, budget = mean of the baseline's final x,
    speed-up = budget / median_i T_i(target), T_i the :func:`time_to_target` of the method's run i.

    Censored runs stand behind all others, so the median is known as long as fewer than half are censored.
    (That understates the speed-up where one ended before others arrived, as may happen in seconds.)
    Otherwise the median lies beyond that of min(T_i, end of run i), which makes ``bound``.

    The interval is the percentile bootstrap over seeds (Efron 1979), drawn from a generator of its own. Where both
    have the same seeds these are drawn together, because runs of one seed share initialisation and order of the
    data: this keeps their correlation, and does no harm where there is none. Otherwise each side is drawn by itself.
    For the lower end censored runs never arrive, and a resample without median leaves it open; for the upper end they
    arrive where they end. No end lies beyond what the seeds show, so with few seeds the interval covers less than
    ``level``: the median of n times to a fixed target at most 1 - 2^(1 - n) (75 % for three seeds, 94 % for five).

    A noisy curve crosses its own final value before its end, so that the baseline against itself has a speed-up
    above 1: compare with ``speedup(baseline, baseline)``. A run that reaches the target before its first evaluation
    counts as its first evaluation, which understates the speed-up.

    Args:
        baseline: {seed: curve}.
        method: {seed: curve}; x in the unit of the baseline's.
        level: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: as :func:`time_to_target`.

    Example:
        >>> base = {0: {1: 50.0, 2: 60.0}, 1: {1: 50.0, 2: 62.0}}
        >>> speedup(base, {0: {1: 61.0, 2: 62.0}, 1: {1: 61.0, 2: 62.0}}).value
        2.0
    """
    base, treated = _runs(baseline), _runs(method)
    if not base or not treated:
        return Speedup(len(treated), len(base), 0, None, None, {}, None, None, None, None)
    budget, target = _last(base).mean(axis=1)
    times = {s: time_to_target(method[s], target) for s in sorted(method)}
    (ratio,), (bound,) = _ratios(base, treated, np.arange(len(base))[None], np.arange(len(treated))[None])
    value, bound = (float(ratio), None) if ratio > 0 else (None, float(bound))
    low = high = None
    if min(len(base), len(treated)) > 1:
        rng = np.random.default_rng(seed)
        chosen_base = rng.integers(len(base), size=(resamples, len(base)))
        together = baseline.keys() == method.keys()
        chosen = chosen_base if together else rng.integers(len(treated), size=(resamples, len(treated)))
        low, high = _percentiles(*_ratios(base, treated, chosen_base, chosen), level)
    censored = sum(time is None for time in times.values())
    counts = len(treated), len(base), censored
    return Speedup(*counts, float(target), float(budget), times, value, bound, low, high)


def _percentiles(ratios: np.ndarray, bounds: np.ndarray, level: float) -> tuple[float | None, float]:
    low = np.quantile(ratios, (1 - level) / 2, method="lower")
    high = np.quantile(bounds, (1 + level) / 2, method="higher")
    return float(low) or None, float(high)


def _ratios(
    baseline: list[_Points], method: list[_Points], chosen_baseline: np.ndarray, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Speed-up of each resample if its censored runs never arrive, 0 without a median, and if they do where they end.

    Args:
        baseline: b runs.
        method: m runs.
        chosen_baseline: indices of runs, resamples x b.
        chosen: indices of runs, resamples x m.
    """
    budgets, targets = _last(baseline)[:, chosen_baseline].mean(axis=2)
    by_run = np.stack([_crossings(x, y, targets) for x, y in method], axis=1)
    times = np.take_along_axis(by_run, chosen, axis=1)
    ratios = budgets / np.median(times, axis=1)
    ends = _last(method)[0][chosen]
    return ratios, budgets / np.median(np.minimum(times, ends), axis=1)


def _crossings(x: np.ndarray, y: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """As :func:`time_to_target` for many targets; infinite where censored."""
    rounded = targets - 1e-12 * np.abs(targets)  # a mean of equal values may be larger than they are
    after = np.searchsorted(np.maximum.accumulate(y), rounded)  # the first evaluation that reaches it, or x.size
    reached, after = after < x.size, np.minimum(after, x.size - 1)
    before = np.maximum(after - 1, 0)
    rise = y[after] - y[before]
    share = np.divide(targets - y[before], rise, out=np.zeros_like(targets), where=rise > 0)
    return np.where(reached, x[before] + np.minimum(share, 1) * (x[after] - x[before]), np.inf)


def _runs(curves: Mapping[int, Curve]) -> list[_Points]:
    return [_points(curves[seed]) for seed in sorted(curves)]


def _points(curve: Curve) -> _Points:
    x = np.array(sorted(curve), dtype=float)
    y = np.array([curve[at] for at in sorted(curve)], dtype=float)
    if x.size == 0:
        raise ValueError("expected a curve of at least one evaluation, got none; leave that run out.")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and x[0] > 0):
        raise ValueError("expected finite values at positive finite x; leave that run out.")
    return x, y


def _last(runs: list[_Points]) -> np.ndarray:
    """2 x runs: the final x, and the final value."""
    return np.array([(x[-1], y[-1]) for x, y in runs]).T
