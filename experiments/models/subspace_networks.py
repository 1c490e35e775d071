"""Networks of "Learning Neural Network Subspaces" (Wortsman et al., arXiv 2102.10472; apple/learning-subspaces).

Residual networks without biases but BatchNorm's; weights start from Kaiming's normal distribution, N(0, 2 / fan in).
The classifier is a Linear layer. The original's is a 1x1 convolution of the pooled maps: the same function, with the
same weights in another shape.

Each network names in ``features_layer`` the module whose output are its features, for a forward hook: the sum of the
last block before its ReLU, or the pooled maps of the networks for ImageNet.
"""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import resnet as torchvision_resnet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


class _Basic(BasicBlock):
    """torchvision's block, with dropout after its second norm; ``sum`` gives what its last ReLU gets."""

    def __init__(self, *arguments, dropout: float = 0.0, **options):
        super().__init__(*arguments, **options)
        self.dropout, self.sum = nn.Dropout(dropout), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """relu(branch + shortcut)."""
        branch = self.dropout(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return _relu_of(self, branch, x)


class _Bottleneck(Bottleneck):
    """torchvision's block; ``sum`` gives what its last ReLU gets."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.sum = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """relu(branch + shortcut)."""
        branch = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return _relu_of(self, self.bn3(self.conv3(branch)), x)


def _relu_of(block: _Basic | _Bottleneck, branch: Tensor, x: Tensor) -> Tensor:
    shortcut = x if block.downsample is None else block.downsample(x)
    return F.relu(block.sum(branch + shortcut))  # not in place: a hook keeps the sum


class CifarResNet(nn.Module):
    """A convolution, three stages of (depth - 2) / 6 basic blocks of widths w, 2w and 4w, the mean, the classifier."""

    def __init__(self, num_classes: int, in_channels: int, depth: int, width: int, dropout: float):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        outputs = [stage * width for stage in (1, 2, 4) for _ in range((depth - 2) // 6)]
        pairs = zip([width, *outputs], outputs, strict=False)
        self.blocks = nn.Sequential(*(_cifar_block(*pair, dropout) for pair in pairs))
        self.fc = nn.Linear(4 * width, num_classes, bias=False)
        self.features_layer = f"blocks.{len(outputs) - 1}.sum"

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean(dim=(2, 3)))


def _cifar_block(inputs: int, outputs: int, dropout: float) -> _Basic:
    if inputs == outputs:
        return _Basic(inputs, outputs, dropout=dropout)
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
    return _Basic(inputs, outputs, stride=2, downsample=shortcut, dropout=dropout)


def cifar_resnet(
    num_classes: int, depth: int, width: int, dropout: float, in_channels: int = 3, image_size: int = 32
) -> nn.Module:
    """The CIFAR ResNet (He et al., arXiv 1512.03385) with projections where a stage begins.

    Parameters with 10 classes and width 16: 78,032 at depth 8; 272,464 at depth 20; 466,896 at depth 32.

    Args:
        num_classes: width of the output.
        depth: layers with weights but for the shortcuts: 8, 14, 20, 26, 32, ...
        width: channels of the first stage; the others have twice and four times as many.
        dropout: chance that an entry of a block's branch, after its second norm, is set to zero.
        in_channels: of the images.
        image_size: any.

    Raises:
        ValueError: a depth that is not 6n + 2, or a chance outside of 0 to 1.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"expected model.depth to be 8, 14, 20 or another 6n + 2, got {depth}.")
    return _started(CifarResNet(num_classes, in_channels, depth, width, dropout))


def tiny_imagenet_resnet18(num_classes: int, in_channels: int = 3, image_size: int = 64) -> nn.Module:
    """ResNet-18 with a 3x3, stride-1 first convolution and no max-pool: 11,271,232 parameters with 200 classes."""
    return _tiny_imagenet(ResNet(_Basic, [2, 2, 2, 2]), num_classes, in_channels)


def tiny_imagenet_resnet50(num_classes: int, in_channels: int = 3, image_size: int = 64) -> nn.Module:
    """ResNet-50 (v1.5) likewise: 23,909,952 parameters with 200 classes."""
    return _tiny_imagenet(ResNet(_Bottleneck, [3, 4, 6, 3]), num_classes, in_channels)


def _tiny_imagenet(network: ResNet, num_classes: int, in_channels: int) -> nn.Module:
    network.conv1 = nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    network.fc = nn.Linear(network.fc.in_features, num_classes, bias=False)
    network.features_layer = f"layer4.{len(network.layer4) - 1}.sum"
    return _started(network)


def subspace_resnet50(num_classes: int, in_channels: int = 3, image_size: int = 224) -> nn.Module:
    """torchvision's ResNet-50 (v1.5): 25,556,032 parameters with 1,000 classes."""
    return _imagenet(torchvision_resnet.resnet50(), num_classes, in_channels)


def wide_resnet50_2(num_classes: int, in_channels: int = 3, image_size: int = 224) -> nn.Module:
    """torchvision's Wide ResNet-50-2: 68,882,240 parameters with 1,000 classes."""
    return _imagenet(torchvision_resnet.wide_resnet50_2(), num_classes, in_channels)


def _imagenet(network: ResNet, num_classes: int, in_channels: int) -> nn.Module:
    if in_channels != 3:
        raise ValueError(f"expected colour images for an ImageNet network, got {in_channels} channels.")
    network.fc = nn.Linear(network.fc.in_features, num_classes, bias=False)
    network.features_layer = "avgpool"
    return _started(network)


def _started(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    return network
