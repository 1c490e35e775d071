"""Slow literal formulas in float64. Imports nothing from tract: it is the other route."""

import copy
from itertools import product

import torch
import torch.nn as nn
import torch.nn.functional as F


def rows(layer, x):
    """X of shape (groups, b, n): what the layer multiplies with its weight, read element by element."""
    x = x.detach().double()
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, layer.in_features)
    spatial = len(layer.kernel_size)
    x = x if x.dim() == spatial + 2 else x[None]
    axes = [_sources(layer, axis, size) for axis, size in enumerate(x.shape[2:])]
    x = F.pad(x, (0, 1) * spatial)  # index -1 reads a zero
    windows = [x[(..., *torch.meshgrid(*window, indexing="ij"))] for window in product(*axes)]
    n = layer.weight[0].numel()
    return torch.stack(windows).reshape(len(windows) * len(x), layer.groups, n).transpose(0, 1)


def _sources(layer, axis, size):
    """For each output position along one axis: the input positions under the kernel, -1 for a zero."""
    kernel, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
    reach = dilation * (kernel - 1) + 1
    before, after = {
        "valid": (0, 0),
        "same": ((reach - 1) // 2, reach - 1 - (reach - 1) // 2),
    }.get(layer.padding) or (layer.padding[axis],) * 2
    starts = range(-before, size + after - reach + 1, stride)
    return [
        torch.tensor([_fold(start + k * dilation, size, layer.padding_mode) for k in range(kernel)]) for start in starts
    ]


def _fold(i, size, mode):
    if 0 <= i < size:
        return i
    mirrored = -i if i < 0 else 2 * (size - 1) - i
    nearest = 0 if i < 0 else size - 1
    return {"zeros": -1, "reflect": mirrored, "replicate": nearest, "circular": i % size}[mode]


def second_moment(layer, x):
    """X^T X / b, shape (groups, n, n)."""
    X = rows(layer, x)
    return X.mT @ X / X.shape[1]


def preconditioned(gradient, moment, damping):
    """G (A + damping I)^-1 with an explicit inverse, in the shape of G."""
    groups, n, _ = moment.shape
    G = gradient.detach().double().reshape(groups, -1, n)
    return (G @ torch.linalg.inv(moment + damping * torch.eye(n).double())).reshape(gradient.shape)


def plain_gradients(layer, x, direction):
    """Output and gradients of sum(layer(x) * direction), by autograd, as (z, dW, db, dx)."""
    layer, x = copy.deepcopy(layer), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    z = layer(x)
    (z * direction).sum().backward()
    bias = None if layer.bias is None else layer.bias.grad
    return z.detach(), layer.weight.grad, bias, x.grad


def tract_gradient(layer, x, direction, damping):
    """The whole formula in float64: plain gradient times (X^T X / b + damping I)^-1."""
    _, gradient, _, _ = plain_gradients(copy.deepcopy(layer).double(), x.double(), direction.double())
    return preconditioned(gradient, second_moment(layer, x), damping)
