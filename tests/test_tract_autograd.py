"""TrAct together with the rest of autograd: compilation, checkpointing, hooks, frozen weights."""

import contextlib

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from tests import reference
from tests.tract_layers import A_FEW, error, gradients, make
from tract import TrAct, TrActConv2d, TrActLinear, accumulate

MODELS = {
    "linear": (lambda: TrActLinear(6, 4), (20, 6)),
    "linear, few rows": (lambda: TrActLinear(40, 4), (7, 40)),
    "grouped conv": (lambda: TrActConv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"), (3, 4, 8, 8)),
    "conv, few rows": (lambda: TrActConv2d(3, 6, 8, stride=8), (3, 3, 16, 16)),
}


def _model(name):
    make_layer, shape = MODELS[name]
    return nn.Sequential(make_layer(), nn.Tanh()), torch.randn(shape)


def _step(model, batches):
    """Gradients of all parameters after one step of accumulation over the batches."""
    model.zero_grad()
    with accumulate(model):
        for batch in batches:
            model(batch).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def _gradients(model, x, forward=None):
    model.zero_grad()
    x = x.clone().requires_grad_()
    (forward or model)(x).square().mean().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


def _assert_agree(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert error(a, e) < 1e-5


INDUCTOR = [("linear, few rows", "inductor"), ("grouped conv", "inductor")]


@pytest.mark.parametrize(("name", "backend"), [*((name, "aot_eager") for name in MODELS), *INDUCTOR])
def test_compiled_graph_without_breaks_agrees_with_eager(name, backend):
    torch.compiler.reset()
    model, x = _model(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    _assert_agree(_gradients(model, x, compiled), _gradients(model, x))


def test_compiled_accumulation_agrees_with_eager_and_does_not_recompile_at_each_step():
    torch.compiler.reset()
    model, x = _model("grouped conv")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in torch.randn(12, *x.shape):
        _assert_agree(_step(compiled, batch.split(1)), _step(model, batch.split(1)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_nothing(name, reentrant):
    model, x = _model(name)
    again = _gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    for a, e in zip(again, _gradients(model, x), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing_inside_accumulate(reentrant):
    model, x = _model("linear")

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)

    _assert_agree(_step(Checkpointed(), x.split([5, 15])), _step(model, x.split([5, 15])))


@pytest.mark.parametrize("name", A_FEW)
def test_module_and_tensor_hooks_see_what_they_see_without_tract(name):
    """The weight's hooks see the TrAct gradient, all others the plain tensors."""

    def record(layer):
        seen = {}
        layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
        layer.register_forward_hook(lambda _, __, z: seen.update(z=z))
        layer.register_full_backward_hook(lambda _, dx, dz: seen.update(dx=dx[0], dz=dz[0]))
        handle = layer.weight.register_hook(lambda g: seen.update(weight=g))
        gradients(layer, x, direction)
        handle.remove()
        return seen

    layer, x, direction = make(name)
    wrapped, plain = record(TrAct(layer, 0.1)), record(layer)
    assert error(wrapped.pop("weight"), reference.tract_gradient(layer, x, direction, 0.1)) < 1e-10
    plain.pop("weight")
    assert wrapped.keys() == plain.keys() == {"x", "z", "dx", "dz"}
    assert all(torch.equal(wrapped[key], plain[key]) for key in plain)


def test_a_hook_that_runs_when_the_gradient_is_complete_sees_the_tract_gradient():
    layer, x, direction = make("linear")
    seen = []
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    gradients(TrAct(layer, 0.1), x, direction)
    assert error(seen.pop(), reference.tract_gradient(layer, x, direction, 0.1)) < 1e-10
    assert not seen


LOSSES = {"linear": lambda z: z.sum(), "curved": lambda z: z.tanh().sum()}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("of", ["weight", "input", "bias"])
@pytest.mark.parametrize("name", ["linear", "linear few rows", "conv2d", "conv2d few rows"])
def test_a_second_derivative_is_an_error_that_says_so(name, of, loss):
    """Of the gradient of the weight, and of a gradient penalty on the input, whatever the loss."""
    layer, x, _ = make(name)
    x.requires_grad_()
    source = {"weight": layer.weight, "input": x, "bias": layer.bias}[of]
    (gradient,) = torch.autograd.grad(loss(TrAct(layer)(x)), source, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*tract\.unwrap"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("with_input_gradient", [False, True])
@pytest.mark.parametrize("name", ["linear", "linear few rows", "linear tokens", "conv2d", "conv2d few rows"])
def test_an_in_place_operation_may_follow(name, with_input_gradient):
    layer, x, _ = make(name)
    wrapped = TrAct(layer)
    gradients = []
    for inplace in (False, True):
        wrapped.zero_grad()
        z = wrapped(x.clone().requires_grad_(with_input_gradient))
        nn.functional.relu(z, inplace=inplace).square().sum().backward()
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)


def test_options_changed_after_wrapping_count():
    """As when an ImageNet stem is made a CIFAR one."""
    wrapped = TrAct(nn.Conv2d(3, 4, 3, stride=2, padding=1).double())
    wrapped.stride, wrapped.padding, wrapped._reversed_padding_repeated_twice = (1, 1), (0, 0), [0] * 4
    fresh = nn.Conv2d(3, 4, 3).double()
    fresh.load_state_dict(wrapped.state_dict())
    x = torch.randn(4, 3, 8, 8).double()
    direction = torch.randn_like(fresh(x)).detach()
    (wrapped(x) * direction).sum().backward()
    assert error(wrapped.weight.grad, reference.tract_gradient(fresh, x, direction, 0.1)) < 1e-10


@pytest.mark.parametrize("context", [contextlib.nullcontext, accumulate])
def test_a_layer_called_twice_needs_accumulate_to_count_all_rows(context):
    wrapped = TrAct(nn.Linear(6, 4).double())
    x = torch.randn(40, 6).double() * torch.linspace(0.1, 3, 40)[:, None]
    wrapped(x).square().sum().backward()
    together = wrapped.weight.grad.clone()
    wrapped.zero_grad()
    with context(wrapped) if context is accumulate else context():
        (wrapped(x[:20]).square().sum() + wrapped(x[20:]).square().sum()).backward()
    assert (error(wrapped.weight.grad, together) < 1e-10) == (context is accumulate)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", A_FEW)
def test_without_gradients_the_output_is_the_plain_layers(name, mode):
    layer, x, _ = make(name)
    with mode():
        z = TrAct(layer)(x)
        assert torch.equal(z, layer(x))
    assert not z.requires_grad


@pytest.mark.parametrize("name", A_FEW)
def test_evaluation_mode_changes_nothing(name):
    layer, x, direction = make(name)
    assert torch.equal(
        gradients(TrAct(layer).eval(), x, direction)[1].clone(), gradients(TrAct(layer).train(), x, direction)[1]
    )


@pytest.mark.parametrize("name", A_FEW)
def test_a_frozen_weight_gets_no_gradient_and_everything_else_the_plain_one(name):
    layer, x, direction = make(name)
    layer.weight.requires_grad_(False)
    actual = gradients(TrAct(layer), x, direction)
    expected = reference.plain_gradients(layer, x, direction)
    assert actual[1] is None
    assert all((a is None and e is None) or torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_frozen_weight_costs_no_second_moment():
    """Even a non-finite input is none of TrAct's business then."""
    layer, x, _ = make("linear")
    layer.weight.requires_grad_(False)
    assert not TrAct(layer)(x / 0).isfinite().any()


@pytest.mark.parametrize("name", ["linear few rows", "conv2d few rows"])
def test_input_changed_in_place_before_backward_is_an_error(name):
    layer, x, _ = make(name)
    loss = TrAct(layer)(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functional_call_uses_the_given_weight():
    layer, x, direction = make("linear")
    other = {"weight": torch.randn(4, 6).double().requires_grad_(), "bias": torch.zeros(4).double()}
    z = torch.func.functional_call(TrAct(layer, 0.1), other, (x,))
    assert torch.equal(z.detach(), x @ other["weight"].detach().mT)
    (z * direction).sum().backward()
    assert error(other["weight"].grad, reference.tract_gradient(layer, x, direction, 0.1)) < 1e-10
