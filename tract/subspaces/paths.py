"""Subspaces of weights as coefficients of their endpoints: W(alpha) = sum_i c_i(alpha) W_i.

Wortsman et al., arXiv 2102.10472, section 3. A network is trained at a random alpha in every step, so that
all points of the line, curve or simplex become good networks.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    """What draws alpha: :class:`Numbers`, a numpy Generator, or numpy's older RandomState."""

    def uniform(self, low: float, high: float) -> float:
        """One number, uniform in [low, high)."""

    def exponential(self, scale: float, size: int) -> Sequence[float]:
        """Independent numbers of the exponential distribution."""


class Numbers:
    """Random numbers of a place: the same on every machine and rank, whatever was drawn before.

    Args:
        place: whole numbers, such as a seed, what for, and a step.
    """

    def __init__(self, *place: int):
        digest = hashlib.sha256(repr(place).encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def uniform(self, low: float, high: float) -> float:
        """One number, uniform in [low, high)."""
        return low + (high - low) * float(self._unit(()))

    def exponential(self, scale: float, size: int | tuple[int, ...]) -> Tensor:
        """Independent numbers of the exponential distribution, float64."""
        return -scale * torch.log1p(-self._unit(size if isinstance(size, tuple) else (size,)))

    def sample(self, population: Sequence[int], k: int) -> list[int]:
        """So many different ones, in random order."""
        return [population[place] for place in torch.randperm(len(population), generator=self._generator)[:k]]

    def _unit(self, size: tuple[int, ...]) -> Tensor:
        return torch.rand(size, generator=self._generator, dtype=torch.float64)


class Path(ABC):
    """A kind of subspace, with points alpha.

    Attributes:
        endpoints: how many weights W_i span it, control points included.
        size: how many numbers alpha has.
    """

    endpoints: int
    size: int

    @abstractmethod
    def coefficients(self, *alpha: float) -> tuple[float, ...]:
        """The coefficients c_i of the endpoints at a point; they sum to 1.

        Raises:
            ValueError: alpha has another number of numbers.
        """

    @abstractmethod
    def midpoint(self) -> tuple[float, ...]:
        """Alpha in the middle, where the network is evaluated as one."""

    def draw(self, generator: Draws) -> tuple[float, ...]:
        """Alpha uniform in [0, 1)."""
        return (float(generator.uniform(0.0, 1.0)),)

    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of endpoints."""
        return list(combinations(range(self.endpoints), 2))

    def draw_pair(self, generator: Any) -> tuple[int, int]:
        """Two different endpoints, for the regulariser; each pair is equally likely.

        Args:
            generator: :class:`Numbers`, a numpy Generator, or Python's ``random``.

        Raises:
            ValueError: there is one endpoint only.
        """
        if self.endpoints < 2:
            raise ValueError("expected two endpoints or more to draw a pair from, got one; do without a pair.")
        if hasattr(generator, "sample"):
            first, second = generator.sample(range(self.endpoints), 2)
        else:
            first, second = generator.choice(self.endpoints, 2, replace=False)
        return int(first), int(second)

    def _require(self, alpha: tuple[float, ...]) -> None:
        if len(alpha) != self.size:
            raise ValueError(f"expected {self.size} numbers for a point of {self}, got {len(alpha)}: {alpha}.")


@dataclass(frozen=True)
class Line(Path):
    """(1 - a) W_0 + a W_1.

    >>> Line().coefficients(0.25)
    (0.75, 0.25)
    """

    endpoints = 2
    size = 1

    def coefficients(self, *alpha: float) -> tuple[float, ...]:
        """(1 - a, a)."""
        self._require(alpha)
        (a,) = alpha
        return 1 - a, a

    def midpoint(self) -> tuple[float, ...]:
        """a = 1/2."""
        return (0.5,)


@dataclass(frozen=True)
class Curve(Path):
    """(1 - a)^2 W_0 + a^2 W_1 + 2 a (1 - a) W_2, a quadratic Bezier curve from W_0 to W_1 with control point W_2.

    >>> Curve().coefficients(0.5)
    (0.25, 0.25, 0.5)
    """

    endpoints = 3
    size = 1

    def coefficients(self, *alpha: float) -> tuple[float, ...]:
        """((1 - a)^2, a^2, 2 a (1 - a))."""
        self._require(alpha)
        (a,) = alpha
        return (1 - a) ** 2, a**2, 2 * a * (1 - a)

    def midpoint(self) -> tuple[float, ...]:
        """a = 1/2."""
        return (0.5,)


@dataclass(frozen=True)
class Simplex(Path):
    """(1 - sum t) W_0 + sum_i t_i W_i with t_1 to t_{n-1}; with one endpoint it is a plain network.

    >>> Simplex(3).coefficients(0.25, 0.5)
    (0.25, 0.25, 0.5)

    Raises:
        ValueError: n < 1.
    """

    n: int

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"expected a simplex of 1 endpoint or more, got {self.n}.")

    @property
    def endpoints(self) -> int:
        """n."""
        return self.n

    @property
    def size(self) -> int:
        """n - 1."""
        return self.n - 1

    def coefficients(self, *alpha: float) -> tuple[float, ...]:
        """(1 - sum t, t_1, ..., t_{n-1})."""
        self._require(alpha)
        return 1.0 - sum(alpha), *alpha

    def midpoint(self) -> tuple[float, ...]:
        """All t = 1/n."""
        return (1 / self.n,) * self.size

    def draw(self, generator: Draws) -> tuple[float, ...]:
        """Uniform on the simplex: n exponential numbers, divided by their sum; the first is left out."""
        numbers = generator.exponential(1.0, self.n)
        total = sum(numbers)
        return tuple(float(number / total) for number in numbers[1:])


def path_of(name: str, endpoints: int) -> Path:
    """The subspace of this name: "line" (2 endpoints), "curve" (3) or "simplex" (1 or more).

    Raises:
        ValueError: no such name, or another number of endpoints.
    """
    kinds = {"line": Line, "curve": Curve}
    if name == "simplex":
        return Simplex(endpoints)
    if name not in kinds:
        raise ValueError(f"expected a subspace named line, curve or simplex, got {name!r}.")
    path = kinds[name]()
    if endpoints != path.endpoints:
        raise ValueError(
            f"expected {path.endpoints} endpoints for a {name}, got {endpoints}; a simplex may have any number."
        )
    return path
