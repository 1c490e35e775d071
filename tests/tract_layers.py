"""The table of layers and inputs that the laws of `tract` are tested on."""

import torch
import torch.nn as nn

from tract import TrAct

# name: (plain class, its arguments, shape of an input)
LAYERS = {
    "linear": (nn.Linear, (6, 4), {}, (20, 6)),
    "linear few rows": (nn.Linear, (30, 4), {}, (7, 30)),
    "linear one row": (nn.Linear, (6, 4), {}, (6,)),
    "linear tokens": (nn.Linear, (6, 4), {"bias": False}, (3, 5, 6)),
    "linear rank 4": (nn.Linear, (6, 4), {}, (2, 3, 2, 6)),
    "linear b=n": (nn.Linear, (8, 4), {}, (8, 8)),
    "conv1d": (nn.Conv1d, (3, 4, 3), {}, (4, 3, 9)),
    "conv1d few rows": (nn.Conv1d, (5, 4, 5), {"stride": 3}, (2, 5, 12)),
    "conv1d circular": (nn.Conv1d, (3, 4, 4), {"padding": 3, "padding_mode": "circular", "stride": 2}, (3, 3, 9)),
    "conv1d same": (nn.Conv1d, (3, 4, 4), {"padding": "same"}, (3, 3, 9)),
    "conv1d unbatched": (nn.Conv1d, (2, 4, 3), {"dilation": 2}, (2, 20)),
    "conv1d reflect same": (nn.Conv1d, (2, 4, 4), {"padding": "same", "padding_mode": "reflect"}, (3, 2, 9)),
    "conv2d": (nn.Conv2d, (3, 5, 3), {}, (4, 3, 7, 6)),
    "conv2d few rows": (nn.Conv2d, (3, 5, 4), {"stride": 4}, (3, 3, 8, 8)),
    "conv2d patches": (nn.Conv2d, (2, 5, 3), {"stride": 3, "bias": False}, (6, 2, 9, 9)),
    "conv2d strided": (nn.Conv2d, (3, 5, (5, 3)), {"stride": (2, 3), "padding": (2, 1)}, (4, 3, 11, 9)),
    "conv2d gaps": (nn.Conv2d, (3, 5, 2), {"stride": 3}, (6, 3, 9, 10)),
    "conv2d valid": (nn.Conv2d, (3, 5, 3), {"padding": "valid", "stride": 2}, (6, 3, 8, 8)),
    "conv2d same": (nn.Conv2d, (2, 5, 3), {"padding": "same", "dilation": 2}, (3, 2, 7, 8)),
    "conv2d same even": (nn.Conv2d, (2, 5, (4, 2)), {"padding": "same", "dilation": (1, 3)}, (3, 2, 7, 8)),
    "conv2d reflect": (nn.Conv2d, (2, 5, 3), {"padding": (2, 1), "padding_mode": "reflect"}, (3, 2, 7, 8)),
    "conv2d replicate": (nn.Conv2d, (2, 5, 3), {"padding": (1, 3), "padding_mode": "replicate"}, (3, 2, 5, 6)),
    "conv2d circular": (nn.Conv2d, (2, 5, 3), {"padding": (1, 2), "padding_mode": "circular"}, (3, 2, 7, 6)),
    "conv2d same circular": (nn.Conv2d, (2, 5, (2, 3)), {"padding": "same", "padding_mode": "circular"}, (3, 2, 7, 6)),
    "conv2d dilated": (nn.Conv2d, (2, 5, 3), {"dilation": (2, 3), "padding": 2}, (3, 2, 9, 9)),
    "conv2d groups": (nn.Conv2d, (4, 6, 3), {"groups": 2, "padding": 1}, (3, 4, 6, 5)),
    "conv2d groups few rows": (nn.Conv2d, (6, 4, 4), {"groups": 2, "stride": 4}, (2, 6, 8, 8)),
    "conv2d depthwise": (nn.Conv2d, (3, 6, 3), {"groups": 3, "stride": 2}, (4, 3, 8, 8)),
    "conv2d 1x1": (nn.Conv2d, (3, 5, 1), {}, (4, 3, 4, 4)),
    "conv2d unbatched": (nn.Conv2d, (2, 5, 3), {"padding": 1}, (2, 8, 7)),
    "conv2d everything": (
        nn.Conv2d,
        (4, 6, (3, 2)),
        {"groups": 2, "stride": (2, 1), "dilation": (1, 2), "padding": (2, 1), "padding_mode": "reflect"},
        (4, 4, 8, 7),
    ),
    "conv3d": (nn.Conv3d, (2, 4, 2), {"padding": 1}, (3, 2, 4, 3, 5)),
    "conv3d few rows": (nn.Conv3d, (3, 4, (1, 4, 4)), {"stride": (1, 4, 4)}, (2, 3, 2, 8, 8)),
    "conv3d strided": (nn.Conv3d, (2, 4, (3, 2, 2)), {"stride": (2, 1, 2), "dilation": (1, 2, 1)}, (3, 2, 7, 6, 6)),
    "conv3d same": (nn.Conv3d, (1, 4, (2, 3, 4)), {"padding": "same"}, (2, 1, 4, 5, 4)),
    "conv3d replicate": (nn.Conv3d, (2, 4, 2), {"padding": (1, 0, 2), "padding_mode": "replicate"}, (2, 2, 3, 4, 4)),
    "conv3d groups": (nn.Conv3d, (4, 4, 2), {"groups": 2, "bias": False}, (2, 4, 4, 4, 4)),
    "conv3d unbatched": (nn.Conv3d, (2, 4, 2), {}, (2, 4, 5, 4)),
}
A_FEW = ("linear", "linear few rows", "conv1d same", "conv2d everything", "conv2d few rows", "conv3d groups")


def make(name, dtype=torch.float64):
    """A plain layer of the table, an input and a direction of its output's shape."""
    kind, arguments, options, shape = LAYERS[name]
    layer = kind(*arguments, dtype=dtype, **options)
    x = torch.randn(shape, dtype=dtype)
    return layer, x, torch.randn_like(layer(x)).detach()


def gradients(layer, x, direction):
    """Output and gradients of sum(layer(x) * direction), as (z, dW, db, dx)."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    z = layer(x)
    (z * direction).sum().backward()
    bias = None if layer.bias is None else layer.bias.grad
    return z.detach(), layer.weight.grad, bias, x.grad


def tract_gradient(layer, x, direction, damping=0.1):
    """The weight gradient of the wrapped layer."""
    return gradients(TrAct(layer, damping), x, direction)[1]


def error(actual, expected):
    """Distance in the Frobenius norm relative to the expected tensor's."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
