"""Weights made of several trained networks' weights: what subspaces are compared with in arXiv 2102.10472.

Networks come as state dicts of one architecture. Tensors of floating point are averaged, in float64; others
(counters) are the first network's. Batch-norm statistics of the result mean nothing: estimate them anew
(:func:`tract.subspaces.norm.reestimated`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
Level = Literal["global", "layer", "weight"]
_STATISTICS = ("running_mean", "running_var")


class Exponential(Protocol):
    """What draws weights: :class:`tract.subspaces.paths.Numbers`, a numpy Generator, or numpy's older RandomState."""

    def exponential(self, scale: float, size: int | tuple[int, ...]) -> Sequence[float]:
        """Independent numbers of the exponential distribution."""


def average(states: Sequence[State], weights: Sequence[float] | None = None) -> State:
    """sum_i w_i theta_i; without weights the mean.

    Args:
        states: one state dict for each network.
        weights: one number for each; they are taken as they are, so that they should sum to 1.

    Raises:
        ValueError: no states, states of different keys or shapes, or another number of weights.
    """
    _require_alike(states)
    weights = [1 / len(states)] * len(states) if weights is None else list(weights)
    if len(weights) != len(states):
        raise ValueError(f"expected a weight for each of {len(states)} states, got {len(weights)}.")
    shares = torch.tensor(weights, dtype=torch.float64)
    return _combined(states, lambda _, values: _weighted(values, shares))


def random_average(states: Sequence[State], generator: Exponential, level: Level = "global") -> State:
    """A random point of the simplex that the networks span, uniform by exponential weights.

    Args:
        states: one state dict for each network.
        generator: draws n numbers for each level, in the order of the keys.
        level: "global" draws once; "layer" once for each module that holds tensors; "weight" for every single
            number of every parameter (running statistics get the mean).

    Raises:
        ValueError: no such level, or as :func:`average`.
    """
    _require_alike(states)
    if level not in ("global", "layer", "weight"):
        raise ValueError(f"expected the level global, layer or weight, got {level!r}.")
    count, drawn = len(states), {}

    def one(name: str, values: Tensor) -> Tensor:
        prefix, _, leaf = name.rpartition(".")
        if level == "weight":
            if leaf in _STATISTICS:
                return values.mean(0)
            return _weighted(values, _shares(generator, (count, *values.shape[1:])))
        place = prefix if level == "layer" else ""
        if place not in drawn:
            drawn[place] = _shares(generator, (count,))
        return _weighted(values, drawn[place])

    return _combined(states, one)


def swag_sample(states: Sequence[State], generator: torch.Generator) -> State:
    """A sample of SWAG (Maddox et al., arXiv 1902.02476, equation 1), with the snapshots as its low-rank part.

    mean + sd z / sqrt(2) + sum_i (theta_i - mean) z_i / sqrt(2 (n - 1)), where sd is the root of the mean of
    (theta_i - mean)^2, z has one standard normal number for each weight and z_i one for each snapshot.

    Args:
        states: n >= 2 snapshots of one training.
        generator: of torch, on any device; draws z for all tensors at once and then the z_i.

    Raises:
        ValueError: one snapshot only, which has no covariance, or as :func:`average`.
    """
    _require_alike(states)
    count = len(states)
    if count < 2:
        raise ValueError("expected two snapshots or more, whose covariance SWAG samples from, got one.")
    floats = {name: value for name, value in states[0].items() if value.is_floating_point()}
    if not floats:
        raise ValueError("expected states with tensors of floating point, got none.")
    like = next(iter(floats.values()))
    sizes = [value.numel() for value in floats.values()]
    options = {"generator": generator, "device": generator.device}
    noise = torch.randn(sum(sizes), dtype=like.dtype, **options).to(like.device).split(sizes)
    noise = dict(zip(floats, noise, strict=True))
    shares = torch.cat([torch.randn(1, **options) for _ in states]).double()

    def one(name: str, values: Tensor) -> Tensor:
        mean = values.mean(0)
        apart = values - mean
        deviation = apart.square().mean(0).sqrt()  # of squares, so that it is never that of a negative number
        low_rank = _weighted(apart, shares) / (2 * (count - 1)) ** 0.5
        return mean + deviation * noise[name].view_as(mean).double() / 2**0.5 + low_rank

    return _combined(states, one)


def endpoint_weights(t: float, j: int, n: int) -> tuple[float, ...]:
    """Weight t on snapshot j of n, (1 - t) / (n - 1) on each other one.

    >>> endpoint_weights(0.5, 1, 3)
    (0.25, 0.5, 0.25)

    Raises:
        ValueError: no such snapshot, or one snapshot only with t other than 1.
    """
    if not 0 <= j < n:
        raise ValueError(f"expected a snapshot from 0 to {n - 1}, got {j}.")
    if n == 1:
        if t != 1:
            raise ValueError(f"expected t = 1 for a single snapshot, got {t}; nothing else could have the rest.")
        return (1.0,)
    return tuple(t if i == j else (1 - t) / (n - 1) for i in range(n))


def _combined(states: Sequence[State], one: Callable[[str, Tensor], Tensor]) -> State:
    result = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            values = torch.stack([state[name].detach().double() for state in states])
            result[name] = one(name, values).to(first.dtype)
        else:
            result[name] = first.clone()
    return result


def _weighted(values: Tensor, shares: Tensor) -> Tensor:
    shares = shares.to(values.device)
    return (values * shares.reshape(*shares.shape, *[1] * (values.ndim - shares.ndim))).sum(0)


def _shares(generator: Exponential, size: tuple[int, ...]) -> Tensor:
    numbers = torch.as_tensor(generator.exponential(1.0, size), dtype=torch.float64)
    return numbers / numbers.sum(0)


def _require_alike(states: Sequence[State]) -> None:
    if not states:
        raise ValueError("expected one state dict or more, got none.")
    for index, state in enumerate(states):
        if state.keys() != states[0].keys():
            names = ", ".join(sorted(state.keys() ^ states[0].keys())[:5])
            raise ValueError(f"expected state dicts with the same keys, got {names} in state 0 or {index} alone.")
        for name, value in state.items():
            if value.shape != states[0][name].shape:
                raise ValueError(
                    f"expected {name} of shape {tuple(states[0][name].shape)} in all states, "
                    f"got {tuple(value.shape)} in state {index}."
                )
