import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn.utils import prune

from tests.tract_layers import A_FEW, LAYERS, gradients, make
from tract import DEFAULT_LAMBDA, TrAct, TrActConv1d, TrActConv2d, TrActConv3d, TrActLayer, TrActLinear, unwrap

CLASSES = {nn.Linear: TrActLinear, nn.Conv1d: TrActConv1d, nn.Conv2d: TrActConv2d, nn.Conv3d: TrActConv3d}


@pytest.mark.parametrize("name", LAYERS)
def test_wrapped_layer_is_a_plain_layer_with_the_same_tensors_and_options(name):
    layer, _, _ = make(name)
    wrapped = TrAct(layer)
    assert isinstance(wrapped, type(layer))
    assert type(wrapped) is CLASSES[type(layer)]
    assert dict(wrapped.named_parameters()).keys() == dict(layer.named_parameters()).keys()
    assert all(a is b for a, b in zip(wrapped.parameters(), layer.parameters(), strict=True))
    assert wrapped.state_dict().keys() == layer.state_dict().keys()
    assert wrapped.extra_repr() == f"{layer.extra_repr()}, lambda_=0.1"
    for option in getattr(layer, "__constants__", ()):
        assert getattr(wrapped, option) == getattr(layer, option)


@pytest.mark.parametrize("name", LAYERS)
def test_a_constructed_layer_is_a_wrapped_plain_layer(name):
    kind, arguments, options, _ = LAYERS[name]
    torch.manual_seed(3)
    constructed = CLASSES[kind](*arguments, dtype=torch.float64, **options, l=0.3, statistics="local")
    torch.manual_seed(3)
    wrapped = TrAct(kind(*arguments, dtype=torch.float64, **options), 0.3, statistics="local")
    assert (constructed.lambda_, constructed.statistics) == (wrapped.lambda_, wrapped.statistics) == (0.3, "local")
    _, x, direction = make(name)
    for a, b in zip(gradients(constructed, x, direction), gradients(wrapped, x, direction), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("name", A_FEW)
def test_checkpoints_of_the_plain_layer_load_into_the_wrapped_one_and_back(name):
    plain, other = make(name)[0], make(name)[0]
    wrapped = TrAct(make(name)[0])
    wrapped.load_state_dict(plain.state_dict(), strict=True)
    other.load_state_dict(wrapped.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def _saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved_and_loaded])
@pytest.mark.parametrize("name", A_FEW)
def test_a_copy_has_its_own_tensors_and_gives_the_same_gradients(name, duplicate):
    layer, x, direction = make(name)
    wrapped = TrAct(layer, 0.3)
    twin = duplicate(wrapped)
    assert twin.weight is not wrapped.weight
    assert vars(twin).keys() == vars(wrapped).keys()
    for a, b in zip(gradients(twin, x, direction), gradients(wrapped, x, direction), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_and_requires_grad_are_kept(training):
    layer = nn.Linear(3, 2).train(training)
    layer.bias.requires_grad_(False)
    wrapped = TrAct(layer)
    assert wrapped.training is unwrap(wrapped).training is training
    assert [p.requires_grad for p in wrapped.parameters()] == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layer_moves_like_a_plain_one(dtype):
    wrapped = TrAct(nn.Conv2d(3, 4, 3)).to(dtype)
    assert {p.dtype for p in wrapped.parameters()} == {dtype}
    assert {p.device.type for p in wrapped.to("meta").parameters()} == {"meta"}


def test_hooks_are_kept_and_their_handles_still_remove_them():
    layer, calls = nn.Linear(3, 2), []
    forward = layer.register_forward_hook(lambda *_: calls.append("forward"))
    before = layer.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    backward = layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    wrapped = TrAct(layer)
    wrapped(torch.randn(4, 3)).sum().backward()
    assert calls == ["before", "forward", "backward"]
    for handle in (forward, before, backward):
        handle.remove()
    wrapped(torch.randn(4, 3)).sum().backward()
    unwrap(wrapped)(torch.randn(4, 3)).sum().backward()
    assert len(calls) == 3


def test_replacing_a_parameter_of_the_wrapped_layer_leaves_the_plain_one_alone():
    layer = nn.Linear(3, 2)
    weight = layer.weight
    TrAct(layer).weight = nn.Parameter(torch.zeros(2, 3))
    assert layer.weight is weight


@pytest.mark.parametrize("name", A_FEW)
def test_unwrapping_gives_the_plain_layer_back(name):
    layer, x, direction = make(name)
    plain = unwrap(TrAct(layer))
    assert type(plain) is type(layer)
    assert vars(plain).keys() == vars(layer).keys()
    assert plain.weight is layer.weight
    for a, b in zip(gradients(plain, x, direction), gradients(layer, x, direction), strict=True):
        assert a is b is None or torch.equal(a, b)


class _Subclass(nn.Conv2d):
    pass


def _old_weight_norm():
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(3, 2))


