from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from experiments.models.cifar100.layers import Concat, conv, conv_bn, network


class Bypass(nn.Sequential):
    """x plus what the layers make of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return x + super().forward(x)


def _fire(inputs: int, outputs: int) -> nn.Sequential:
    squeezed = outputs // 8
    expand = Concat([conv_bn(squeezed, outputs // 2, kernel, bias=True) for kernel in (1, 3)])
    return nn.Sequential(conv_bn(inputs, squeezed, bias=True), expand)


def squeezenet(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """SqueezeNet (Iandola et al. 2016, arXiv 1602.07360) with simple bypass: 781,156 parameters with 100 classes.

    BatchNorm after each convolution but the last; bypasses around Fire 3, 5 and 7 only; no dropout.
    """
    body = nn.Sequential(
        nn.MaxPool2d(2),
        _fire(96, 128),
        Bypass(_fire(128, 128)),
        _fire(128, 256),
        nn.MaxPool2d(2),
        Bypass(_fire(256, 256)),
        _fire(256, 384),
        Bypass(_fire(384, 384)),
        _fire(384, 512),
        nn.MaxPool2d(2),
        _fire(512, 512),
    )
    head = nn.Sequential(conv(512, num_classes, bias=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return network(conv_bn(in_channels, 96, 3, bias=True), body, head)
