"""What a check changes: a layer becomes low-rank, or Sigma is made diagonal again and its small end cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from tract.distributed import world_size
from tract.oialr.bases import Factors, basis, kept_rank, mixing_distance, signed_svd, stability
from tract.oialr.layers import LowRankLayer
from tract.parameters import Move

Moments = Literal["rotated", "original"]
MOMENTS = ("rotated", "original")
# What optimizers call the mean (or sum) of the squares of gradients, and what is linear in gradients or weights.
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum"}
_LINEAR = {"exp_avg", "momentum_buffer", "ax"}


def can_move(state: dict, parameter: Tensor) -> bool:
    """Whether all tensors of an optimizer's state of a parameter are of a known kind and of its shape.

    Others (factored second moments, largest values, step sizes, a mean beside a mean of squares) start anew.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.ndim}
    return all(n in _SQUARES | _LINEAR and t.shape == parameter.shape for n, t in tensors.items())


def projected(u: Tensor, moment: Tensor, vh: Tensor, squares: bool) -> Tensor:
    """What a moment of the gradient G (m, n) of W says of the gradient U^T G V (k, k) of Sigma.

    Linear state is projected as the gradient is. Means of squares are projected with the squares of U and V,
    which is exact where the entries of G are independent with mean 0.
    """
    u, vh, moment = u.double(), vh.double(), moment.double()
    if squares:
        u, vh = u.square(), vh.square()
    return u.mT @ moment @ vh.mT


def moved(left: Tensor, right: Tensor, moments: Moments) -> Move:
    """How the optimizer's state of Sigma follows when Sigma becomes ``left``^T Sigma ``right``^T.

    Args:
        left: U' of the update, shape (k, k').
        right: V'^h, shape (k', k).
        moments: "rotated" with the bases, or "original", cut to the first k' rows and columns.
    """

    def move(name: str, moment: Tensor) -> Tensor:
        if moments == "original":
            kept = right.shape[0]
            return moment[:kept, :kept].clone()
        return projected(left, moment, right, name in _SQUARES).to(moment)

    return move


def converted_moments(factors: Factors, shape_of: Callable[[Tensor], Tensor], moments: Moments) -> Move:
    """How the optimizer's state of W becomes Sigma's.

    Args:
        factors: of the new layer.
        shape_of: makes a tensor of the weight's shape tall.
        moments: "rotated", projected on the bases, or "original", zero.
    """

    def move(name: str, moment: Tensor) -> Tensor:
        rank = len(factors.sigma)
        if moments == "original":
            return moment.new_zeros(rank, rank)
        return projected(factors.u, shape_of(moment), factors.vh, name in _SQUARES).to(moment)

    return move


def updated(layer: LowRankLayer, fraction: float) -> tuple[Tensor, ...]:
    """SVD(Sigma) = U' diag(sigma) V'^h, of which the first singular values are kept.

    Args:
        layer: of which rank.
        fraction: see :func:`tract.oialr.bases.kept_rank`.

    Returns:
        U' (k, k'), sigma (k',), V'^h (k', k), and (Stability, distance of the mixing matrix) since the last check,
        all float64.
    """
    u, s, vh = (parameter.detach().double() for parameter in (layer.u, layer.s, layer.vh))
    left, sigma, right = signed_svd(s)
    rank = kept_rank(sigma, fraction, int(layer.rank), min(layer.u.shape[0], layer.vh.shape[1]))
    left, right = left[:, :rank], right[:rank]
    turned = stability(basis(u, vh), basis(u @ left, right @ vh))
    apart = mixing_distance(torch.diag(layer.checked.double()) @ vh, s @ vh)
    return left, sigma[:rank], right, torch.stack([turned, apart])


@torch.no_grad()
def apply_update(layer: LowRankLayer, update: Sequence[Tensor], reshape: bool) -> tuple[Tensor, Tensor]:
    """U <- U U', V^h <- V'^h V^h, Sigma <- diag(sigma), in new parameters.

    Args:
        layer: changed in place.
        update: of :func:`updated`.
        reshape: False keeps the shapes: what is cut off becomes zero; nothing is cut where the rank stays.

    Returns:
        U' and V'^h as they were used.
    """
    left, sigma, right, (turned, apart) = update
    before, rank = len(layer.s), len(sigma)
    layer.stability.fill_(turned)
    layer.distance.fill_(apart)
    if not reshape and before > rank:
        full_left, full_sigma, full_right = signed_svd(layer.s.detach().double())
        if rank < int(layer.rank):
            full_left[:, rank:], full_sigma[rank:], full_right[rank:] = 0, 0, 0
        left, sigma, right = full_left, full_sigma, full_right
    layer.rank.fill_(rank)
    new = {"u": layer.u.double() @ left, "s": torch.diag(sigma), "vh": right @ layer.vh.double()}
    for name, value in new.items():
        old = layer._parameters[name]
        layer._parameters[name] = nn.Parameter(value.to(old).contiguous(), requires_grad=old.requires_grad)
    layer.checked = sigma.to(layer.s)
    return left, right


def from_owners(wanted: Sequence[int], computed: Callable[[int], Sequence[Tensor]], device: torch.device) -> list:
    """The results for each number, of which rank ``number mod world`` computes one and the others get it.

    Every rank makes the call, with the same numbers. The tensors are float64, of at most two dimensions.
    """
    world = world_size()
    if world == 1:
        return [computed(number) for number in wanted]
    own = {number: computed(number) for number in wanted if number % world == dist.get_rank()}
    return [_broadcast(own.get(number), number % world, device) for number in wanted]


def _broadcast(tensors: Sequence[Tensor] | None, source: int, device: torch.device) -> list[Tensor]:
    """Tensors of the rank ``source`` on every rank: first how many and of which shapes, then all in one."""
    head = torch.zeros(16, dtype=torch.int64, device=device)
    if tensors is not None:
        shapes = [len(tensors), *(size for t in tensors for size in (t.ndim, *t.shape, *[0] * (2 - t.ndim)))]
        head[: len(shapes)] = torch.tensor(shapes)
    dist.broadcast(head, source)
    count, *numbers = head.tolist()
    shapes = [tuple(numbers[3 * i + 1 : 3 * i + 1 + numbers[3 * i]]) for i in range(count)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    packed = torch.empty(sum(sizes), dtype=torch.float64, device=device)
    if tensors:
        torch.cat([tensor.detach().to(packed).flatten() for tensor in tensors], out=packed)
    if count:
        dist.broadcast(packed, source)
    return [part.view(shape) for part, shape in zip(packed.split(sizes), shapes, strict=True)]
