import copy
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations

from tests import reference
from tests.tract_layers import A_FEW, error, gradients, make
from tract import NonFiniteError, TrAct, TrActLinear, accumulate, unwrap
from tract.layers import tract_layers

SPLITS = {"conv1d same": [2, 1], "conv2d everything": [1, 3], "conv2d few rows": [1, 1, 1], "conv3d groups": [1, 1]}
SPLITS |= {"linear": [5, 1, 14], "linear few rows": [3, 4]}


def _backward(layer, x, direction):
    (layer(x) * direction).sum().backward()


@pytest.mark.parametrize("name", A_FEW)
def test_micro_batches_of_any_sizes_give_the_gradient_of_their_union(name):
    layer, x, direction = make(name)
    wrapped = TrAct(layer, 0.1)
    with accumulate(wrapped):
        for part, out in zip(x.split(SPLITS[name]), direction.split(SPLITS[name]), strict=True):
            _backward(wrapped, part, out)
    assert error(layer.weight.grad, reference.tract_gradient(layer, x, direction, 0.1)) < 1e-10


@pytest.mark.parametrize("name", A_FEW)
def test_bias_and_input_gradients_accumulate_as_without_tract(name):
    layer, x, direction = make(name)
    wrapped = TrAct(layer, 0.1)
    with accumulate(wrapped):
        _, _, bias, dx = gradients(wrapped, x, direction)
    _, _, plain_bias, plain_dx = reference.plain_gradients(layer, x, direction)
    assert torch.equal(dx, plain_dx)
    assert (bias is None and plain_bias is None) or torch.equal(bias, plain_bias)


def test_sum_of_the_gradients_of_the_parts_is_something_else():
    """Otherwise the laws here would hold without the context."""
    layer, x, direction = make("linear")
    wrapped = TrAct(layer, 0.1)
    for part, out in zip(x.split([5, 15]), direction.split([5, 15]), strict=True):
        _backward(wrapped, part, out)
    assert error(layer.weight.grad, reference.tract_gradient(layer, x, direction, 0.1)) > 0.01


def test_one_backward_of_two_forward_passes_counts_the_union_of_rows():
    layer, x, direction = make("conv2d")
    wrapped = TrAct(layer, 0.1)
    with accumulate(wrapped):
        ((wrapped(x[:1]) * direction[:1]).sum() + (wrapped(x[1:]) * direction[1:]).sum()).backward()
    assert error(layer.weight.grad, reference.tract_gradient(layer, x, direction, 0.1)) < 1e-10


def test_forward_passes_without_gradient_are_not_counted():
    layer, x, direction = make("linear")
    wrapped = TrAct(layer, 0.1)
    with accumulate(wrapped):
        with torch.no_grad():
            wrapped(100 * x)
        _backward(wrapped, x, direction)
    assert error(layer.weight.grad, reference.tract_gradient(layer, x, direction, 0.1)) < 1e-10


def test_gradients_from_before_are_added_unchanged():
    layer, x, direction = make("linear")
    wrapped, earlier = TrAct(layer, 0.1), torch.randn(4, 6).double()
    layer.weight.grad = earlier.clone()
    with accumulate(wrapped):
        _backward(wrapped, x, direction)
    expected = earlier + reference.tract_gradient(layer, x, direction, 0.1)
    assert error(layer.weight.grad, expected) < 1e-10
    with accumulate(wrapped):
        pass
    assert error(layer.weight.grad, expected) < 1e-10


def test_without_backward_there_is_no_gradient():
    layer, x, _ = make("linear")
    wrapped = TrAct(layer)
    with accumulate(wrapped):
        wrapped(x)
    assert layer.weight.grad is None


def test_a_frozen_weight_keeps_no_gradient():
    layer, x, direction = make("linear")
    wrapped = TrAct(layer)
    layer.weight.requires_grad_(False)
    with accumulate(wrapped):
        _backward(wrapped, x, direction)
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_all_layers_of_a_model_take_part():
    first, x, _ = make("linear")
    second, _, direction = make("linear")
    model = nn.ModuleList([TrAct(first, 0.1), TrAct(second, 0.3)])
    with accumulate(model):
        for part, out in zip(x.split([5, 15]), direction.split([5, 15]), strict=True):
            _backward(model[0], part, out)
            _backward(model[1], part, out)
    assert error(first.weight.grad, reference.tract_gradient(first, x, direction, 0.1)) < 1e-10
    assert error(second.weight.grad, reference.tract_gradient(second, x, direction, 0.3)) < 1e-10


def _is_free(model, x, direction):
    """Whether every layer applies its own inverse again, outside any context."""
    for layer in tract_layers(model):
        expected = reference.tract_gradient(_plain(layer), x, direction, layer.lambda_)
        if error(gradients(layer, x, direction)[1], expected) > 1e-10:
            return False
    return True


