"""The Inception family: GoogLeNet, Inception-v3, Inception-v4 and Inception-ResNet-v2.

A block is a ``Concat`` of branches, mostly of ``chain``: convolutions with BatchNorm and ReLU.
None has auxiliary classifiers, and in all of them BatchNorm's eps is 1e-5 unless said otherwise.
"""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from experiments.models.cifar100.layers import Concat, Size, chain, classifier, conv, conv_bn, network

ROW, COLUMN = (1, 7), (7, 1)
SHORT_ROW, SHORT_COLUMN = (1, 3), (3, 1)


def _same_pool(kind: type[nn.Module]) -> nn.Module:
    return kind(3, stride=1, padding=1)


# -- GoogLeNet -------------------------------------------------------------------------------------


def _googlenet_block(inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pooled: int) -> Concat:
    width, outputs = five
    two_threes = nn.Sequential(
        conv_bn(inputs, width, bias=True),
        conv_bn(width, outputs, 3, bias=True, eps=outputs),
        conv_bn(outputs, outputs, 3, bias=True),
    )
    return Concat(
        [
            conv_bn(inputs, one, bias=True),
            chain(inputs, (three[0],), (three[1], 3), bias=True),
            two_threes,
            nn.Sequential(_same_pool(nn.MaxPool2d), conv_bn(inputs, pooled, bias=True)),
        ]
    )


def googlenet(num_classes: int, in_channels: int = 3, image_size: int = 32, dropout: float = 0.4) -> nn.Module:
    """GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842): 6,402,564 parameters with 100 classes.

    Two 3x3 convolutions stand for each 5x5. The BatchNorm between them has the branch's width as its
    eps, so it divides by roughly the root of that width. Three 3x3 convolutions are the stem.
    """
    halve = nn.MaxPool2d(3, stride=2, padding=1)
    body = nn.Sequential(
        halve,
        _googlenet_block(192, 64, (96, 128), (16, 32), 32),
        _googlenet_block(256, 128, (128, 192), (32, 96), 64),
        halve,
        _googlenet_block(480, 192, (96, 208), (16, 48), 64),
        _googlenet_block(512, 160, (112, 224), (24, 64), 64),
        _googlenet_block(512, 128, (128, 256), (24, 64), 64),
        _googlenet_block(512, 112, (144, 288), (32, 64), 64),
        _googlenet_block(528, 256, (160, 320), (32, 128), 128),
        halve,
        _googlenet_block(832, 256, (160, 320), (32, 128), 128),
        _googlenet_block(832, 384, (192, 384), (48, 128), 128),
    )
    return network(chain(in_channels, (64, 3), (64, 3), (192, 3)), body, classifier(1024, num_classes, dropout=dropout))


# -- Inception-v3 ----------------------------------------------------------------------------------


def _v3_a(inputs: int, pooled: int) -> Concat:
    return Concat(
        [
            conv_bn(inputs, 64),
            chain(inputs, (48,), (64, 5)),
            chain(inputs, (64,), (96, 3), (96, 3)),
            nn.Sequential(_same_pool(nn.AvgPool2d), conv_bn(inputs, pooled, 3)),
        ]
    )


def _v3_b(inputs: int) -> Concat:
    return Concat(
        [
            conv_bn(inputs, 384, 3, 2, 0),
            chain(inputs, (64,), (96, 3), (96, 3, 2, 0)),
            nn.MaxPool2d(3, stride=2),
        ]
    )


def _v3_c(inputs: int, width: int) -> Concat:
    return Concat(
        [
            conv_bn(inputs, 192),
            chain(inputs, (width,), (width, COLUMN), (192, ROW)),
            chain(inputs, (width,), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)),
            nn.Sequential(_same_pool(nn.AvgPool2d), conv_bn(inputs, 192)),
        ]
    )


