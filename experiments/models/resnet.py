"""Residual networks for small images.

The CIFAR ResNet-18/34/50/101/152 are torchvision's networks with a 3x3, stride-1 first convolution.
In the TrAct authors' CIFAR-10 script the 3x3, stride-2 max-pool is kept and convolutions
start from Kaiming's normal initialisation (``maxpool=True, kaiming=True``); in the CIFAR-100
table there is no max-pool and PyTorch's own initialisation (both False, the defaults).
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor


def resnet18(
    num_classes: int, in_channels: int = 3, image_size: int = 32, maxpool: bool = False, kaiming: bool = False
) -> nn.Module:
    """ResNet-18 for CIFAR: 11,220,132 parameters with 100 classes."""
    return _cifar_resnet("resnet18", num_classes, in_channels, maxpool, kaiming)


def resnet34(
    num_classes: int, in_channels: int = 3, image_size: int = 32, maxpool: bool = False, kaiming: bool = False
) -> nn.Module:
    """ResNet-34 for CIFAR: 21,328,292 parameters with 100 classes."""
    return _cifar_resnet("resnet34", num_classes, in_channels, maxpool, kaiming)


def resnet50(
    num_classes: int, in_channels: int = 3, image_size: int = 32, maxpool: bool = False, kaiming: bool = False
) -> nn.Module:
    """ResNet-50 for CIFAR: 23,705,252 parameters with 100 classes."""
    return _cifar_resnet("resnet50", num_classes, in_channels, maxpool, kaiming)


def resnet101(
    num_classes: int, in_channels: int = 3, image_size: int = 32, maxpool: bool = False, kaiming: bool = False
) -> nn.Module:
    """ResNet-101 for CIFAR: 42,697,380 parameters with 100 classes."""
    return _cifar_resnet("resnet101", num_classes, in_channels, maxpool, kaiming)


def resnet152(
    num_classes: int, in_channels: int = 3, image_size: int = 32, maxpool: bool = False, kaiming: bool = False
) -> nn.Module:
    """ResNet-152 for CIFAR: 58,341,028 parameters with 100 classes."""
    return _cifar_resnet("resnet152", num_classes, in_channels, maxpool, kaiming)


def _cifar_resnet(name: str, num_classes: int, in_channels: int, maxpool: bool, kaiming: bool) -> nn.Module:
    from torchvision.models import resnet  # takes more than a second to import

    network = getattr(resnet, name)(num_classes=num_classes)
    network.conv1 = nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False)
    if not maxpool:
        network.maxpool = nn.Identity()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            if kaiming:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:
                module.reset_parameters()
    return network


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)) with 3x3 convolutions, halving the resolution for more channels.

    torchvision's block with the same state-dict keys, without the second that its import takes.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        stride, shortcut = 1, None
        if inputs != outputs:
            stride = 2
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        branch += x if self.downsample is None else self.downsample(x)
        return self.relu(branch)


class SmallResNet(nn.Module):
    """Stem, then one basic block per width, each after the first halving the resolution."""

    def __init__(self, num_classes: int, in_channels: int, widths: list[int]):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*(BasicBlock(*pair) for pair in zip([widths[0], *widths], widths, strict=False)))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean(dim=(2, 3)))


def resnet_small(num_classes: int, in_channels: int = 1, image_size: int = 8, width: int = 16) -> nn.Module:
    """Three basic blocks of widths w, 2w, 4w; for 8x8 digits."""
    return SmallResNet(num_classes, in_channels, [width, 2 * width, 4 * width])
