"""A gradient times the inverse of (second moment + damping): the closed form of TrAct.

Pure functions of tensors. Letters: g groups, m outputs, n row length, b rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Damping below this multiple of the float64 rounding of the trace is not representable
# beside the second moment; it is raised to it, so that the factorisation always exists.
_ROUNDINGS_OF_TRACE = 8 * torch.finfo(torch.float64).eps

_INVERTED = 64  # up to this n one product with the inverse is the fastest on a CPU
_ROWS = 512
_SUMMED = 1024  # row elements whose products are added up in float32


def effective_damping(damping: float, trace: Tensor) -> Tensor:
    """The damping that is added: ``damping`` itself unless it drowns in rounding.

    lambda' = max(lambda, 8 eps tr A), with eps of float64 (2.2e-16). For standardised
    inputs (tr A = n) lambda' differs from lambda only below 1e-12.

    Args:
        damping: lambda > 0.
        trace: tr A per group, shape (g,), float64.

    Returns:
        float64 tensor of shape (g,).
    """
    return torch.clamp(trace * _ROUNDINGS_OF_TRACE, min=damping)


def damped_solve(gradient: Tensor, moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """G (A + lambda I)^-1, for a positive semi-definite A.

    Equation: the update of TrAct, arXiv 2410.23970, section 3: the plain weight gradient
    G = dL/dz x^T is replaced by G (x x^T / b + lambda I)^-1.

    Args:
        gradient: G, shape (g, m, n).
        moment: A = X^T X / b, shape (g, n, n), float64.
        damping: lambda > 0.

    Returns:
        The product, shape (g, m, n), float64, and a boolean tensor (no host
        synchronisation) that tells whether the factorisation succeeded.

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)[None]
        >>> damped_solve(eye, 3 * eye, 1.0)[0]
        tensor([[[0.2500, 0.0000],
                 [0.0000, 0.2500]]], dtype=torch.float64)
    """
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    factor, succeeded = damped_factor(moment.clone(), damping, trace)
    return solve_by(gradient, factor), succeeded


def damped_factor(moment: Tensor, damping: float, trace: Tensor) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor L of A + lambda' I = L L^T, for a positive semi-definite A; see :func:`damped_solve`.

    Args:
        moment: A, shape (g, n, n), float64; lambda' is added in place.
        damping: lambda > 0.
        trace: tr A, shape (g,).

    Returns:
        L, shape (g, n, n), and a boolean tensor (no host synchronisation) that tells whether there is one.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    diagonal += effective_damping(damping, trace)[:, None]
    factor, info = torch.linalg.cholesky_ex(moment)
    return factor, info[0] == 0 if len(info) == 1 else (info == 0).all()


def solve_by(gradient: Tensor, factor: Tensor) -> Tensor:
    """G (L L^T)^-1, shape (g, m, n), float64, for G of any dtype, in blocks of its rows: their copies stay small."""
    if gradient.device.type == "cpu" and factor.shape[-1] <= _INVERTED:
        return gradient.to(factor.dtype) @ torch.cholesky_inverse(factor)
    solve = _right_solve if gradient.is_cuda else _right_solve_at_once
    parts = [solve(some.to(factor.dtype), factor) for some in gradient.split(_ROWS, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def damped_solve_dual(output_gradient: Tensor, rows: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The same product from its two sources, with a b x b factorisation, for b < n.

    By the push-through identity, with G = D X, D = dL/dz of shape (m, b), X of shape (b, n):
    G (X^T X / b + lambda I)^-1 = D (X X^T / b + lambda I)^-1 X. Nothing outside the row
    space of X arises on this way, so no rounding of G is multiplied by 1 / lambda.

    Args:
        output_gradient: D, shape (g, m, b).
        rows: X^T, shape (g, n, b), float64, or float32: products are then made in float32, of sums
            of a thousand in float64, and only the b x b factorisation in float64.
        damping: lambda > 0.

    Returns:
        The product, shape (g, m, n), in the dtype of the rows, and whether the factorisation succeeded, as
        :func:`damped_solve`.
    """
    b = rows.shape[-1]
    parts = rows.split(_SUMMED, dim=1) if rows.dtype == torch.float32 else (rows,)
    gram = sum((part.mT @ part).double() for part in parts) / b
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    identity = torch.eye(b, dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram + effective_damping(damping, trace)[:, None, None] * identity)
    return _right_solve(output_gradient.to(gram.dtype), factor).to(rows.dtype) @ rows.mT, (info == 0).all()


def damped_solve_rows(gradient: Tensor, rows: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The same product from the gradient and the rows, with b x b factorisations, for b < n.

    G (X^T X / b + lambda I)^-1 = G X^T (X X^T)^-1 (X X^T / b + lambda I)^-1 X for a G whose rows
    are in the row space of X, as those of a layer's gradient are. What rounding has put outside
    falls away with G X^T, so it is not multiplied by 1 / lambda.

    Args:
        gradient: G, shape (g, m, n).
        rows: X^T, shape (g, n, b), float64; dependent rows are as good as others.
        damping: lambda > 0.

    Returns:
        As :func:`damped_solve`; zero without rows.
    """
    b = rows.shape[-1]
    if b == 0:
        return torch.zeros_like(gradient, dtype=rows.dtype), torch.ones((), dtype=torch.bool, device=rows.device)
    gram = rows.mT @ rows
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    identity = torch.eye(b, dtype=gram.dtype, device=gram.device)
    nearly_zero = (trace * b * _ROUNDINGS_OF_TRACE).clamp(min=torch.finfo(gram.dtype).tiny)
    projection, _ = torch.linalg.cholesky_ex(gram + nearly_zero[:, None, None] * identity)
    factor, info = torch.linalg.cholesky_ex(gram / b + effective_damping(damping, trace / b)[:, None, None] * identity)
    inside = _right_solve(gradient.to(rows.dtype) @ rows, projection)
    return _right_solve(inside, factor) @ rows.mT, (info == 0).all()


def _right_solve(left: Tensor, factor: Tensor) -> Tensor:
    """left (L L^T)^-1 for a lower Cholesky factor L."""
    half = torch.linalg.solve_triangular(factor.mT, left, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def _right_solve_at_once(left: Tensor, factor: Tensor) -> Tensor:
    return torch.cholesky_solve(left.mT, factor).mT
