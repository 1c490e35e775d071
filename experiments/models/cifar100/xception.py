from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from experiments.models.cifar100.layers import chain, classifier, conv_bn, network, separable


class Block(nn.Module):
    """shortcut(x) + branch(x), where with ``rectify`` both read relu(x) instead of x."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, rectify: bool):
        super().__init__()
        self.branch, self.shortcut, self.rectify = branch, shortcut, rectify

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        if self.rectify:
            x = F.relu(x)
        return self.shortcut(x) + self.branch(x)


def _separables(inputs: int, *outputs: int) -> list[nn.Module]:
    """Separable convolutions with BatchNorm, and a ReLU between (not before, not after) them."""
    layers = []
    for width in outputs:
        layers += [separable(inputs, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        inputs = width
    return layers[:-1]


def _resizing(inputs: int, middle: int, outputs: int, stride: int, first: list[nn.Module], rectify: bool) -> Block:
    pool = nn.MaxPool2d(3, stride=stride, padding=1)
    shortcut = conv_bn(inputs, outputs, stride=stride, bias=True, activation=None)
    return Block(nn.Sequential(*first, *_separables(inputs, middle, outputs), pool), shortcut, rectify)


def xception(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Xception (Chollet 2016, arXiv 1610.02357): 21,013,988 parameters with 100 classes.

    Unlike in the paper, shortcuts of the entry and middle flow carry relu(x), those of the first block (whose
    input is a ReLU's output) and of the exit flow x. The stem and the third entry block do not downsample.
    """
    blocks = [
        _resizing(64, 128, 128, 2, [], rectify=False),
        _resizing(128, 256, 256, 2, [], rectify=True),
        _resizing(256, 728, 728, 1, [], rectify=True),
    ]
    blocks += [Block(nn.Sequential(*_separables(728, 728, 728, 728)), nn.Identity(), rectify=True) for _ in range(8)]
    blocks += [_resizing(728, 728, 1024, 2, [nn.ReLU()], rectify=False)]
    blocks += [*_separables(1024, 1536, 2048), nn.ReLU(inplace=True)]
    stem = chain(in_channels, (32, 3), (64, 3))
    return network(stem, nn.Sequential(*blocks), classifier(2048, num_classes))