def _v3_d(inputs: int) -> Concat:
    return Concat(
        [
            chain(inputs, (192,), (320, 3, 2, 0)),
            chain(inputs, (192,), (192, ROW), (192, COLUMN), (192, 3, 2, 0)),
            nn.AvgPool2d(3, stride=2),
        ]
    )


def _fork(inputs: int, outputs: int, kernels: tuple[Size, Size] = (SHORT_ROW, SHORT_COLUMN)) -> Concat:
    return Concat([conv_bn(inputs, outputs, kernel) for kernel in kernels])


def _v3_e(inputs: int) -> Concat:
    return Concat(
        [
            conv_bn(inputs, 320),
            nn.Sequential(conv_bn(inputs, 384), _fork(384, 384)),
            nn.Sequential(chain(inputs, (448,), (384, 3)), _fork(384, 384)),
            nn.Sequential(_same_pool(nn.AvgPool2d), conv_bn(inputs, 192)),
        ]
    )


def inceptionv3(num_classes: int, in_channels: int = 3, image_size: int = 32, dropout: float = 0.5) -> nn.Module:
    """Inception-v3 (Szegedy et al. 2015, arXiv 1512.00567): 22,318,148 parameters with 100 classes.

    The stem does not pool (32x32 to 30x30). The pool branch of the first blocks has a 3x3 convolution,
    the 7x7 factors of the middle blocks run as 7x1, 1x7, and the second reduction pools by average.
    """
    stem = chain(in_channels, (32, 3), (32, 3), (64, 3), (80,), (192, 3, 1, 0))
    blocks = [_v3_a(192, 32), _v3_a(256, 64), _v3_a(288, 64), _v3_b(288)]
    blocks += [_v3_c(768, width) for width in (128, 160, 160, 192)] + [_v3_d(768), _v3_e(1280), _v3_e(2048)]
    return network(stem, nn.Sequential(*blocks), classifier(2048, num_classes, dropout=dropout))


# -- Inception-v4 and Inception-ResNet-v2 ----------------------------------------------------------


def _v4_stem(inputs: int) -> nn.Sequential:
    """Stride 1 throughout: an image of 32x32 gives 384 maps of 30x30."""
    return nn.Sequential(
        chain(inputs, (32, 3, 1, 0), (32, 3), (64, 3)),
        Concat([conv_bn(64, 96, 3), _same_pool(nn.MaxPool2d)]),
        Concat([chain(160, (64,), (64, COLUMN), (64, ROW), (96, 3)), chain(160, (64,), (96, 3))]),
        Concat([_same_pool(nn.MaxPool2d), conv_bn(192, 192, 3)]),
    )


def _v4_reduction_a(inputs: int, k: int, l: int, m: int, n: int) -> Concat:  # noqa: E741, the paper's letters
    return Concat([chain(inputs, (k,), (l, 3), (m, 3, 2, 0)), conv_bn(inputs, n, 3, 2, 0), nn.MaxPool2d(3, stride=2)])


def _v4_a() -> Concat:
    return Concat(
        [
            chain(384, (64,), (96, 3), (96, 3)),
            chain(384, (64,), (96, 3)),
            conv_bn(384, 96),
            nn.Sequential(_same_pool(nn.AvgPool2d), conv_bn(384, 96)),
        ]
    )


def _v4_b() -> Concat:
    return Concat(
        [
            conv_bn(1024, 384),
            chain(1024, (192,), (224, ROW), (256, COLUMN)),
            chain(1024, (192,), (192, ROW), (224, COLUMN), (224, ROW), (256, COLUMN)),
            nn.Sequential(_same_pool(nn.AvgPool2d), conv_bn(1024, 128)),
        ]
    )


