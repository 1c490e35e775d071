from __future__ import annotations

import torch.nn as nn

from experiments.models.cifar100.layers import classifier, conv, conv_bn, network
from experiments.models.cifar100.squeezenet import Bypass


def mobilenet(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """MobileNet (Howard et al. 2017, arXiv 1704.04861), width 1: 3,315,428 parameters with 100 classes.

    A stem of stride 1; the pointwise convolutions have a bias, the depthwise ones none.
    """
    blocks, inputs = [], 32
    widths = (64, 128, 128, 256, 256, *6 * (512,), 1024, 1024)
    for outputs in widths:
        stride = 2 if outputs > max(inputs, 64) else 1  # where the width grows, but for the first block
        blocks += [conv_bn(inputs, inputs, 3, stride, groups=inputs), conv_bn(inputs, outputs, bias=True)]
        inputs = outputs
    return network(conv_bn(in_channels, 32, 3), nn.Sequential(*blocks), classifier(1024, num_classes))


def _inverted_residual(inputs: int, outputs: int, stride: int, expansion: int) -> nn.Module:
    width = inputs * expansion
    layers = (
        conv_bn(inputs, width, bias=True, activation=nn.ReLU6),
        conv_bn(width, width, 3, stride, groups=width, bias=True, activation=nn.ReLU6),
        conv_bn(width, outputs, bias=True, activation=None),
    )
    return Bypass(*layers) if stride == 1 and inputs == outputs else nn.Sequential(*layers)


def mobilenetv2(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381): 2,369,380 parameters with 100 classes.

    The stem is a 1x1 convolution with padding 1, so maps are 34x34 and their border sees zeros only.
    Every convolution has a bias, and the classifier is a 1x1 convolution of the pooled features.
    """
    blocks, inputs = [], 32
    for expansion, outputs, depth, stride in [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 1),
        (6, 320, 1, 1),
    ]:
        for index in range(depth):
            blocks.append(_inverted_residual(inputs, outputs, stride if index == 0 else 1, expansion))
            inputs = outputs
    blocks.append(conv_bn(320, 1280, bias=True, activation=nn.ReLU6))
    stem = conv_bn(in_channels, 32, 1, padding=1, bias=True, activation=nn.ReLU6)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(1280, num_classes, bias=True), nn.Flatten())
    return network(stem, nn.Sequential(*blocks), head)
