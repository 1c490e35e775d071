from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from experiments.models.cifar100.layers import ChannelShuffle, Concat, classifier, conv_bn, network


class Unit(nn.Module):
    """ShuffleNet's unit: the sum with x, or beside an average-pooled x where it halves the resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int):
        super().__init__()
        width, added = outputs // 4, outputs - inputs if stride == 2 else outputs
        self.branch = nn.Sequential(
            conv_bn(inputs, width, groups=groups, bias=True),
            ChannelShuffle(groups),
            conv_bn(width, width, 3, stride, groups=width, bias=True, activation=None),
            conv_bn(width, added, groups=groups, bias=True, activation=None),
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        y = self.branch(x)
        return F.relu(x + y if self.pool is None else torch.cat([self.pool(x), y], dim=1))


def shufflenet(num_classes: int, in_channels: int = 3, image_size: int = 32, groups: int = 3) -> nn.Module:
    """ShuffleNet (Zhang et al. 2017, arXiv 1707.01083), 3 groups: 1,012,108 parameters with 100 classes.

    No pooling after the stride-1 stem; the first pointwise convolution is grouped too, unlike the paper's.
    """
    units, inputs = [], 24
    for outputs, depth in [(240, 4), (480, 8), (960, 4)]:
        units += [Unit(inputs, outputs, 2, groups)] + [Unit(outputs, outputs, 1, groups) for _ in range(1, depth)]
        inputs = outputs
    return network(conv_bn(in_channels, 24, 3, bias=True), nn.Sequential(*units), classifier(960, num_classes))


def _branch(inputs: int, outputs: int, stride: int, expand: bool = True) -> nn.Sequential:
    first = [conv_bn(inputs, inputs, bias=True)] if expand else []
    depthwise = conv_bn(inputs, inputs, 3, stride, groups=inputs, bias=True, activation=None)
    return nn.Sequential(*first, depthwise, conv_bn(inputs, outputs, bias=True))


class SplitUnit(nn.Module):
    """ShuffleNetV2's stride-1 unit: half of the channels pass unchanged, then both halves are shuffled."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, stride=1)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same shape."""
        kept, rest = x.chunk(2, dim=1)
        return self.shuffle(torch.cat([kept, self.branch(rest)], dim=1))


def shufflenetv2(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """ShuffleNetV2, width 1 (Ma et al. 2018, arXiv 1807.11164): 1,360,896 parameters with 100 classes.

    The stride-1 stem is followed by BatchNorm, but neither by a ReLU nor by pooling.
    """
    units, inputs = [], 24
    for outputs, depth in [(116, 4), (232, 8), (464, 4)]:
        halving = [_branch(inputs, outputs // 2, 2, expand=False), _branch(inputs, outputs // 2, 2)]
        units += [Concat(halving), ChannelShuffle(2)] + [SplitUnit(outputs) for _ in range(1, depth)]
        inputs = outputs
    units.append(conv_bn(464, 1024, bias=True))
    stem = conv_bn(in_channels, 24, 3, bias=True, activation=None)
    return network(stem, nn.Sequential(*units), classifier(1024, num_classes))