def _plain(layer):
    plain = nn.Linear(layer.in_features, layer.out_features).double()
    plain.load_state_dict(layer.state_dict())
    return plain


def _two_layers():
    _, x, direction = make("linear")
    return nn.ModuleList([TrActLinear(6, 4), TrActLinear(6, 4)]).double(), x, direction


def test_nested_contexts_are_an_error_that_leaves_every_layer_usable():
    model, x, direction = _two_layers()
    with accumulate(model[1]), pytest.raises(RuntimeError, match="one tract.accumulate at a time"), accumulate(model):
        pass
    assert _is_free(model, x, direction)


def test_a_refused_inner_context_does_not_disturb_the_outer_one():
    model, x, direction = _two_layers()
    with accumulate(model[1]):
        _backward(model[1], x[:5], direction[:5])
        with pytest.raises(RuntimeError), accumulate(model):
            pass
        _backward(model[1], x[5:], direction[5:])
    expected = reference.tract_gradient(_plain(model[1]), x, direction, 0.1)
    assert error(model[1].weight.grad, expected) < 1e-10


def _failing_step(model, x, direction, error):
    with accumulate(model):
        _backward(model[0], x, direction)
        _backward(model[1], x, direction)
        if error:
            raise error


def test_an_exception_inside_is_passed_on_and_leaves_the_layers_usable():
    model, x, direction = _two_layers()
    with pytest.raises(ZeroDivisionError):
        _failing_step(model, x, direction, ZeroDivisionError())
    assert _is_free(model, x, direction)


def test_a_non_finite_micro_batch_is_an_error_that_leaves_the_layers_usable():
    model, x, direction = _two_layers()
    with pytest.raises(NonFiniteError, match="TrActLinear"):
        _failing_step(model, x / 0, direction, None)
    assert _is_free(model, x, direction)


def test_after_an_error_the_weights_have_their_earlier_gradients():
    model, x, direction = _two_layers()
    model[0].weight.grad = earlier = torch.randn(4, 6).double()
    with pytest.raises(ZeroDivisionError):
        _failing_step(model, x, direction, ZeroDivisionError())
    assert torch.equal(model[0].weight.grad, earlier)
    assert not model[1].weight.grad.any()


def test_a_model_without_tract_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"call tract\.apply_tract"), accumulate(nn.Linear(2, 2)):
        pass


def test_loss_scaling_comes_out_exactly():
    layer, x, direction = make("conv2d", torch.float32)
    wrapped, results = TrAct(layer), []
    for scale in (1, 2**16):
        layer.zero_grad()
        with accumulate(wrapped):
            _backward(wrapped, x[:2], direction[:2] * scale)
            _backward(wrapped, x[2:], direction[2:] * scale)
        results.append(layer.weight.grad.clone())
    assert torch.equal(results[0] * 2**16, results[1])


# -- what others do to gradients, weights and models inside -------------------------------------------

