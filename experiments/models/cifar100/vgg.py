"""VGG networks (Simonyan and Zisserman 2014, arXiv 1409.1556) with BatchNorm, from torchvision's layers.

Five poolings leave 1x1 of a 32x32 image, so the first Linear layer reads 512 numbers.
"""

from __future__ import annotations

import torch.nn as nn
from torchvision.models import vgg as torchvision_vgg

from experiments.models.cifar100.layers import conv


def vgg11(num_classes: int, in_channels: int = 3, image_size: int = 32, dropout: float = 0.5) -> nn.Module:
    """VGG-11 with BatchNorm: 28,518,244 parameters with 100 classes."""
    return _cifar_vgg(torchvision_vgg.vgg11_bn, num_classes, in_channels, dropout)


def vgg13(num_classes: int, in_channels: int = 3, image_size: int = 32, dropout: float = 0.5) -> nn.Module:
    """VGG-13 with BatchNorm: 28,703,140 parameters with 100 classes."""
    return _cifar_vgg(torchvision_vgg.vgg13_bn, num_classes, in_channels, dropout)


def vgg16(num_classes: int, in_channels: int = 3, image_size: int = 32, dropout: float = 0.5) -> nn.Module:
    """VGG-16 with BatchNorm: 34,015,396 parameters with 100 classes."""
    return _cifar_vgg(torchvision_vgg.vgg16_bn, num_classes, in_channels, dropout)


def vgg19(num_classes: int, in_channels: int = 3, image_size: int = 32, dropout: float = 0.5) -> nn.Module:
    """VGG-19 with BatchNorm: 39,327,652 parameters with 100 classes."""
    return _cifar_vgg(torchvision_vgg.vgg19_bn, num_classes, in_channels, dropout)


def _cifar_vgg(constructor, num_classes: int, in_channels: int, dropout: float) -> nn.Module:
    network = constructor(num_classes=num_classes, dropout=dropout, init_weights=False)
    network.features[0] = conv(in_channels, 64, 3, bias=True)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier[0] = nn.Linear(512, 4096)
    return network