def _v4_reduction_b() -> Concat:
    return Concat(
        [
            chain(1024, (192,), (192, 3, 2)),
            chain(1024, (256,), (256, ROW), (320, COLUMN), (320, 3, 2)),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
    )


def _v4_c() -> Concat:
    return Concat(
        [
            conv_bn(1536, 256),
            nn.Sequential(conv_bn(1536, 384), _fork(384, 256, (SHORT_COLUMN, SHORT_ROW))),
            nn.Sequential(chain(1536, (384,), (448, SHORT_ROW), (512, SHORT_COLUMN)), _fork(512, 256)),
            nn.Sequential(_same_pool(nn.AvgPool2d), conv_bn(1536, 256)),
        ]
    )


def inceptionv4(num_classes: int, in_channels: int = 3, image_size: int = 32, dropout: float = 0.2) -> nn.Module:
    """Inception-v4 (Szegedy et al. 2016, arXiv 1602.07261): 41,296,516 parameters with 100 classes.

    The stem has stride 1 throughout, the first convolution no padding, the second reduction padding 1.
    """
    blocks = [_v4_a() for _ in range(4)] + [_v4_reduction_a(384, 192, 224, 256, 384)]
    blocks += [_v4_b() for _ in range(7)] + [_v4_reduction_b()] + [_v4_c() for _ in range(3)]
    return network(_v4_stem(in_channels), nn.Sequential(*blocks), classifier(1536, num_classes, dropout=dropout))


class InceptionResidual(nn.Module):
    """relu(bn(shortcut(x) + scale * mix(branches(x)))), shortcut and mix being 1x1 convolutions with a bias."""

    def __init__(self, inputs: int, outputs: int, branches: list[nn.Module], width: int, scale: float = 0.1):
        super().__init__()
        self.scale = scale
        self.residual = nn.Sequential(Concat(branches), conv(width, outputs, bias=True))
        self.shortcut = conv(inputs, outputs, bias=True)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height, width)."""
        return F.relu(self.bn(self.shortcut(x) + self.scale * self.residual(x)))


def _residual_a() -> InceptionResidual:
    branches = [conv_bn(384, 32), chain(384, (32,), (32, 3)), chain(384, (32,), (48, 3), (64, 3))]
    return InceptionResidual(384, 384, branches, 128, scale=1.0)


def _residual_b(inputs: int) -> InceptionResidual:
    branches = [conv_bn(inputs, 192), chain(inputs, (128,), (160, ROW), (192, COLUMN))]
    return InceptionResidual(inputs, 1154, branches, 384)


def _residual_reduction_b() -> Concat:
    return Concat(
        [
            chain(1154, (256,), (384, 3, 2, 0)),
            chain(1154, (256,), (288, 3, 2, 0)),
            chain(1154, (256,), (288, 3), (320, 3, 2, 0)),
            nn.MaxPool2d(3, stride=2),
        ]
    )


def _residual_c(inputs: int) -> InceptionResidual:
    branches = [conv_bn(inputs, 192), chain(inputs, (192,), (224, SHORT_ROW), (256, SHORT_COLUMN))]
    return InceptionResidual(inputs, 2048, branches, 448)


def inceptionresnetv2(num_classes: int, in_channels: int = 3, image_size: int = 32, dropout: float = 0.2) -> nn.Module:
    """Inception-ResNet-v2 (Szegedy et al. 2016, arXiv 1602.07261): 65,442,072 parameters with 100 classes.

    The stem is Inception-v4's. Unlike in the paper, every shortcut is a learned 1x1 convolution and a
    BatchNorm follows every sum; residuals are scaled by 0.1, those of the first five blocks by 1.
    """
    blocks = [_residual_a() for _ in range(5)] + [_v4_reduction_a(384, 256, 256, 384, 384)]
    blocks += [_residual_b(inputs) for inputs in [1152] + 9 * [1154]] + [_residual_reduction_b()]
    blocks += [_residual_c(inputs) for inputs in [2146] + 4 * [2048]]
    return network(_v4_stem(in_channels), nn.Sequential(*blocks), classifier(2048, num_classes, dropout=dropout))
