"""The 36 networks of the CIFAR-100 table against ``cifar100_facts.json``.

The facts were measured on weiaicunzai/pytorch-cifar100 at commit 11d8418, the networks that the
paper trained. ``check`` holds scores, loss and first weight gradient with the weights of
``cifar100_reference.fill``; the networks without it are compared with a second implementation.
A line for a further network needs either ``check`` or an entry in ``cifar100_reference.REFERENCES``.
"""

import math
from collections import Counter
from functools import cache

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import tract
from experiments.config import choices_of
from experiments.models import build_model
from experiments.models.cifar100 import residual, stochastic_depth
from tests import cifar100_reference as reference
from tests.cifar100_reference import FACTS

FAMILIES = {name.rstrip("0123456789"): name for name in reversed(FACTS)}.values()  # the first of each
# The others of a family differ in depth alone, and those of many multiplications take minutes together.
QUICK = [
    pytest.param(name, marks=[] if name in FAMILIES and FACTS[name]["macs"] < 2e9 else pytest.mark.slow)
    for name in FACTS
]
CHECKED = [name for name, facts in FACTS.items() if "check" in facts]


def _on_meta(name, classes=100, **options):
    """Shapes only: free of memory and nearly of time."""
    with torch.device("meta"):
        return build_model(name, num_classes=classes, **options)


_shapes_of = cache(_on_meta)  # for tests that leave the network as it is


def _run_order(model):
    """What the hooks see: a list that fills with (name, layer, output's shape) in the order of running."""
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda module, _, y, name=name: seen.append((name, module, tuple(y.shape))))
    return seen


def _layers(model, *kinds):
    return [module for module in model.modules() if isinstance(module, kinds)]


# -- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTS)
def test_the_network_has_the_layers_of_the_original(name):
    facts, model = FACTS[name], _shapes_of(name)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    assert (sum(p.numel() for p in parameters), len(parameters)) == (facts["parameters"], facts["tensors"])
    assert (sum(b.numel() for b in buffers), len(buffers)) == (facts["buffer_elements"], facts["buffers"])
    convolutions, norms = _layers(model, nn.Conv2d), _layers(model, nn.BatchNorm2d)
    assert facts["layers"] == {
        "conv2d": len(convolutions),
        "conv2d_with_bias": sum(conv.bias is not None for conv in convolutions),
        "conv2d_grouped": sum(conv.groups > 1 for conv in convolutions),
        "linear": len(_layers(model, nn.Linear)),
        "batchnorm2d": len(norms),
    }
    assert facts["eps"] == Counter(f"{norm.eps:g}" for norm in norms)
    assert {norm.momentum for norm in norms} == {0.1}
    dropouts = _layers(model, nn.Dropout, nn.Dropout2d)
    assert facts["dropout"] == Counter(f"{type(dropout).__name__}({dropout.p})" for dropout in dropouts)
    survivals = [block.survival for block in _layers(model, stochastic_depth.Block)]
    assert survivals == pytest.approx(facts["survival"], abs=5e-7)


