import copy

import pytest
import torch
import torch.nn as nn
from torch._subclasses import FakeTensorMode

from experiments.config import compose_config, config_hash
from experiments.training.optim import build_optimizer, load_state_by_name, set_learning_rate, state_by_name
from runfolder.errors import UserError
from tract.methods.base import Method
from tract.methods.tract import TrActMethod

KINDS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
}


class _Net(nn.Module):
    """The same layers registered in a given order."""

    def __init__(self, order):
        super().__init__()
        layers = {"first": nn.Linear(5, 4), "second": nn.Linear(4, 3), "norm": nn.LayerNorm(4)}
        for name in order:
            self.add_module(name, layers[name])

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


class _Turned(Method):
    """Two groups, in another order than the parameters are registered in."""

    def param_groups(self, model):
        return [{"params": list(layer.parameters())} for layer in reversed(list(model.children()))]


def _optimizer(kind, model, method=None):
    node = {"name": kind, "_target_": f"torch.optim.{kind}", **KINDS[kind]}
    return build_optimizer(node, method or Method(), model)


def _train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        set_learning_rate(optimizer, 1 / (1 + step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


ORDERS = [("first", "second", "norm"), ("norm", "second", "first")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", [Method(), _Turned()])
def test_continuing_from_a_state_by_name_is_never_having_stopped(kind, order, method):
    model = _Net(ORDERS[0])
    optimizer = _optimizer(kind, model)
    _train(model, optimizer, range(5))
    weights, state = copy.deepcopy((model.state_dict(), state_by_name(optimizer, model)))
    _train(model, optimizer, range(5, 10))

    again = _Net(order)
    again.load_state_dict(weights)
    resumed = _optimizer(kind, again, method)
    load_state_by_name(resumed, again, state)
    _train(again, resumed, range(5, 10))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for name, entries in state_by_name(optimizer, model)["state"].items():
        for key, value in entries.items():
            other = state_by_name(resumed, again)["state"][name][key]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), (name, key)


def test_a_fresh_state_differs_from_a_loaded_one():
    model = _Net(ORDERS[0])
    optimizer = _optimizer("Adam", model)
    _train(model, optimizer, range(5))
    again = copy.deepcopy(model)
    _train(again, _optimizer("Adam", again), range(5, 6))
    _train(model, optimizer, range(5, 6))
    assert not torch.equal(model.first.weight, again.first.weight)


def test_each_groups_rate_is_its_own_base_times_the_factor():
    class TwoGroups(Method):
        def param_groups(self, model):
            return [{"params": model.first.parameters(), "lr": 0.5}, {"params": model.second.parameters()}]

    optimizer = build_optimizer({"_target_": "torch.optim.SGD", "lr": 0.1}, TwoGroups(), _Net(ORDERS[0]))
    for factor in (0.5, 0.0, 0.25):  # no factor compounds with the one before
        set_learning_rate(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * factor, 0.1 * factor]


def test_weight_decay_of_matrices_only():
    """As DeiT: no decay for one dimension, position embeddings and class tokens; LAMB gives those no trust ratio."""
    model = _Net(ORDERS[0])
    model.pos_embed, model.cls_token = (nn.Parameter(torch.ones(1, 3, 4)) for _ in range(2))
    node = {"_target_": "torch.optim.SGD", "lr": 0.1, "weight_decay": 0.5}
    optimizer = build_optimizer(node, _Turned(), model, decay_matrices_only=True)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: decay.get(id(p)) for name, p in model.named_parameters() if id(p) in decay}
    assert {name for name, value in named.items() if value == 0.5} == {"first.weight", "second.weight"}
    assert {name for name, value in named.items() if value == 0} == {
        "first.bias",
        "second.bias",
        "norm.weight",
        "norm.bias",
    }
    optimizer = build_optimizer(node, Method(), model, decay_matrices_only=True)
    without = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {id(model.pos_embed), id(model.cls_token)} < without


def test_biases_have_their_own_rate():
    """As Caffe's lr_mult: a multiple of the rate of the group that the method put them into, under any schedule."""

    class TwoGroups(Method):
        def param_groups(self, model):
            return [{"params": model.first.parameters(), "lr": 0.5}, {"params": model.second.parameters()}]

    model = _Net(ORDERS[0])
    node = {"_target_": "torch.optim.SGD", "lr": 0.1, "weight_decay": 0.5}
    optimizer = build_optimizer(node, TwoGroups(), model, decay_matrices_only=True, bias_lr=2.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for factor in (1.0, 0.25):
        set_learning_rate(optimizer, factor)
        found = {
            names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
        }
        assert found == {
            "first.weight": (0.5 * factor, 0.5), "first.bias": (1.0 * factor, 0.0),
            "second.weight": (0.1 * factor, 0.5), "second.bias": (0.2 * factor, 0.0),
        }  # fmt: skip


def test_lamb_goes_on_with_its_step():
    """It keeps the step in the group; else its bias correction would begin anew."""

    def lamb(model):
        node = {"_target_": "timm.optim.Lamb", "lr": 0.01, "weight_decay": 0.1, "eps": 1e-8}
        return build_optimizer(node, Method(), model, decay_matrices_only=True)

    model = _Net(ORDERS[0])
    optimizer = lamb(model)
    _train(model, optimizer, range(3))
    again = copy.deepcopy(model)
    resumed = lamb(again)
    load_state_by_name(resumed, again, copy.deepcopy(state_by_name(optimizer, model)))
    assert [float(group["step"]) for group in resumed.param_groups] == [3.0, 3.0]
    _train(model, optimizer, range(3, 6))
    _train(again, resumed, range(3, 6))
    assert all(map(torch.equal, model.parameters(), again.parameters()))


# -- as few launches as the updates need ----------------------------------------------------------------


class _Marked(Method):
    """The first layer apart, and by name only."""

    def param_groups(self, model):
        first = list(model.first.parameters())
        others = [p for p in model.parameters() if all(p is not own for own in first)]
        return [{"params": others}, {"params": first, "first_layer": True}]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_no_option_tells_apart_are_one_in_the_models_order(kind):
    for method in (_Marked(), _Turned()):
        model = _Net(ORDERS[0])
        (group,) = _optimizer(kind, model, method).param_groups
        assert group["params"] == list(model.parameters())
        assert "first_layer" not in group


def test_with_tract_there_are_the_groups_of_plain_training():
    for decay_matrices_only, bias_lr in ((False, 1.0), (True, 1.0), (True, 2.0)):
        plain, model = _Net(ORDERS[0]), _Net(ORDERS[0])
        method = TrActMethod(0.1, "first", "global")
        method.apply(model)
        node = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.1}
        of_plain, of_tract = (
            state_by_name(build_optimizer(node, m, net, decay_matrices_only, bias_lr), net)["groups"]
            for m, net in ((Method(), plain), (method, model))
        )
        assert sorted(map(str, of_plain)) == sorted(map(str, of_tract))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_with_more_groups_goes_on_to_the_same_bytes(kind):
    """As checkpoints had, from before groups were joined."""
    apart, model = _Net(ORDERS[0]), _Net(ORDERS[0])
    model.load_state_dict(apart.state_dict())
    split = [{"params": list(layer.parameters())} for layer in apart.children()]
    old = getattr(torch.optim, kind)(split, **KINDS[kind])
    for group in old.param_groups:
        group["base_lr"] = group["lr"]
    _train(apart, old, range(4))
    model.load_state_dict(apart.state_dict())
    new = _optimizer(kind, model, _Turned())
    load_state_by_name(new, model, copy.deepcopy(state_by_name(old, apart)))
    _train(apart, old, range(4, 8))
    _train(model, new, range(4, 8))
    assert len(new.param_groups) == 3
    assert all(map(torch.equal, apart.parameters(), model.parameters()))


OWN = {"sgd_adam": _Marked()}
FUSED = {
    "sgd": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "plain sgd": {"_target_": "torch.optim.SGD", "lr": 0.1},
    "adam": {"_target_": "torch.optim.Adam", "lr": 0.01, "weight_decay": 0.01},
    "adamw": {"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.1},
    "sgd_adam": {
        "_target_": "experiments.training.first_layer_sgd.FirstLayerSGD", "lr": 0.01, "betas": (0.9, 0.999),
        "eps": 1e-8, "weight_decay": 0.01, "first_lr": 0.1, "momentum": 0.9, "nesterov": False,
    },
}  # fmt: skip


def _fused(name, model, fused):
    return build_optimizer(FUSED[name] | {"fused": fused}, OWN.get(name, Method()), model)


@pytest.mark.parametrize("name", FUSED)
def test_fused_kernels_do_the_same_also_where_a_parameter_comes_later(name):
    models = [_Net(ORDERS[0]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, fused in zip(models, (False, True), strict=True):
        optimizer = _fused(name, model, fused)
        assert {group["fused"] for group in optimizer.param_groups} == {fused or None}
        model.first.bias.requires_grad_(False)
        _train(model, optimizer, range(3))
        model.first.bias.requires_grad_(True)
        _train(model, optimizer, range(3, 6))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert not torch.equal(models[0].first.bias, _Net(ORDERS[0]).first.bias)


@pytest.mark.parametrize("name", FUSED)
def test_unless_told_otherwise_they_are_taken_on_a_gpu_and_not_on_the_cpu(name):
    with FakeTensorMode(), torch.device("cuda"):
        on_gpu = _Net(ORDERS[0])
        assert {group["fused"] for group in _fused(name, on_gpu, None).param_groups} == {True}
        assert {group["fused"] for group in _fused(name, on_gpu, False).param_groups} == {None}
    assert {group["fused"] for group in _fused(name, _Net(ORDERS[0]), None).param_groups} == {None}


def test_which_kernels_make_the_step_does_not_come_with_a_state():
    """Else a run would go on with those of another device."""
    model = _Net(ORDERS[0])
    optimizer = _fused("adam", model, True)
    _train(model, optimizer, range(3))
    again = copy.deepcopy(model)
    resumed = _fused("adam", again, False)
    load_state_by_name(resumed, again, copy.deepcopy(state_by_name(optimizer, model)))
    assert resumed.param_groups[0]["fused"] is None
    _train(model, optimizer, range(3, 6))
    _train(again, resumed, range(3, 6))
    torch.testing.assert_close(model.first.weight, again.first.weight, rtol=1e-4, atol=1e-6)


def test_fused_decides_the_run_only_where_it_is_given():
    usual, given, declined = (compose_config("cifar_vit", {"optim.fused": value}) for value in (None, True, False))
    assert "fused" not in usual.optim  # so runs from before it came are found
    assert config_hash(usual) == config_hash(compose_config("cifar_vit", {}))
    assert len({config_hash(config) for config in (usual, given, declined)}) == 3
    with pytest.raises(UserError, match="lamb has no fused kernels; leave optim.fused out"):
        compose_config("imagenet_deit", {"optim.fused": True})
    assert "fused" not in compose_config("imagenet_deit", {"optim.fused": False}).optim
