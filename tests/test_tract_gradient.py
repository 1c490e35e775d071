import random

import pytest
import torch
import torch.nn as nn

from tests import reference
from tests.tract_layers import A_FEW, LAYERS, error, gradients, make, tract_gradient
from tract import TrAct

ROUNDING = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", LAYERS)
def test_reference_rows_times_weight_are_the_layers_output(name):
    layer, x, _ = make(name)
    weight = layer.weight.reshape(getattr(layer, "groups", 1), -1, reference.rows(layer, x).shape[-1])
    z = (reference.rows(layer, x) @ weight.mT).transpose(0, 1).flatten(1)
    if layer.bias is not None:
        z = z + layer.bias
    if isinstance(layer, nn.Linear):
        expected = layer(x).reshape(z.shape)
    else:
        images = x if x.dim() == layer.weight.dim() else x[None]
        expected = layer(images).flatten(2).permute(2, 0, 1).reshape(z.shape)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damping", [0.003, 0.1, 7.0])
@pytest.mark.parametrize("name", LAYERS)
def test_weight_gradient_is_plain_gradient_times_inverse_of_damped_second_moment(name, damping):
    layer, x, direction = make(name)
    expected = reference.tract_gradient(layer, x, direction, damping)
    assert error(tract_gradient(layer, x, direction, damping), expected) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_output_bias_gradient_and_input_gradient_are_the_plain_layers_bit_for_bit(name, dtype):
    layer, x, direction = make(name, dtype)
    z, _, bias, dx = gradients(TrAct(layer), x, direction)
    plain_z, _, plain_bias, plain_dx = reference.plain_gradients(layer, x, direction)
    assert torch.equal(z, plain_z)
    assert torch.equal(dx, plain_dx)
    assert (bias is None and plain_bias is None) or torch.equal(bias, plain_bias)


@pytest.mark.parametrize("name", LAYERS)
def test_in_float32_only_the_plain_gradients_own_rounding_is_left(name):
    """|T32 - T64| <= |G32 - G64| / lambda + rounding of T, because the inverse has norm at most 1 / lambda."""
    damping = 0.1
    layer, x, direction = make(name, torch.float32)
    actual = tract_gradient(layer, x, direction, damping).double()
    expected = reference.tract_gradient(layer, x, direction, damping)
    G32 = reference.plain_gradients(layer, x, direction)[1]
    G64 = reference.plain_gradients(layer.double(), x.double(), direction.double())[1]
    bound = (G32 - G64).norm() / damping + ROUNDING * expected.norm()
    assert (actual - expected).norm() <= bound


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded", "offset"])
@pytest.mark.parametrize(
    "name", ["conv2d everything", "conv2d few rows", "conv3d groups", "conv1d same", "linear tokens"]
)
def test_memory_layout_of_the_input_does_not_matter(name, layout):
    layer, x, direction = make(name)
    x = {
        "channels_last": lambda: _channels_last(x),
        "transposed": lambda: x.transpose(0, -1).contiguous().transpose(0, -1),
        "strided": lambda: torch.stack([x, -x], dim=-1)[..., 0],
        "expanded": lambda: x[:1].expand_as(x),
        "offset": lambda: torch.cat([x[:1], x])[1:],
    }[layout]()
    expected = reference.tract_gradient(layer, x, direction, 0.1)
    assert error(tract_gradient(layer, x, direction), expected) < 1e-11


def _channels_last(x):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x.mT.contiguous().mT


def test_channels_last_weights_give_the_same_gradient():
    layer, x, direction = make("conv2d groups")
    expected = reference.tract_gradient(layer, x, direction, 0.1)
    actual = tract_gradient(layer.to(memory_format=torch.channels_last), _channels_last(x), direction)
    assert error(actual, expected) < 1e-11


@pytest.mark.parametrize("seed", range(60))
def test_random_convolutions_and_linear_layers_follow_the_formula(seed):
    draw = random.Random(seed)
    layer, x = (_random_linear if draw.random() < 0.15 else _random_convolution)(draw)
    direction = torch.randn_like(layer(x)).detach()
    damping = 10 ** draw.uniform(-2, 1)
    expected = reference.tract_gradient(layer, x, direction, damping)
    assert error(tract_gradient(layer, x, direction, damping), expected) < 1e-10


def _random_linear(draw):
    n = draw.randint(1, 20)
    shape = [draw.randint(1, 4) for _ in range(draw.randint(0, 3))]
    return nn.Linear(n, 3, bias=draw.random() < 0.5).double(), torch.randn(*shape, n).double()


def _random_convolution(draw):
    dims = draw.choice([1, 2, 2, 2, 3])
    some = lambda low, high: tuple(draw.randint(low, high) for _ in range(dims))  # noqa: E731
    groups, kernel, dilation, sizes = draw.randint(1, 3), some(1, 4), some(1, 2), some(7, 10 - dims)
    padding = draw.choice(["same", "valid", some(0, 3)])
    options = {
        "stride": 1 if padding == "same" else some(1, 4),
        "padding": padding,
        "padding_mode": draw.choice(["zeros", "reflect", "replicate", "circular"]),
        "bias": draw.random() < 0.5,
    }
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    layer = kind(groups * draw.randint(1, 2), groups * 2, kernel, groups=groups, dilation=dilation, **options)
    batch = [] if draw.random() < 0.2 else [draw.randint(1, 3)]
    return layer.double(), torch.randn(*batch, layer.in_channels, *sizes).double()


@pytest.mark.parametrize("name", A_FEW)
def test_empty_batch_gives_a_zero_gradient(name):
    layer, x, _ = make(name)
    empty = x[:0]
    assert torch.equal(tract_gradient(layer, empty, layer(empty)), torch.zeros_like(layer.weight))


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv3d"])
def test_input_of_a_wrong_shape_fails_with_the_plain_layers_message(name):
    layer, x, _ = make(name)
    wrong = x[..., :-1] if name == "linear" else x[:, :-1]
    with pytest.raises(RuntimeError) as plain:
        layer(wrong)
    with pytest.raises(RuntimeError) as wrapped:
        TrAct(layer)(wrong)
    assert str(wrapped.value) == str(plain.value)


def test_a_layer_used_twice_adds_the_gradients_of_both_uses():
    layer, x, direction = make("linear")
    _, y, other = make("linear")
    wrapped = TrAct(layer, 0.1)
    ((wrapped(x) * direction).sum() + (wrapped(y) * other).sum()).backward()
    expected = reference.tract_gradient(layer, x, direction, 0.1) + reference.tract_gradient(layer, y, other, 0.1)
    assert error(layer.weight.grad, expected) < 1e-11


def test_penalty_on_the_weight_itself_is_not_preconditioned():
    layer, x, direction = make("conv2d")
    wrapped = TrAct(layer, 0.1)
    ((wrapped(x) * direction).sum() + 0.5 * wrapped.weight.square().sum()).backward()
    expected = reference.tract_gradient(layer, x, direction, 0.1) + layer.weight.detach()
    assert error(layer.weight.grad, expected) < 1e-11
