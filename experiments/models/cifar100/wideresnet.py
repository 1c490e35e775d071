from __future__ import annotations

from functools import partial

import torch.nn as nn
from torch import Tensor

from experiments.models.cifar100.layers import bn_relu_conv, classifier, conv, network
from experiments.models.cifar100.residual import stages


class Block(nn.Module):
    """shortcut(x) + branch(x), the branch pre-activated with dropout before its second convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.branch = nn.Sequential(
            bn_relu_conv(inputs, outputs, 3, stride, bias=True),
            bn_relu_conv(outputs, outputs, 3, bias=True, dropout=dropout),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        return self.shortcut(x) + self.branch(x)


def wideresnet(
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    depth: int = 40,
    widening: int = 10,
    dropout: float = 0.5,
) -> nn.Module:
    """Wide residual network 40-10 (Zagoruyko and Komodakis 2016, arXiv 1605.07146).

    55,914,020 parameters with 100 classes. All convolutions have a bias; neither BatchNorm nor ReLU
    follows the stem, and 1x1 shortcuts read x itself.
    """
    widths = tuple(widening * width for width in (16, 32, 64))
    body = stages(partial(Block, dropout=dropout), 16, widths, 3 * ((depth - 4) // 6,))
    body.extend([nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True)])
    return network(conv(in_channels, 16, 3, bias=True), body, classifier(widths[-1], num_classes))
