"""Conjugate gradients for (A^T A + delta I) d = b, with A as a pair of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Variant = Literal["standard", "stabilised", "original"]
VARIANTS = get_args(Variant)
Normal = Callable[[Tensor], tuple[Tensor, Callable[[], Tensor]]]

# What the original ProxProp adds to denominators, and the share of the first residual at which it stops.
_ADDED = 1e-6
_TOLERANCE = 1e-2


def conjugate_gradients(b: Tensor, normal: Normal, delta: float, steps: int, variant: Variant = "standard") -> Tensor:
    """At most ``steps`` iterations from d = 0; every row of ``b`` is a system of its own with the same A.

    Equations (Hestenes and Stiefel, 1952), with r_0 = p_1 = b:
    a_k = |r|^2 / (|A p|^2 + delta |p|^2), d += a_k p, r -= a_k (A^T A + delta) p,
    p_k+1 = r_k + p_k |r_k|^2 / |r_k-1|^2. The last iteration needs no A^T, so that ``steps``
    iterations take ``steps`` products with A and one less with A^T.

    Args:
        b: right-hand sides, shape (c, n).
        normal: gives for directions p, shape (c, n), the numbers |A p|^2, shape (c,), and a
            function that returns A^T A p, shape (c, n).
        delta: > 0.
        steps: N >= 1.
        variant: "standard"; "stabilised" as ProxProp's authors do it, who add 1e-6 to both
            denominators and stop where the largest |r|^2 is below 1e-4 of the mean |b|^2 (for
            gradients of 1e-3 and smaller the 1e-6 is all there is); "original" is their code,
            where r and p are one tensor in the first iteration, so that
            p_2 = r_1 (1 + |r_1|^2 / |r_0|^2) is no conjugate direction.

    Returns:
        d, shape (c, n). A row that is solved stays as it is.
    """
    added = 0.0 if variant == "standard" else _ADDED
    d, residual, direction = torch.zeros_like(b), b, b
    squared = first = b.square().sum(-1)
    for step in range(1, steps + 1):
        image_squared, transposed = normal(direction)
        curvature = image_squared + delta * direction.square().sum(-1)
        length = _quotient(squared, curvature + added)[:, None]
        d = d + length * direction
        if step == steps:
            break
        residual = residual - length * (transposed() + delta * direction)
        before, squared = squared, residual.square().sum(-1)
        if variant != "standard" and squared.max() < _TOLERANCE**2 * first.mean():
            break
        last = residual if variant == "original" and step == 1 else direction
        direction = residual + _quotient(squared, before + added)[:, None] * last
    return d


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, torch.zeros_like(a))