FORGET = {
    "to None": lambda p: setattr(p, "grad", None),
    "zero_grad": lambda p: torch.optim.SGD([p], lr=1.0).zero_grad(),
    "in place": lambda p: torch.optim.SGD([p], lr=1.0).zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("forget", FORGET.values(), ids=FORGET)
def test_gradients_forgotten_at_the_start_do_not_come_back(forget):
    layer, x, direction = make("linear")
    wrapped = TrAct(layer, 0.1)
    layer.weight.grad = torch.randn(4, 6).double()
    with accumulate(wrapped):
        forget(layer.weight)
        for part, out in zip(x.split(5), direction.split(5), strict=True):
            _backward(wrapped, part, out)
    assert error(layer.weight.grad, reference.tract_gradient(layer, x, direction, 0.1)) < 1e-10


@pytest.mark.parametrize("name", ["linear", "linear few rows"])
@pytest.mark.parametrize("at", [1, 2])
def test_zero_grad_in_the_middle_forgets_the_backward_passes_before_it(name, at):
    layer, x, direction = make(name)
    wrapped = TrAct(layer, 0.1)
    splits = (3, 2, len(x) - 5)
    with accumulate(wrapped):
        for k, (part, out) in enumerate(zip(x.split(splits), direction.split(splits), strict=True)):
            if k == at:
                wrapped.zero_grad()
            _backward(wrapped, part, out)
    left = sum(splits[:at])
    expected = reference.tract_gradient(layer, x[left:], direction[left:], 0.1)
    assert error(layer.weight.grad, expected) < 1e-10
    assert error(layer.bias.grad, direction[left:].sum(0)) < 1e-10


def test_after_an_error_gradients_forgotten_inside_stay_forgotten():
    layer, x, direction = make("linear")
    wrapped = TrAct(layer, 0.1)
    layer.weight.grad = torch.randn(4, 6).double()
    model = nn.ModuleList([wrapped, TrActLinear(6, 4).double()])
    wrapped.register_forward_pre_hook(lambda *_: wrapped.zero_grad())
    with pytest.raises(ZeroDivisionError):
        _failing_step(model, x, direction, ZeroDivisionError())
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("name", ["linear", "linear few rows"])
def test_the_gradient_of_another_use_of_the_weight_stays_plain(name):
    """Tied weights, as of an auto-encoder."""
    layer, x, direction = make(name)
    wrapped = TrAct(layer, 0.1)
    other = torch.randn(3, layer.out_features).double()
    with accumulate(wrapped):
        for part, out in zip(x.split(5), direction.split(5), strict=True):
            ((wrapped(part) * out).sum() + F.linear(other, layer.weight.T).square().sum()).backward()
    rounds = len(x.split(5))
    (plain,) = torch.autograd.grad(rounds * F.linear(other, layer.weight.T).square().sum(), layer.weight)
    assert error(layer.weight.grad, plain + reference.tract_gradient(layer, x, direction, 0.1)) < 1e-10


def test_two_layers_may_share_a_weight():
    layer, x, direction = make("linear")
    model = nn.ModuleList([TrAct(layer, 0.1), TrAct(layer, 0.3)])
    with accumulate(model):
        _backward(model[0], x[:8], direction[:8])
        _backward(model[1], x[8:], direction[8:])
    first = reference.tract_gradient(layer, x[:8], direction[:8], 0.1)
    assert error(layer.weight.grad, first + reference.tract_gradient(layer, x[8:], direction[8:], 0.3)) < 1e-10


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _saved], ids=["deepcopy", "save"])
@pytest.mark.parametrize("name", ["linear", "linear few rows"])
def test_a_copy_made_inside_is_outside(name, copied):
    layer, x, direction = make(name)
    wrapped = TrAct(layer, 0.1)
    with accumulate(wrapped):
        _backward(wrapped, x[:3], direction[:3])
        twin = copied(wrapped)
        _backward(twin, x, direction)
        _backward(wrapped, x[3:], direction[3:])
    expected = reference.tract_gradient(layer, x, direction, 0.1)
    assert error(twin.weight.grad, expected) < 1e-10
    assert error(layer.weight.grad, expected) < 1e-10


def test_an_input_may_be_overwritten_after_its_backward_pass():
    layer, x, direction = make("linear few rows")
    wrapped, buffer = TrAct(layer, 0.1), torch.empty(1, 30).double()
    with accumulate(wrapped):
        for part, out in zip(x.split(1), direction.split(1), strict=True):
            _backward(wrapped, buffer.copy_(part), out)
    assert error(layer.weight.grad, reference.tract_gradient(layer, x, direction, 0.1)) < 1e-10


@pytest.mark.parametrize("rows", [29, 30, 31])
def test_few_rows_and_many_agree_where_they_meet(rows):
    torch.manual_seed(1)
    layer = nn.Linear(30, 4).double()
    x, direction = torch.randn(rows, 30).double(), torch.randn(rows, 4).double()
    x[1] = x[0]  # dependent rows
    wrapped = TrAct(layer, 0.1)
    with accumulate(wrapped):
        for part, out in zip(x.split(7), direction.split(7), strict=True):
            _backward(wrapped, part, out)
    assert error(layer.weight.grad, reference.tract_gradient(layer, x, direction, 0.1)) < 1e-10


def test_an_input_too_long_for_its_second_moment():
    """With n = 150,528 the matrix X^T X would take 181 GB."""
    layer = nn.Linear(224 * 224 * 3, 2)
    x, direction = torch.randn(6, 224 * 224 * 3), torch.randn(6, 2)
    wrapped = TrAct(layer, 0.1)
    _backward(wrapped, x, direction)
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    with accumulate(wrapped):
        for part, out in zip(x.split(2), direction.split(2), strict=True):
            _backward(wrapped, part, out)
    assert error(layer.weight.grad, expected) < 1e-6


def test_a_computed_weight_is_refused():
    wrapped = parametrizations.weight_norm(TrActLinear(6, 4))
    with pytest.raises(RuntimeError, match=r"got one that is computed.*without tract\.accumulate"), accumulate(wrapped):
        pass


def test_unwrapping_inside_is_refused():
    layer, x, direction = make("linear")
    model = nn.Sequential(TrAct(layer, 0.1))
    with accumulate(model):
        with pytest.raises(RuntimeError, match=r"outside of tract\.accumulate"):
            unwrap(model)
        _backward(model, x, direction)
    assert error(layer.weight.grad, reference.tract_gradient(layer, x, direction, 0.1)) < 1e-10
