"""Aggregated residual networks (Xie et al. 2016, arXiv 1611.05431), 32 groups.

The first 1x1 convolution of a block is grouped like its 3x3, so they have fewer parameters than 32x4d.
"""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from experiments.models.cifar100.layers import classifier, conv_bn, network
from experiments.models.cifar100.residual import DEPTHS, bottleneck, shortcut, stages


class Block(nn.Module):
    """relu(shortcut(x) + branch(x)), the branch a grouped bottleneck."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.branch = bottleneck(inputs, outputs, stride, narrowing=2, groups=32)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        return F.relu(self.shortcut(x) + self.branch(x))


def resnext50(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """ResNeXt-50: 14,788,772 parameters with 100 classes."""
    return _resnext(DEPTHS[50], num_classes, in_channels)


def resnext101(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """ResNeXt-101: 25,303,204 parameters with 100 classes."""
    return _resnext(DEPTHS[101], num_classes, in_channels)


def resnext152(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """ResNeXt-152: 33,343,652 parameters with 100 classes; stages of 3, 4, 36 and 3 blocks (not 3, 8, 36, 3)."""
    return _resnext((3, 4, 36, 3), num_classes, in_channels)


def _resnext(depths: tuple[int, ...], num_classes: int, in_channels: int) -> nn.Module:
    body = stages(Block, 64, (256, 512, 1024, 2048), depths)
    return network(conv_bn(in_channels, 64, 3), body, classifier(2048, num_classes))
