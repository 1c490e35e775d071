"""Pieces that several families share."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn as nn
from torch import Tensor

Size = int | tuple[int, int]


def conv(
    inputs: int,
    outputs: int,
    kernel: Size = 1,
    stride: int = 1,
    padding: Size | None = None,
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2d:
    """A convolution; at stride 1 it keeps the size of the map unless ``padding`` is given."""
    if padding is None:
        padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=bias)


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: Size = 1,
    stride: int = 1,
    padding: Size | None = None,
    groups: int = 1,
    bias: bool = False,
    eps: float = 1e-5,
    activation: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution, BatchNorm and, unless it is None, the activation."""
    layers = [conv(inputs, outputs, kernel, stride, padding, groups, bias), nn.BatchNorm2d(outputs, eps=eps)]
    return nn.Sequential(*layers, *([activation(inplace=True)] if activation else []))


def bn_relu_conv(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, bias: bool = False, dropout: float = 0.0
) -> nn.Sequential:
    """The pre-activation order; dropout, where there is any, comes just before the convolution."""
    middle = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(
        nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), *middle, conv(inputs, outputs, kernel, stride, bias=bias)
    )


def separable(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, biases: tuple[bool, bool] = (False, False)
) -> nn.Sequential:
    """A depthwise, then a pointwise convolution with nothing in between."""
    return nn.Sequential(
        conv(inputs, inputs, kernel, stride, groups=inputs, bias=biases[0]), conv(inputs, outputs, bias=biases[1])
    )


def chain(inputs: int, *layers: tuple, **options) -> nn.Sequential:
    """``conv_bn`` after ``conv_bn``, each given by its (outputs, kernel, stride, padding) as far as needed."""
    modules = []
    for outputs, *rest in layers:
        modules.append(conv_bn(inputs, outputs, *rest, **options))
        inputs = outputs
    return nn.Sequential(*modules)


class Concat(nn.ModuleList):
    """Branches that all read the same tensor; their channels side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same with other channels."""
        return torch.cat([branch(x) for branch in self], dim=1)


class ChannelShuffle(nn.Module):
    """Channel (group, member) moves to (member, group), so that the next groups mix."""

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same shape."""
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


def classifier(features: int, num_classes: int, dropout: float = 0.0) -> nn.Sequential:
    """Global average pooling and a Linear layer; dropout acts on whole (1x1) maps."""
    middle = [nn.Dropout2d(dropout)] if dropout else []
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), *middle, nn.Flatten(), nn.Linear(features, num_classes))


def network(stem: nn.Module, body: nn.Module, head: nn.Module) -> nn.Sequential:
    """The three parts in a row, under these names."""
    return nn.Sequential(OrderedDict(stem=stem, body=body, head=head))
