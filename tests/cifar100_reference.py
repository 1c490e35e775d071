"""The facts about the 36 networks, weights that depend on shapes only, and a second way to some of the networks.

``fill`` gives a network these weights, so two networks of the same function give the same scores
whatever their modules are called and in whichever order they are registered.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor
from torchvision.ops import SqueezeExcitation

FACTS = json.loads((Path(__file__).parent / "cifar100_facts.json").read_text())

_numbers = torch.empty(0, dtype=torch.float64)


def spread(*shape: int) -> Tensor:
    """Numbers in [-0.5, 0.5) from integer arithmetic only; the first few of a long row are those of a short one."""
    global _numbers
    count = math.prod(shape)
    if count > len(_numbers):
        i = torch.arange(count)
        _numbers = ((i * i * 40503 + i * 2654435761 + 12345) % 2**32).double() / 2**32 - 0.5
    return _numbers[:count].view(shape)


def weight_of(*shape: int) -> Tensor:
    """The weight of a convolution or Linear layer: variance 2 / fan-in."""
    return math.sqrt(24 / math.prod(shape[1:])) * spread(*shape)


def fill(model: nn.Module) -> nn.Module:
    """A network built on the device "meta", in float64 and evaluation, with BatchNorm on the batch's statistics."""
    model.double().to_empty(device="cpu").eval()
    with torch.no_grad():
        for module in model.modules():
            normalises = isinstance(module, nn.BatchNorm2d)
            module.training = normalises
            for name, p in module.named_parameters(recurse=False):
                if normalises:
                    p.copy_((name == "weight") + 0.2 * spread(*p.shape))
                else:
                    p.copy_(weight_of(*p.shape) if p.dim() > 1 else 0.2 * spread(*p.shape))
    return model


def images(count: int = 4, size: int = 32) -> Tensor:
    """The fixed input, of variance one."""
    return math.sqrt(12) * spread(count, 3, size, size)


def check_values(model: nn.Module, first: nn.Module) -> dict[str, float | list[float]]:
    """Scores, loss and the first layer's weight gradient of a filled network."""
    scores = model(images())
    loss = F.cross_entropy(scores, torch.arange(4))
    (gradient,) = torch.autograd.grad(loss, first.weight)
    return {
        "logits_row0_first4": scores[0, :4].tolist(),
        "logits_l2": scores.norm().item(),
        "loss": loss.item(),
        "first_weight_grad_l2": gradient.norm().item(),
        "first_weight_grad_first3": gradient.flatten()[:3].tolist(),
    }


# -- written out with functions --------------------------------------------------------------------


