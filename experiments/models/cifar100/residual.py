"""What the residual families share: branches, shortcuts and stages."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn

from experiments.models.cifar100.layers import conv_bn

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
WIDTHS = (64, 128, 256, 512)


def basic(inputs: int, outputs: int, stride: int, bias: bool = False) -> nn.Sequential:
    """Two 3x3 convolutions with BatchNorm, a ReLU between them."""
    return nn.Sequential(
        conv_bn(inputs, outputs, 3, stride, bias=bias), conv_bn(outputs, outputs, 3, bias=bias, activation=None)
    )


def bottleneck(
    inputs: int, outputs: int, stride: int, bias: bool = False, narrowing: int = 4, groups: int = 1
) -> nn.Sequential:
    """1x1, 3x3 and 1x1 convolutions with BatchNorm, ReLUs between them; ``groups`` holds for the first two."""
    width = outputs // narrowing
    return nn.Sequential(
        conv_bn(inputs, width, groups=groups, bias=bias),
        conv_bn(width, width, 3, stride, groups=groups, bias=bias),
        conv_bn(width, outputs, bias=bias, activation=None),
    )


def shortcut(inputs: int, outputs: int, stride: int, bias: bool = False) -> nn.Module:
    """The identity where shapes allow it, else a 1x1 convolution with BatchNorm."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return conv_bn(inputs, outputs, 1, stride, bias=bias, activation=None)


def stages(
    block: Callable[[int, int, int], nn.Module], inputs: int, widths: tuple[int, ...], depths: tuple[int, ...]
) -> nn.Sequential:
    """``block(inputs, outputs, stride)`` in a row; each stage but the first starts with stride 2."""
    blocks = []
    for stage, (outputs, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(depth):
            blocks.append(block(inputs, outputs, 2 if stage and not index else 1))
            inputs = outputs
    return nn.Sequential(*blocks)