def _pruned():
    return prune.identity(nn.Linear(3, 2), "weight")


UNSUPPORTED = {
    "another layer": (lambda: nn.BatchNorm2d(3), "got BatchNorm2d; wrap the layer that receives the images"),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), "got ConvTranspose2d; wrap the layer"),
    "no layer": (lambda: torch.zeros(3), "got Tensor; wrap the layer"),
    "subclass": (lambda: _Subclass(3, 4, 3), "got _Subclass; remove the parametrization or use the plain class"),
    "lazy": (lambda: nn.LazyLinear(3), "got LazyLinear; run one forward pass first"),
    "parametrized": (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "remove the param"),
    "weight norm by hooks": (_old_weight_norm, "remove the parametrization"),
    "pruned": (_pruned, "remove the parametrization"),
    "wrapped": (lambda: TrAct(nn.Linear(3, 2)), "got TrActLinear, which has TrAct already; wrap a layer once"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_layers_that_cannot_be_wrapped_are_named_with_a_cure(kind):
    make_layer, message = UNSUPPORTED[kind]
    with pytest.raises(TypeError, match=message):
        TrAct(make_layer())


def test_a_lazy_layer_can_be_wrapped_once_it_knows_its_shape():
    layer = nn.LazyLinear(3)
    layer(torch.zeros(2, 5))
    assert TrAct(layer).weight.shape == (3, 5)


MAKERS = [
    lambda **options: TrAct(nn.Linear(3, 2), **options),
    lambda **options: TrActLinear(3, 2, **options),
    lambda **options: TrActConv1d(3, 2, 3, **options),
    lambda **options: TrActConv2d(3, 2, 3, **options),
    lambda **options: TrActConv3d(3, 2, 3, **options),
]
BAD = [
    ({"lambda_": 0}, ValueError, "expected lambda_ > 0 and finite, got 0"),
    ({"l": -1}, ValueError, "expected lambda_ > 0 and finite, got -1"),
    ({"lambda_": float("nan")}, ValueError, "expected lambda_ > 0 and finite, got nan"),
    ({"l": float("inf")}, ValueError, "expected lambda_ > 0 and finite, got inf"),
    ({"lambda_": "x"}, TypeError, "expected a number for lambda_, got 'x'"),
    ({"l": True}, TypeError, "expected a number for lambda_, got True"),
    ({"lambda_": torch.tensor(0.1)}, TypeError, "expected a number for lambda_, got tensor"),
    ({"lambda_": 0.1, "l": 0.1}, ValueError, "lambda_ and l mean the same; give one of them"),
    ({"statistics": "all"}, ValueError, 'expected statistics="global" or "local", got \'all\''),
]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_bad_options_are_errors_that_name_the_value(maker, options, kind, message):
    with pytest.raises(kind, match=message):
        maker(**options)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("value", [0.05, 2, np.float32(0.5), np.float64(0.2)])
def test_lambda_has_two_names_and_one_default(maker, value):
    assert maker(lambda_=value).lambda_ == maker(l=value).lambda_ == float(value)
    assert maker().lambda_ == DEFAULT_LAMBDA
    assert isinstance(maker(), TrActLayer)


def test_lambda_may_be_changed_between_steps():
    layer, x, direction = make("linear")
    wrapped = TrAct(layer, 0.1)
    wrapped.lambda_ = 0.4
    actual = gradients(wrapped, x, direction)[1].clone()
    assert torch.equal(actual, gradients(TrAct(layer, 0.4), x, direction)[1])


def test_importing_the_library_imports_neither_triton_nor_the_compiler():
    """They cost as much time as torch itself."""
    code = "import sys, tract, tract.proxprop, tract.oialr; print({'triton', 'torch._dynamo'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