def _conv(x: Tensor, outputs: int, kernel: int = 1, stride: int = 1, padding: int | None = None, groups: int = 1):
    """With a bias; the padding keeps the size unless it is given."""
    weight = weight_of(outputs, x.shape[1] // groups, kernel, kernel)
    return F.conv2d(x, weight, 0.2 * spread(outputs), stride, kernel // 2 if padding is None else padding, 1, groups)


def _norm(x: Tensor) -> Tensor:
    row = 0.2 * spread(x.shape[1])
    return F.batch_norm(x, None, None, 1 + row, row, training=True)


def _linear(x: Tensor, outputs: int) -> Tensor:
    return x @ weight_of(outputs, x.shape[1]).T + 0.2 * spread(outputs)


def squeezenet(x: Tensor) -> Tensor:
    def layer(x, outputs, kernel=1):
        return _norm(_conv(x, outputs, kernel)).relu()

    def fire(x, squeezed, half):
        x = layer(x, squeezed)
        return torch.cat([layer(x, half), layer(x, half, 3)], 1)

    x = F.max_pool2d(layer(x, 96, 3), 2)
    x = fire(x, 16, 64)
    x = fire(x, 16, 64) + x
    x = F.max_pool2d(fire(x, 32, 128), 2)
    x = fire(x, 32, 128) + x
    x = fire(x, 48, 192)
    x = fire(x, 48, 192) + x
    x = F.max_pool2d(fire(x, 64, 256), 2)
    return _conv(fire(x, 64, 256), 100).mean((2, 3))


def mobilenetv2(x: Tensor) -> Tensor:
    def bottleneck(x, outputs, stride, expansion):
        width = x.shape[1] * expansion
        y = F.relu6(_norm(_conv(x, width)))
        y = F.relu6(_norm(_conv(y, width, 3, stride, groups=width)))
        y = _norm(_conv(y, outputs))
        return x + y if y.shape == x.shape else y

    x = F.relu6(_norm(_conv(x, 32, padding=1)))
    x = bottleneck(x, 16, 1, 1)
    strided = {(24, 0), (32, 0), (64, 0)}
    for outputs, depth in ((24, 2), (32, 3), (64, 4), (96, 3), (160, 3), (320, 1)):
        for index in range(depth):
            x = bottleneck(x, outputs, 2 if (outputs, index) in strided else 1, 6)
    x = F.relu6(_norm(_conv(x, 1280)))
    return _conv(x.mean((2, 3), keepdim=True), 100)[:, :, 0, 0]


def wideresnet(x: Tensor, blocks: int, widening: int) -> Tensor:
    x = _conv(x, 16, 3)
    for stage, width in enumerate((16, 32, 64)):
        for index in range(blocks):
            stride, outputs = 2 if stage and index == 0 else 1, widening * width
            y = _conv(_norm(x).relu(), outputs, 3, stride)
            y = _conv(_norm(y).relu(), outputs, 3)
            x = y + (_conv(x, outputs, 1, stride) if index == 0 else x)
    return _linear(_norm(x).relu().mean((2, 3)), 100)


# -- from torchvision's networks -------------------------------------------------------------------


def _conv_like(layer: nn.Conv2d, **changes) -> nn.Conv2d:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
    options = {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}
    return nn.Conv2d(**(options | changes))


def _blocks(network: nn.Module) -> list[nn.Module]:
    return [block for n in (1, 2, 3, 4) for block in getattr(network, f"layer{n}")]


def _resnet(constructor: Callable, biases: bool) -> nn.Module:
    """torchvision's, with a 3x3 stem, without pooling, and on request with a bias in every convolution."""
    network = constructor(num_classes=100)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    if biases:
        for module in list(network.modules()):
            for name, layer in module.named_children():
                if isinstance(layer, nn.Conv2d):
                    setattr(module, name, _conv_like(layer, bias=True))
    return network


def resnext50() -> nn.Module:
    network = _resnet(tv.resnext50_32x4d, biases=False)
    for block in _blocks(network):
        block.conv1 = _conv_like(block.conv1, groups=32)
    return network


def seresnet(layers: int) -> nn.Module:
    network = _resnet({18: tv.resnet18, 50: tv.resnet50}[layers], biases=True)
    for block in _blocks(network):
        last = "bn2" if layers == 18 else "bn3"
        norm = getattr(block, last)
        excite = SqueezeExcitation(norm.num_features, norm.num_features // 16)
        setattr(block, last, nn.Sequential(norm, nn.ReLU(), excite))
    return network


class _Surviving(nn.Module):
    """A torchvision block in evaluation: the residual times p, no ReLU after the sum."""

    def __init__(self, block: nn.Module, p: float):
        super().__init__()
        self.block, self.p = block, p

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        y = block.conv2(block.relu(block.bn1(block.conv1(x))))
        y = block.bn2(y)
        if isinstance(block, tv.resnet.Bottleneck):
            y = block.bn3(block.conv3(block.relu(y)))
        return (x if block.downsample is None else block.downsample(x)) + self.p * y


def stochasticdepth(layers: int) -> nn.Module:
    network = _resnet({34: tv.resnet34, 50: tv.resnet50}[layers], biases=layers == 34)
    network.conv1 = _conv_like(network.conv1, bias=True)
    count = 0
    for n in (1, 2, 3, 4):
        stage = getattr(network, f"layer{n}")
        for index, block in enumerate(stage):
            stage[index] = _Surviving(block, 1 - 0.5 * count / 15)
            count += 1
    return network


def densenet(layers: int) -> nn.Module:
    network = {161: tv.densenet161, 201: tv.densenet201}[layers](num_classes=100)
    features = network.features
    features.conv0 = nn.Conv2d(3, features.conv0.out_channels, 3, padding=1, bias=False)
    features.norm0 = features.relu0 = features.pool0 = nn.Identity()
    for n in (1, 2, 3):
        getattr(features, f"transition{n}").relu = nn.Identity()
    return network


class _Vgg11(nn.Module):
    """torchvision's as it is: its 7x7 pooling repeats the one pixel that is left, so its first weight is shared."""

    def __init__(self):
        super().__init__()
        self.network = tv.vgg11_bn(num_classes=100, init_weights=False)
        self.network.classifier[0] = nn.Linear(512, 4096)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.network.avgpool(self.network.features(x))
        return self.network.classifier(pooled.mean((2, 3)))


# network: its scores for a batch of images, by another route
REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "squeezenet": squeezenet,
    "mobilenetv2": mobilenetv2,
} | {
    name: lambda x, build=build, options=options: fill(_on_meta(build, *options))(x)
    for name, build, options in (
        ("vgg11", _Vgg11, ()),
        ("densenet161", densenet, (161,)),
        ("densenet201", densenet, (201,)),
        ("resnet18", _resnet, (tv.resnet18, False)),
        ("resnext50", resnext50, ()),
        ("seresnet18", seresnet, (18,)),
        ("seresnet50", seresnet, (50,)),
        ("stochasticdepth34", stochasticdepth, (34,)),
        ("stochasticdepth50", stochasticdepth, (50,)),
    )
}


def _on_meta(build: Callable, *options) -> nn.Module:
    with torch.device("meta"):
        return build(*options)