@pytest.mark.parametrize("name", FACTS)
def test_one_image_runs_through_the_layers_of_the_original(name):
    facts, model = FACTS[name], _shapes_of(name).eval()
    seen = _run_order(model)
    scores = model(torch.empty(1, 3, 32, 32, device="meta"))
    assert scores.shape == (1, 100)
    _, first, shape = seen[0]
    assert facts["first"] == {
        "type": type(first).__name__,
        "channels": [first.in_channels, first.out_channels],
        "kernel": list(first.kernel_size),
        "stride": list(first.stride),
        "padding": list(first.padding),
        "bias": first.bias is not None,
        "output": list(shape[2:]),
    }
    assert facts["macs"] == sum(math.prod(shape) * layer.weight[0].numel() for _, layer, shape in seen)
    last = [shape for _, layer, shape in seen if isinstance(layer, nn.Conv2d)][-1]
    assert facts["last_conv_output"] == list(last)
    scores.sum().backward()
    unused = [p.numel() for p in model.parameters() if p.grad is None]
    assert facts["unused"] == [sum(unused), len(unused)]


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_classes_and_size_may_vary(name):
    model = _on_meta(name, classes=7, in_channels=1, image_size=64)
    assert model(torch.empty(2, 1, 64, 64, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", choices_of("model"))
def test_every_network_of_the_configuration_builds(name):
    assert list(_shapes_of(name).parameters())


# -- functions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKED)
def test_scores_loss_and_gradient_are_the_originals(name):
    model = reference.fill(_on_meta(name))
    got, facts = reference.check_values(model, _layers(model, nn.Conv2d)[0]), FACTS[name]["check"]
    assert got.keys() == facts.keys()
    for key, value in facts.items():
        assert got[key] == pytest.approx(value, rel=2e-8), key


@pytest.mark.parametrize("name", [name for name in FACTS if name in reference.REFERENCES])
@torch.no_grad()
def test_scores_are_those_of_a_second_implementation(name):
    x = reference.images(2)
    got = reference.fill(_on_meta(name))(x)
    torch.testing.assert_close(got, reference.REFERENCES[name](x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_wide_networks_equal_their_blocks_written_out():
    x = reference.images(2)
    got = reference.fill(_on_meta("wideresnet", depth=16, widening=2))(x)
    torch.testing.assert_close(got, reference.wideresnet(x, blocks=2, widening=2), rtol=1e-9, atol=1e-9)


def test_every_network_is_checked_by_one_of_the_two_routes():
    assert FACTS.keys() - set(CHECKED) == reference.REFERENCES.keys() | {"wideresnet"}


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "shufflenetv2", "nasnet"])
@torch.no_grad()
def test_networks_that_move_channels_give_the_same_scores_in_channels_last(name):
    model, x = reference.fill(_on_meta(name)), reference.images(2)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-9, atol=1e-9)


# -- training --------------------------------------------------------------------------------------


def _assert_default_start(model):
    """Weights and biases of Conv2d and Linear are uniform on +-fan_in^-1/2; BatchNorm is the identity."""
    for layer in _layers(model, nn.Conv2d, nn.Linear):
        bound = layer.weight[0].numel() ** -0.5
        for p in (p for p in (layer.weight, layer.bias) if p is not None):
            low, high = p.detach().aminmax()
            assert -bound <= low, layer
            assert high <= bound * (1 + 1e-6), layer
            assert p.numel() < 1000 or min(-low, high) > 0.97 * bound, layer
    for norm in _layers(model, nn.BatchNorm2d):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


def _step(model, optimizer, x, bfloat16):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        scores = model(x)
        loss = F.cross_entropy(scores, torch.tensor([3, 71]))
    assert scores.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert math.isfinite(loss.item())
    assert 0 < torch.nn.utils.get_total_norm(gradients) < math.inf
    optimizer.step()
    return len(gradients)


def _dropped(model):
    """Parameters of the branches that were left out of the last forward pass."""
    blocks = _layers(model, stochastic_depth.Block)
    return sum(p.grad is None for block in blocks for p in block.branch.parameters())


@pytest.mark.parametrize("name", QUICK)
def test_the_network_trains_with_tract_in_both_precisions(name):
    plain, model = build_model(name, num_classes=100), _on_meta(name)
    _assert_default_start(plain)
    where = tract.apply_tract(model, lambda_=0.1)
    state = plain.state_dict()
    model.load_state_dict(state, assign=True)  # plain to wrapped, and back
    back = _on_meta(name)
    back.load_state_dict(model.state_dict(), assign=True)
    assert all(value.data_ptr() == state[key].data_ptr() for key, value in back.state_dict().items())

    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    seen = _run_order(model)
    for bfloat16 in (False, True) if FACTS[name]["macs"] < 2e9 else (True,):  # the largest: one step is enough
        used = _step(model, optimizer, x, bfloat16)
        assert used == FACTS[name]["tensors"] - FACTS[name]["unused"][1] - _dropped(model)
    assert seen[0][0] == where
    assert isinstance(seen[0][1], tract.TrActLayer)


@pytest.mark.parametrize("name", ["googlenet", "stochasticdepth18"])
def test_start_and_draws_are_functions_of_the_seed(name):
    x, scores = torch.randn(2, 3, 32, 32), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        scores.append(build_model(name, num_classes=100)(x))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


# -- stochastic depth ------------------------------------------------------------------------------


def _block(survival):
    return stochastic_depth.Block(residual.basic, 4, 8, 2, survival, bias=True).double()


def test_a_branch_that_is_left_out_leaves_the_shortcut_and_no_trace():
    block, x = _block(survival=0.0), torch.randn(5, 4, 6, 6).double()
    y = block(x)
    y.square().sum().backward()
    assert torch.equal(y, block.shortcut(x))
    assert all(p.grad is None for p in block.branch.parameters())
    assert [int(value) for key, value in block.state_dict().items() if "tracked" in key] == [0, 0, 2]
    always = _block(survival=1.0)
    torch.testing.assert_close(always(x), always.shortcut(x) + always.branch(x))


def test_in_evaluation_branches_count_by_their_probability():
    block, x = _block(survival=0.3).eval(), torch.randn(5, 4, 6, 6).double()
    torch.testing.assert_close(block(x), block.shortcut(x) + 0.3 * block.branch(x))
    assert (block(x) < 0).any()  # no ReLU after the sum


def test_one_draw_per_block_and_batch_decides_with_the_given_probability():
    block, x = _block(survival=0.7), torch.randn(5, 4, 6, 6).double()
    torch.manual_seed(3)
    kept = [not torch.equal(block(x), block.shortcut(x)) for _ in range(300)]
    torch.manual_seed(3)
    assert kept == [bool(torch.rand(()) < 0.7) for _ in kept]
    assert 0.6 < sum(kept) / len(kept) < 0.8
