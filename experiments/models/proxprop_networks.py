"""The two networks of the ProxProp paper (Frerix et al., arXiv 1706.04638, section 4.1), as plain layers."""

from __future__ import annotations

from itertools import pairwise

import torch.nn as nn
from torch import Tensor


class ProxPropMLP(nn.Module):
    """Linear layers with ReLU between them; the last one is ``final_fc``."""

    def __init__(self, inputs: int, hidden: list[int], num_classes: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise([inputs, *hidden]))
        self.final_fc = nn.Linear(hidden[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.final_fc(x)


class ProxPropConvNet(nn.Module):
    """Three 5x5 convolutions with ReLU, a 2x2 max-pool after the first two, and the classifier ``final_fc``."""

    def __init__(self, in_channels: int, image_size: int, widths: list[int], num_classes: int):
        super().__init__()
        modules: list[nn.Module] = []
        for inputs, outputs in pairwise([in_channels, *widths]):
            modules += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*modules[:-1])
        side = image_size // 2 ** (len(widths) - 1)
        self.final_fc = nn.Linear(widths[-1] * side**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.final_fc(self.layers(x).flatten(1))


def proxprop_mlp(num_classes: int, hidden: list[int], in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """3072-4000-1000-4000-10 on CIFAR-10: 20,337,010 parameters."""
    return ProxPropMLP(in_channels * image_size**2, list(hidden), num_classes)


def proxprop_convnet(num_classes: int, widths: list[int], in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """16, 20 and 20 channels, and 1,280 numbers for the classifier: 32,066 parameters with 10 classes."""
    return ProxPropConvNet(in_channels, image_size, list(widths), num_classes)
