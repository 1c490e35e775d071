import pytest
import torch
import torch.nn as nn

from tests import reference
from tests.tract_layers import error, gradients, tract_gradient
from tract import TrAct, accumulate

HALVES = [torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps
LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (64, 12)),
    "linear few rows": (lambda: nn.Linear(48, 8), (20, 48)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), (4, 3, 8, 8)),
    "conv few rows": (lambda: nn.Conv2d(3, 8, 8, stride=8), (3, 3, 16, 16)),
}
everywhere = pytest.mark.parametrize("name", LAYERS)


def _make(name):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    return layer, x, torch.randn_like(layer(x)).detach()


def _autocast_gradients(function, layer, x, direction, dtype):
    with torch.autocast("cpu", dtype):
        return function(layer, x, direction)


def _expected(name, layer, x, direction, plain):
    """With many rows the layer's own weight gradient is given; with few, the gradient of its output."""
    if name.endswith("few rows"):
        return reference.tract_gradient(layer, x, direction, 0.1)
    return reference.preconditioned(plain, reference.second_moment(layer, x), 0.1)


@everywhere
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_gradient_is_the_float64_formula_of_what_the_plain_kernels_give(name, dtype):
    """Half precision enters through the plain layer's own kernels only."""
    layer, x, direction = _make(name)
    plain = _autocast_gradients(reference.plain_gradients, layer, x, direction, dtype)[1]
    actual = _autocast_gradients(gradients, TrAct(layer, 0.1), x, direction, dtype)[1]
    assert actual.dtype == torch.float32
    assert error(actual, _expected(name, layer, x, direction.to(dtype), plain)) < 2 * EPS


@everywhere
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_error_is_the_plain_gradients_error_over_damping_at_most(name, dtype):
    layer, x, direction = _make(name)
    plain = _autocast_gradients(reference.plain_gradients, layer, x, direction, dtype)[1]
    exact_plain = reference.plain_gradients(layer.double(), x.double(), direction.double())[1]
    exact = reference.tract_gradient(layer, x, direction, 0.1)
    actual = _autocast_gradients(gradients, TrAct(layer.float(), 0.1), x, direction, dtype)[1]
    assert 0 < (actual - exact).norm() <= (plain - exact_plain).norm() / 0.1 + EPS * exact.norm()


@everywhere
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_output_bias_and_input_gradients_are_the_plain_layers(name, dtype):
    layer, x, direction = _make(name)
    plain = _autocast_gradients(reference.plain_gradients, layer, x, direction, dtype)
    ours = _autocast_gradients(gradients, TrAct(layer), x, direction, dtype)
    assert ours[0].dtype == dtype
    assert all(torch.equal(ours[i], plain[i]) for i in (0, 2, 3))


@everywhere
@pytest.mark.parametrize("dtype", HALVES)
def test_parameters_in_half_precision_get_the_float64_formula_of_what_the_plain_kernels_give(name, dtype):
    layer, x, direction = (t.to(dtype) for t in _make(name))
    plain = reference.plain_gradients(layer, x, direction)[1]
    actual = tract_gradient(layer, x, direction)
    assert actual.dtype == dtype
    assert error(actual, _expected(name, layer, x, direction, plain)) < torch.finfo(dtype).eps


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_linear_in_the_loss(name, dtype):
    """A loss scale of 2^16 comes out exactly, so fp16 loss scaling changes nothing."""
    layer, x, direction = (t.to(dtype) for t in _make(name))
    once = tract_gradient(layer, x, direction).clone()
    assert torch.equal(tract_gradient(layer, x, direction * 2**16), once * 2**16)


def _scaled_step(layer, x, direction, scale):
    """The weight after one SGD step with fp16 autocast and a loss scale."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with torch.autocast("cpu", torch.float16):
        loss = (layer(x).float() * direction).mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return layer.weight.detach().clone(), scaler.get_scale()


@everywhere
def test_grad_scaler_leaves_the_step_unchanged(name):
    layer, x, direction = _make(name)
    start = layer.state_dict()
    start = {key: value.clone() for key, value in start.items()}
    steps = []
    for scale in (2.0**8, 2.0**12):
        layer.load_state_dict(start)
        layer.zero_grad()
        steps.append(_scaled_step(TrAct(layer), x, direction, scale)[0] - start["weight"])
    exact = -0.01 * reference.tract_gradient(layer.double(), x, direction / direction.numel(), 0.1)
    assert error(steps[0], steps[1]) < 0.01
    assert error(steps[1], exact) < 0.05


@everywhere
def test_an_overflowing_loss_scale_skips_the_step_and_is_lowered(name):
    layer, x, direction = _make(name)
    before = layer.weight.detach().clone()
    after, scale = _scaled_step(TrAct(layer), x, direction, 2.0**40)
    assert torch.equal(after, before)
    assert scale == 2.0**39


@everywhere
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_inside_accumulate_gives_the_sum_of_plain_gradients_times_the_common_inverse(name, dtype):
    """With few rows, of the part of it that is in the rows' space: the rest is rounding."""
    layer, x, direction = _make(name)
    parts = list(zip(x.split(2), direction.split(2), strict=True))
    plain = sum(_autocast_gradients(reference.plain_gradients, layer, *part, dtype)[1] for part in parts)
    wrapped = TrAct(layer, 0.1)
    with accumulate(wrapped):
        for part, out in parts:
            with torch.autocast("cpu", dtype):
                (wrapped(part) * out).sum().backward()
    if name.endswith("few rows"):
        (rows,) = reference.rows(layer, x)
        plain = (plain.double().flatten(1) @ torch.linalg.pinv(rows) @ rows).view_as(plain)
    expected = reference.preconditioned(plain, reference.second_moment(layer, x), 0.1)
    assert error(layer.weight.grad, expected) < 100 * EPS
