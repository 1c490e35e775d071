"""Squeeze-and-excitation residual networks (Hu et al. 2017, arXiv 1709.01507), reduction 16.

A ReLU follows the last BatchNorm of a branch, so what is scaled and added is never negative.
All convolutions have a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from experiments.models.cifar100.layers import classifier, conv_bn, network
from experiments.models.cifar100.residual import DEPTHS, WIDTHS, basic, bottleneck, shortcut, stages


class Block(nn.Module):
    """relu(shortcut(x) + gate(y) * y) with y = relu(branch(x)), the gate a small network of y's channel means."""

    def __init__(self, branch: Callable, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.branch = branch(inputs, outputs, stride, bias=True)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(outputs, outputs // 16),
            nn.ReLU(inplace=True),
            nn.Linear(outputs // 16, outputs),
            nn.Sigmoid(),
            nn.Unflatten(1, (outputs, 1, 1)),
        )
        self.shortcut = shortcut(inputs, outputs, stride, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        y = F.relu(self.branch(x))
        return F.relu(self.shortcut(x) + self.gate(y) * y)


def seresnet18(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """SE-ResNet-18: 11,314,012 parameters with 100 classes."""
    return _seresnet(18, num_classes, in_channels)


def seresnet34(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """SE-ResNet-34: 21,498,000 parameters with 100 classes."""
    return _seresnet(34, num_classes, in_channels)


def seresnet50(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """SE-ResNet-50: 26,262,804 parameters with 100 classes."""
    return _seresnet(50, num_classes, in_channels)


def seresnet101(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """SE-ResNet-101: 47,527,764 parameters with 100 classes."""
    return _seresnet(101, num_classes, in_channels)


def seresnet152(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """SE-ResNet-152: 65,045,780 parameters with 100 classes."""
    return _seresnet(152, num_classes, in_channels)


def _seresnet(layers: int, num_classes: int, in_channels: int) -> nn.Module:
    branch, expansion = (basic, 1) if layers < 50 else (bottleneck, 4)
    widths = tuple(expansion * width for width in WIDTHS)
    body = stages(partial(Block, branch), 64, widths, DEPTHS[layers])
    return network(conv_bn(in_channels, 64, 3, bias=True), body, classifier(widths[-1], num_classes))
