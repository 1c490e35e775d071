"""Residual networks with stochastic depth (Huang et al. 2016, arXiv 1603.09382).

In training a block's branch is left out with probability 1 - p, for the whole batch at once; p
falls linearly from 1 at the first block to ``survival`` at the last. A branch that is left out
does not run: its BatchNorm statistics stay, and its parameters get no gradient in this step
(None after ``zero_grad()``, so SGD does not decay them). With several ranks each draws for itself,
and a branch that only some have run gets the sum of their gradients. In evaluation all branches run, times p.
Unlike in the paper there is no ReLU after the sum, and no shortcut is ever left out.

The draws come from the CPU's generator, on a GPU too: which branches run is decided without
waiting for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from experiments.models.cifar100.layers import classifier, conv_bn, network
from experiments.models.cifar100.residual import DEPTHS, WIDTHS, basic, bottleneck, shortcut, stages


class Block(nn.Module):
    """shortcut(x) + branch(x), the branch being left out at random in training."""

    skips_parameters = True  # DistributedDataParallel has to look for parameters without a gradient

    def __init__(self, branch: Callable, inputs: int, outputs: int, stride: int, survival: float, bias: bool):
        super().__init__()
        self.survival = survival
        self.branch = branch(inputs, outputs, stride, bias=bias)
        self.shortcut = shortcut(inputs, outputs, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        if not self.training:
            return self.shortcut(x) + self.survival * self.branch(x)
        if torch.rand((), device="cpu") < self.survival:
            return self.shortcut(x) + self.branch(x)
        return self.shortcut(x)


def stochasticdepth18(num_classes: int, in_channels: int = 3, image_size: int = 32, survival: float = 0.5) -> nn.Module:
    """ResNet-18 with stochastic depth: 11,224,932 parameters with 100 classes; all convolutions have a bias."""
    return _stochastic_depth(18, num_classes, in_channels, survival)


def stochasticdepth34(num_classes: int, in_channels: int = 3, image_size: int = 32, survival: float = 0.5) -> nn.Module:
    """ResNet-34 with stochastic depth: 21,336,804 parameters with 100 classes; all convolutions have a bias."""
    return _stochastic_depth(34, num_classes, in_channels, survival)


def stochasticdepth50(num_classes: int, in_channels: int = 3, image_size: int = 32, survival: float = 0.5) -> nn.Module:
    """ResNet-50 with stochastic depth: 23,705,316 parameters with 100 classes; only the stem has a bias."""
    return _stochastic_depth(50, num_classes, in_channels, survival)


def stochasticdepth101(
    num_classes: int, in_channels: int = 3, image_size: int = 32, survival: float = 0.5
) -> nn.Module:
    """ResNet-101 with stochastic depth: 42,697,444 parameters with 100 classes; only the stem has a bias."""
    return _stochastic_depth(101, num_classes, in_channels, survival)


def _stochastic_depth(layers: int, num_classes: int, in_channels: int, survival: float) -> nn.Module:
    small = layers < 50
    branch, widths = (basic, WIDTHS) if small else (bottleneck, tuple(4 * width for width in WIDTHS))
    survivals = iter(torch.linspace(1, survival, sum(DEPTHS[layers]), dtype=torch.float64, device="cpu").tolist())

    def block(inputs: int, outputs: int, stride: int) -> Block:
        return Block(branch, inputs, outputs, stride, next(survivals), bias=small)

    body = stages(block, 64, widths, DEPTHS[layers])
    return network(conv_bn(in_channels, 64, 3, bias=True), body, classifier(widths[-1], num_classes))
