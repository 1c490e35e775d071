"""What other tools of torch make of a wrapped layer: torch.fx, jit, export, torch.func."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.func import functional_call, grad, jvp, vmap
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from tests.tract_layers import error
from tract import TrActConv2d, TrActLinear, apply_tract, unwrap

STEMS = {
    "conv": (lambda: nn.Conv2d(3, 4, 3), (4, 3, 8, 8)),
    "conv, few rows": (lambda: nn.Conv2d(3, 4, 8), (4, 3, 8, 8)),
    "linear": (lambda: nn.Linear(6, 4), (20, 6)),
    "linear, few rows": (lambda: nn.Linear(30, 4), (7, 30)),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
stems = pytest.mark.parametrize("stem", STEMS)


def make(stem):
    """A plain network, the same with TrAct, and an input."""
    layer, shape = STEMS[stem]
    plain = nn.Sequential(layer(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(shape)
    plain(x)
    wrapped = copy.deepcopy(plain)
    apply_tract(wrapped)
    return plain, wrapped, x


def gradient(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return next(model.parameters()).grad.clone()


@stems
def test_a_traced_graph_has_the_layer_as_a_whole_and_its_gradient(stem):
    _, wrapped, x = make(stem)
    traced = torch.fx.symbolic_trace(wrapped)
    assert isinstance(traced.get_submodule("0"), TrActConv2d | TrActLinear)
    assert [node.op for node in traced.graph.nodes][:2] == ["placeholder", "call_module"]
    expected = gradient(wrapped, x)
    assert torch.equal(gradient(traced, x), expected)
    unwrap(traced)
    assert error(gradient(traced, x), expected) > 0.1


def test_a_feature_extractor_trains_its_first_layer_with_tract():
    model, x = resnet18(), torch.randn(4, 3, 32, 32)
    apply_tract(model)
    features = create_feature_extractor(model.eval(), ["layer1"])
    assert isinstance(features.conv1, TrActConv2d)

    def first_gradient(forward):
        model.zero_grad()
        forward(x).square().mean().backward()
        return model.conv1.weight.grad.clone()

    def until_layer1(x):
        return model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))

    assert torch.equal(first_gradient(lambda x: features(x)["layer1"]), first_gradient(until_layer1))


@stems
def test_jit_traces_a_model_in_evaluation_as_a_plain_one(stem):
    plain, wrapped, x = make(stem)
    graph = torch.jit.trace(wrapped.eval(), x)
    assert torch.equal(graph(x), plain(x))
    assert error(gradient(graph, x), gradient(plain, x)) < 1e-6


@stems
def test_jit_scripts_an_unwrapped_copy(stem):
    plain, wrapped, x = make(stem)
    assert torch.equal(torch.jit.script(unwrap(copy.deepcopy(wrapped)))(x), plain(x))
    assert isinstance(wrapped[0], TrActConv2d | TrActLinear)


def test_jit_refuses_what_it_cannot_train():
    _, wrapped, x = make("conv")
    with pytest.raises(RuntimeError, match=r"layer 0: expected a model in evaluation .*model\.eval\(\)"):
        torch.jit.trace(wrapped, x)
    with pytest.raises(RuntimeError, match=r"layer 0: expected plain layers .*script tract\.unwrap"):
        torch.jit.script(wrapped.eval())
    assert isinstance(wrapped[0], TrActConv2d)


def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@stems
def test_an_exported_model_in_evaluation_holds_plain_operators_only(stem):
    plain, wrapped, x = make(stem)
    program = torch.export.export(wrapped.eval(), (x,))
    assert operators(program) == operators(torch.export.export(plain.eval(), (x,)))
    assert torch.equal(program.module()(x), plain(x))


@stems
def test_gradients_of_torch_func_are_those_of_backward(stem):
    _, wrapped, x = make(stem)
    parameters = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    found = grad(lambda p: functional_call(wrapped, p, (x,)).square().mean())(parameters)
    wrapped.zero_grad()
    wrapped(x).square().mean().backward()
    assert all(torch.equal(found[name], p.grad) for name, p in wrapped.named_parameters())


@stems
def test_a_second_derivative_of_torch_func_is_refused(stem):
    _, wrapped, x = make(stem)
    parameters = {name: p.detach().clone() for name, p in wrapped.named_parameters()}

    def loss(p):
        return functional_call(wrapped, p, (x,)).square().mean()

    with pytest.raises(RuntimeError, match="no second derivative"):
        grad(lambda p: sum(g.square().sum() for g in grad(loss)(p).values()))(parameters)


@stems
def test_a_forward_derivative_is_the_plain_networks(stem):
    plain, wrapped, x = make(stem)
    parameters = {name: p.detach().clone() for name, p in plain.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    expected, found = (
        jvp(lambda p, model=model: functional_call(model, p, (x,)), (parameters,), (tangents,))[1]
        for model in (plain, wrapped)
    )
    assert error(found, expected) < 1e-6


def test_gradients_of_single_samples_are_refused():
    """They would have a second moment each."""
    _, wrapped, x = make("linear")
    parameters = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    of_one = grad(lambda p, x: functional_call(wrapped, p, (x[None],)).square().mean())
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(of_one, in_dims=(None, 0))(parameters, x)
