"""NASNet-A (Zoph et al. 2017, arXiv 1707.07012), without auxiliary classifier and drop-path."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from experiments.models.cifar100.layers import classifier, conv, conv_bn, network, separable

# A cell is a table of sums: each row adds two operations on earlier tensors, and gives the next one.
# Tensors 0 and 1 are the previous cell's input and output, after both were brought to the same shape.
NORMAL = [
    (("separable3", 1), ("identity", 1)),
    (("separable3", 0), ("separable5", 1)),
    (("average", 1), ("identity", 1)),  # in the paper the identity reads tensor 0
    (("average", 0), ("average", 0)),
    (("separable5", 0), ("separable3", 0)),
]
REDUCTION = [
    (("separable7", 0), ("separable5", 1)),
    (("max", 1), ("separable7", 0)),
    (("average", 1), ("separable5", 0)),
    (("max", 1), ("separable3", 2)),
    (("average", 2), ("identity", 3)),
]


def _relu_conv_bn(inputs: int, outputs: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), conv(inputs, outputs, bias=bias), nn.BatchNorm2d(outputs))


def _operation(name: str, channels: int, stride: int, bias: bool) -> nn.Module:
    if name == "identity":
        return nn.Identity()
    if name in ("average", "max"):
        pool = nn.AvgPool2d if name == "average" else nn.MaxPool2d
        return pool(3, stride=stride, padding=1)
    kernel = int(name.removeprefix("separable"))
    layers = []
    for step, depthwise_bias in ((stride, bias), (1, True)):
        layers += [nn.ReLU(), separable(channels, channels, kernel, step, biases=(depthwise_bias, True))]
        layers += [nn.BatchNorm2d(channels)]
    return nn.Sequential(*layers)


class Fit(nn.Module):
    """Brings the older tensor to the cell's shape, in the way that the shapes ask for.

    As in the original both ways are owned and at most one is used: the parameters of the other never get a
    gradient.
    """

    skips_parameters = True  # DistributedDataParallel has to look for parameters without a gradient

    def __init__(self, inputs: int, outputs: int, halve: bool):
        super().__init__()
        self.halve, self.project = halve, not halve and inputs != outputs
        self.even, self.odd = (conv(inputs, outputs // 2, bias=True) for _ in range(2))
        self.bn = nn.BatchNorm2d(outputs)
        self.projection = _relu_conv_bn(inputs, outputs, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height, width), halved where asked."""
        if self.halve:
            x = F.relu(x)
            shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
            return self.bn(torch.cat([self.even(x[:, :, ::2, ::2]), self.odd(shifted[:, :, ::2, ::2])], dim=1))
        return self.projection(x) if self.project else x


class Cell(nn.Module):
    """One table of sums; those that no other row reads are the output, side by side.

    A normal cell's output starts with the older tensor.
    """

    def __init__(self, table: list, inputs: tuple[int, int], channels: int, halve: bool):
        super().__init__()
        self.table, stride, bias = table, 2 if table is REDUCTION else 1, table is REDUCTION
        self.outputs = (3, 4, 5, 6) if table is REDUCTION else (0, 2, 3, 4, 5, 6)
        self.entry = _relu_conv_bn(inputs[1], channels, bias=bias)
        self.fit = Fit(inputs[0], channels, halve)
        self.operations = nn.ModuleList(
            _operation(name, channels, stride if source < 2 else 1, bias) for row in table for name, source in row
        )

    def forward(self, older: Tensor | None, x: Tensor) -> Tensor:
        """The tensors before this cell to the one after it; the first cell has no older one."""
        entered = self.entry(x)
        tensors = [x if older is None else self.fit(older), entered]
        operations = iter(self.operations)
        for (_, left), (_, right) in self.table:
            tensors.append(next(operations)(tensors[left]) + next(operations)(tensors[right]))
        return torch.cat([tensors[index] for index in self.outputs], dim=1)


class Cells(nn.ModuleList):
    """Cells in a row, each reading the outputs of the two before it."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the last cell's output, rectified."""
        older = None
        for cell in self:
            older, x = x, cell(older, x)
        return F.relu(x)


def nasnet(num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """NASNet-A with 3 x 4 normal cells of 44, 88 and 176 channels: 5,221,624 parameters with 100 classes.

    Of these 887,568 are never used: see ``Fit``. The stem is a convolution and BatchNorm without ReLU.
    """
    cells, inputs, halve = [], (44, 44), False
    for stage, channels in enumerate((44, 88, 176)):
        for table in ([REDUCTION] if stage else []) + 4 * [NORMAL]:
            cells.append(Cell(table, inputs, channels, halve))
            inputs = (inputs[1], len(cells[-1].outputs) * channels)
            halve = table is REDUCTION
    return network(conv_bn(in_channels, 44, 3, activation=None), Cells(cells), classifier(1056, num_classes))
