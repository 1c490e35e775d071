"""Bases of a weight, how stable they are, and the rank that is kept (Coquelin et al., arXiv 2401.08505).

A weight is a matrix of its outputs by everything else, transposed where that is wider than tall: (m, n), m >= n.
W = U Sigma V^h with U of shape (m, k), Sigma of (k, k), V^h of (k, n). The *basis* is U V^h, what is left of W
where all singular values are 1; the *mixing matrix* is R of W = Q R.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOOR = 0.01  # share of n singular values that are never cut off


class Factors(NamedTuple):
    """U (m, k), the diagonal of Sigma (k,), V^h (k, n), in float64."""

    u: Tensor
    sigma: Tensor
    vh: Tensor


def tall(weight: Tensor) -> Tensor:
    """The weight as (m, n), m >= n; a view."""
    matrix = weight.flatten(1)
    return matrix.mT if is_transposed(weight.shape) else matrix


def is_transposed(shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether a weight of this shape has fewer outputs than numbers for each."""
    return shape[0] < torch.Size(shape[1:]).numel()


def decomposed(weight: Tensor, rank: int | None = None) -> Factors:
    """The first ``rank`` singular values and vectors of a weight; without it all n.

    Args:
        weight: shape (outputs, ...), finite.
        rank: 1 to n.
    """
    u, sigma, vh = signed_svd(tall(weight.detach()).double())
    return Factors(u[:, :rank], sigma[:rank], vh[:rank])


def signed_svd(matrix: Tensor) -> Factors:
    """The reduced SVD; of each left singular vector the entry that is largest in size is positive.

    So that small differences (of hardware, precision, order of sums) do not turn a direction round.
    """
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return Factors(u * signs, sigma, signs.mT * vh)


def basis(u: Tensor, vh: Tensor) -> Tensor:
    """U V^h, shape (m, n), float64."""
    return u.detach().double() @ vh.detach().double()


def stability(one: Tensor, other: Tensor) -> Tensor:
    """Mean over columns of the cosine between two bases: 1 where nothing has turned, about 0 for unrelated ones."""
    return F.cosine_similarity(one, other, dim=0).mean()


def mixing(matrix: Tensor) -> Tensor:
    """R of the QR decomposition, its diagonal made non-negative so that it is unique at full rank.

    Args:
        matrix: (m, n), or Sigma V^h, which has the same R where U is orthonormal.
    """
    r = torch.linalg.qr(matrix.detach().double(), mode="r").R
    return r * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)[:, None]


def mixing_distance(one: Tensor, other: Tensor) -> Tensor:
    """Euclidean distance of the mixing matrices of two matrices, |R_1 - R_2|_F."""
    return torch.linalg.vector_norm(mixing(one) - mixing(other))


def floor_of(n: int) -> int:
    """The rank below which a layer with n columns is never cut."""
    return int(_FLOOR * n)


def kept_rank(sigma: Tensor, fraction: float, before: int, n: int) -> int:
    """How many singular values an update keeps: those before the first that is below ``fraction`` of the largest.

    At least half of what there was before, int(before / 2), where that is more than int(n / 100); else at
    least int(n / 100); and at least one.

    Args:
        sigma: shape (k,), in descending order.
        fraction: of the largest.
        before: the rank until now.
        n: the smaller side of the weight.
    """
    half, floor = before // 2, floor_of(n)
    return max(_first_below(sigma, fraction * sigma[0]), half if half > floor else min(floor, before), 1)


def stable_rank(sigma: Tensor, fraction: float, n: int) -> int:
    """How many a layer keeps when its basis has become stable: no half is kept, and the largest don't count.

    Cut is what is below ``fraction`` of the singular value number int(n / 100), counted from 0.
    """
    return max(_first_below(sigma, fraction * sigma[min(floor_of(n), len(sigma) - 1)]), 1)


def _first_below(sigma: Tensor, cutoff: Tensor) -> int:
    below = (sigma < cutoff).nonzero()
    return int(below[0]) if len(below) else len(sigma)


def blurred(sigma: Tensor, draws: Tensor, influence: float = 0.05) -> Tensor:
    """A mixing matrix that has a little of each later direction in it: S_ij = sigma_j K_ij for i <= j, else 0.

    K_ij = exp(-|R_i - R_j|^2 / (2 influence^2)) with the rows R_i of R_ij = r_ji i / k. An option of the
    authors' code for the moment of conversion; the method here does without.

    Args:
        sigma: the singular values, shape (k,).
        draws: r, uniform numbers from [0, 1), shape (k, k).
        influence: how far apart rows may be.
    """
    count = len(sigma)
    places = (draws * torch.arange(count, device=draws.device)).mT / count
    return sigma * torch.exp(-torch.cdist(places, places).square() / (2 * influence**2)).triu()
