"""Densely connected networks with bottlenecks and compression (Huang et al. 2016, arXiv 1608.06993).

The stem is a bare 3x3 convolution, whose output runs through the first dense block; transitions
have no ReLU between BatchNorm and convolution. No dropout.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from experiments.models.cifar100.layers import bn_relu_conv, classifier, conv, network


class Dense(nn.Sequential):
    """x, and beside it the new channels that the layers make of it."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, channels + growth, height, width)."""
        return torch.cat([x, super().forward(x)], dim=1)


def densenet121(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """DenseNet-121: 7,048,548 parameters with 100 classes."""
    return _densenet((6, 12, 24, 16), 32, num_classes, in_channels)


def densenet161(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """DenseNet-161: 26,681,188 parameters with 100 classes."""
    return _densenet((6, 12, 36, 24), 48, num_classes, in_channels)


def densenet201(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """DenseNet-201: 18,277,220 parameters with 100 classes."""
    return _densenet((6, 12, 48, 32), 32, num_classes, in_channels)


def _densenet(depths: tuple[int, ...], growth: int, num_classes: int, in_channels: int) -> nn.Module:
    body, channels = [], 2 * growth
    for stage, depth in enumerate(depths):
        if stage:  # transition: half of the channels, half of the resolution
            body += [nn.BatchNorm2d(channels), conv(channels, channels // 2), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            body.append(Dense(bn_relu_conv(channels, 4 * growth), bn_relu_conv(4 * growth, growth, 3)))
            channels += growth
    body += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return network(conv(in_channels, 2 * growth, 3), nn.Sequential(*body), classifier(channels, num_classes))
