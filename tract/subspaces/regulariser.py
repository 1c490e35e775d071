"""How far apart the endpoints of a subspace are: one cosine and one distance over all of its matrices.

v_i is the concatenation of endpoint i's weights of all convolutions and linear layers, without norms and biases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tract.subspaces.layers import WITH_MATRIX, subspace_layers
from tract.subspaces.paths import Simplex


def squared_cosine(model: torch.nn.Module, first: int, second: int) -> Tensor:
    """The regulariser of arXiv 2102.10472 (equation 3): <v_i, v_j>^2 / (|v_i|^2 |v_j|^2), a scalar.

    Its gradient with respect to v_i has the factor <v_i, v_j>, so it vanishes with the cosine: where endpoints
    start independently, the cosine is about the square root of one over the number of weights, and the
    regulariser has hardly any effect.

    Args:
        model: has subspace layers.
        first: an endpoint i.
        second: another endpoint j.

    Raises:
        ValueError: no convolution or linear layer has endpoints.
    """
    product, norms = _products(model, first, second)
    return product**2 / norms


def absolute_cosine(model: torch.nn.Module, first: int, second: int) -> Tensor:
    """|<v_i, v_j>| / (|v_i| |v_j|), the root of :func:`squared_cosine`.

    Its gradient, +-(v_j / |v_j| - cos v_i / |v_i|) / |v_i|, is as long for a small cosine as for a larger one.

    Raises:
        ValueError: as :func:`squared_cosine`.
    """
    product, norms = _products(model, first, second)
    return product.abs() / norms.sqrt()


def distance(model: torch.nn.Module, first: int, second: int) -> Tensor:
    """|v_i - v_j|.

    Raises:
        ValueError: as :func:`squared_cosine`.
    """
    pairs = _weights(model, first, second)
    return torch.stack([(a - b).square().sum() for a, b in pairs]).sum().sqrt()


def statistics(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """(cos^2, distance) over all pairs of endpoints, as the authors' code logs them.

    cos^2 is the mean over the pairs of a simplex, and the distance the root of the mean squared distance; for a
    line and a curve sums stand in place of both means. Zero with one endpoint.

    Raises:
        ValueError: as :func:`squared_cosine`.
    """
    path = subspace_layers(model)[0].path if subspace_layers(model) else Simplex(2)
    pairs = path.pairs()
    if not pairs:
        zero = torch.zeros(())
        return zero, zero
    cosines = torch.stack([squared_cosine(model, *pair) for pair in pairs])
    squares = torch.stack([distance(model, *pair).square() for pair in pairs])
    if isinstance(path, Simplex):
        return cosines.mean(), squares.mean().sqrt()
    return cosines.sum(), squares.sum().sqrt()


def _products(model: torch.nn.Module, first: int, second: int) -> tuple[Tensor, Tensor]:
    sums = [torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]) for a, b in _weights(model, first, second)]
    product, one, two = torch.stack(sums).sum(0).unbind()
    return product, one * two


def _weights(model: torch.nn.Module, first: int, second: int) -> list[tuple[Tensor, Tensor]]:
    layers = [layer for layer in subspace_layers(model) if isinstance(layer, tuple(WITH_MATRIX))]
    if not layers:
        raise ValueError(
            "expected a model whose convolutions or linear layers have endpoints, got none; call apply_subspace first."
        )
    return [(layer.endpoint("weight", first), layer.endpoint("weight", second)) for layer in layers]
