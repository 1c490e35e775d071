import copy
import math

import pytest
import torch
import torch.nn as nn

from experiments.config import compose_config
from experiments.training.first_layer_sgd import FirstLayerSGD
from experiments.training.optim import build_optimizer, load_state_by_name, set_learning_rate, state_by_name
from tests.cases import tiny_config
from tract.methods.base import Method
from tract.methods.tract import TrActMethod

OPTIONS = {
    "lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.02,
    "first_lr": 0.2, "momentum": 0.7, "nesterov": True, "fused": False,
}  # fmt: skip
NODE = {"name": "sgd_adam", "_target_": "experiments.training.first_layer_sgd.FirstLayerSGD", **OPTIONS}
FACTORS = [1.0, 0.5, 0.0, 0.75, 0.25, 1.0]


def _model():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    method = TrActMethod(0.1, None, "global")
    method.apply(model)
    return model, method


def _backward(model, step):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(x).square().sum().backward()


def _train(model, optimizer, steps):
    for step in steps:
        set_learning_rate(optimizer, FACTORS[step])
        _backward(model, step)
        optimizer.step()


def _equal(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_it_is_two_optimizers_of_torch_side_by_side():
    model, method = _model()
    twin = copy.deepcopy(model)
    _train(model, build_optimizer(NODE, method, model), range(6))
    decay = OPTIONS["weight_decay"]
    sgd = torch.optim.SGD(twin[0].parameters(), lr=0.2, momentum=0.7, nesterov=True, weight_decay=decay)
    adam = torch.optim.Adam(twin[1:].parameters(), lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=decay)
    for step, factor in enumerate(FACTORS):
        sgd.param_groups[0]["lr"], adam.param_groups[0]["lr"] = 0.2 * factor, 0.01 * factor
        _backward(twin, step)
        sgd.step()
        adam.step()
    _equal(model, twin)


def test_groups_state_and_rates_are_one_view_of_both():
    model, method = _model()
    optimizer = build_optimizer(NODE, method, model)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.1]  # what is logged is Adam's
    _train(model, optimizer, range(2))
    entries = {name: set(entries) for name, entries in state_by_name(optimizer, model)["state"].items()}
    assert entries.keys() == dict(model.named_parameters()).keys()
    for name, keys in entries.items():
        assert keys == ({"momentum_buffer"} if name.startswith("0.") else {"step", "exp_avg", "exp_avg_sq"}), name


@pytest.mark.parametrize("stop", range(5))
def test_continuing_from_a_state_by_name_is_never_having_stopped(stop):
    model, method = _model()
    optimizer = build_optimizer(NODE, method, model)
    _train(model, optimizer, range(stop))
    weights, state = copy.deepcopy((model.state_dict(), state_by_name(optimizer, model)))
    _train(model, optimizer, range(stop, 6))
    again, method = _model()
    again.load_state_dict(weights)
    resumed = build_optimizer(NODE, method, again)
    load_state_by_name(resumed, again, state)
    _train(again, resumed, range(stop, 6))
    _equal(model, again)
    mine, its = state_by_name(optimizer, model)["state"], state_by_name(resumed, again)["state"]
    assert mine.keys() == its.keys()
    for name, entries in mine.items():
        assert entries.keys() == its[name].keys()
        assert all(torch.equal(value, its[name][key]) for key, value in entries.items())


def test_a_gradient_scaler_skips_both_rules_or_none():
    model, method = _model()
    optimizer = build_optimizer(NODE, method, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    twin = copy.deepcopy(model)
    plain = build_optimizer(NODE, method, twin)
    for step in range(3):
        _backward(twin, step)
        plain.step()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    _equal(model, twin)  # a power of two scales exactly
    for layer in (model[0], model[3]):
        _backward(model, 3)
        layer.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        _equal(model, twin)


def test_a_method_that_marks_no_layer_is_refused():
    with pytest.raises(ValueError, match="got 0 marked and 1 other groups; use method=tract"):
        build_optimizer(NODE, Method(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="got 1 marked and 0 other"):
        FirstLayerSGD([{"params": nn.Linear(3, 2).parameters(), "first_layer": True}], **OPTIONS)


def test_a_closure_is_refused():
    model, method = _model()
    with pytest.raises(ValueError, match="expected no closure"):
        build_optimizer(NODE, method, model).step(lambda: None)


def test_marking_the_layer_makes_no_difference_to_other_optimizers():
    model, method = _model()
    twin = copy.deepcopy(model)
    node = {"_target_": "torch.optim.Adam", "lr": 0.01}
    _train(model, build_optimizer(node, method, model), range(6))
    _train(twin, build_optimizer(node, Method(), twin), range(6))
    _equal(model, twin)


def test_every_parameter_is_in_one_group_and_the_layers_in_the_marked_one():
    model, method = _model()
    others, first = method.param_groups(model)
    assert first["params"] == list(model[0].parameters())
    assert first["first_layer"]
    assert "first_layer" not in others
    assert {id(p) for p in others["params"]} == {id(p) for p in model[1:].parameters()}


def test_the_recipe_has_the_rates_of_figure_3():
    rates = {epochs: compose_config("cifar_resnet", {"optim": "sgd_adam", "epochs": epochs}) for epochs in (100, 400)}
    assert {epochs: (c.optim["lr"], c.optim["first_lr"]) for epochs, c in rates.items()} == {
        100: (0.01, 0.08),
        400: (0.001, 0.08),
    }
    assert tiny_config("unused", method="tract", optim="sgd_adam", optim__first_lr=0.5).optim["first_lr"] == 0.5
