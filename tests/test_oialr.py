"""OIALR's library: bases, ranks, layers, checks, and what becomes of optimizers and averages."""

import copy
import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from experiments.models import build_model
from experiments.ranks import Ranks
from experiments.training.network import Network
from tests.cases import tiny_config
from tract.methods.oialr import OIALRMethod
from tract.oialr.bases import basis, decomposed, kept_rank, mixing, mixing_distance, signed_svd, stability, tall
from tract.oialr.checks import Checks
from tract.oialr.layers import (
    LowRankLayer,
    counts,
    dense,
    eligible_layers,
    factorised,
    load_dense,
    low_rank_layers,
    to_low_rank,
    weight_name,
)
from tract.oialr.updates import apply_update, from_owners, moved, updated
from tract.parameters import require_held

OPTIONS = {
    "freeze": "conversion", "delay": 2, "full_rank_warmup": True, "stability_frequency": 2, "stability_threshold": 0.9,
    "sigma_cutoff_fraction": 0.3, "keep_first_layer": False, "keep_last_layer": False, "network_layer_perc_step": 0.0,
    "stable_update_delay": 1, "inner_dim_init_ratio": 1.0, "fixed_inner_dim": False, "reinit_shapes": True,
    "moments": "rotated",
}  # fmt: skip
LAYERS = {
    "linear, tall": (lambda: nn.Linear(7, 12), (5, 3, 7)),
    "linear, wide": (lambda: nn.Linear(12, 7, bias=False), (5, 12)),
    "linear, one row": (lambda: nn.Linear(12, 7), (12,)),
    "conv1d": (lambda: nn.Conv1d(4, 9, 5, stride=2, padding=2), (2, 4, 11)),
    "conv2d, grouped": (lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2), (2, 8, 9, 9)),
    "conv2d, reflecting": (lambda: nn.Conv2d(4, 10, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 8, 8)),
    "conv2d, one image": (lambda: nn.Conv2d(4, 10, (3, 2), stride=(1, 2)), (4, 6, 6)),
}


def _method(**changes):
    return OIALRMethod(**OPTIONS | changes)


def _with_spectrum(layer, sigma):
    """Give a layer's weight these singular values."""
    with torch.no_grad():
        weight = layer._parameters[weight_name(layer)]
        u, _, vh = torch.linalg.svd(tall(weight), full_matrices=False)
        matrix = u[:, : len(sigma)] * torch.tensor(sigma, dtype=weight.dtype) @ vh[: len(sigma)]
        weight.copy_((matrix if matrix.shape == weight.flatten(1).shape else matrix.mT).reshape(weight.shape))
    return layer


# -- bases ---------------------------------------------------------------------------------


def test_stability_knows_turning_and_nothing_else():
    torch.manual_seed(0)
    weight = torch.randn(30, 20, dtype=torch.float64)
    one = decomposed(weight)
    mixed = one.u @ torch.diag(torch.rand(20, dtype=torch.float64) + 0.5) @ one.vh  # other singular values
    other = decomposed(mixed)
    assert stability(basis(one.u, one.vh), basis(other.u, other.vh)) == pytest.approx(1)
    assert stability(basis(one.u, one.vh), -basis(one.u, one.vh)) == pytest.approx(-1)
    unrelated = decomposed(torch.randn(30, 20, dtype=torch.float64))
    pairs = zip(basis(one.u, one.vh).mT, basis(unrelated.u, unrelated.vh).mT, strict=True)
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in pairs]
    assert stability(basis(one.u, one.vh), basis(unrelated.u, unrelated.vh)) == pytest.approx(np.mean(cosines))
    # The basis is the nearest matrix with orthonormal columns: the polar factor.
    polar, _ = scipy.linalg.polar(weight.numpy())
    np.testing.assert_allclose(basis(one.u, one.vh).numpy(), polar, atol=1e-12)


def test_the_mixing_matrix_is_choleskys_and_does_not_feel_a_turn_of_the_output():
    torch.manual_seed(1)
    matrix = torch.randn(9, 5, dtype=torch.float64)
    np.testing.assert_allclose(mixing(matrix).numpy(), scipy.linalg.cholesky((matrix.mT @ matrix).numpy()), atol=1e-12)
    turn = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    assert mixing_distance(matrix, turn @ matrix) == pytest.approx(0, abs=1e-12)
    assert mixing_distance(matrix, 3 * matrix) == pytest.approx(2 * matrix.norm().item())
    factors = decomposed(matrix)
    assert mixing_distance(matrix, torch.diag(factors.sigma) @ factors.vh) == pytest.approx(0, abs=1e-12)


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=30),
    st.floats(0, 0.99),
    st.integers(0, 500),
)
def test_the_kept_rank_is_the_first_below_the_cutoff_but_no_less_than_half_or_a_hundredth(values, fraction, more):
    sigma, n = torch.tensor(sorted(values, reverse=True), dtype=torch.float64), len(values) + more
    kept, before = kept_rank(sigma, fraction, len(sigma), n), len(sigma)
    assert 1 <= kept <= before
    cut = [value for value in sigma.tolist()[kept:] if value >= fraction * float(sigma[0])]
    assert not cut, "what is above the cutoff stays"
    smallest = before // 2 if before // 2 > n // 100 else min(n // 100, before)
    if kept > max(1, smallest):
        assert sigma[kept - 1] >= fraction * sigma[0]
    else:
        assert kept == max(1, smallest)


def test_singular_vectors_keep_their_signs_under_small_changes():
    torch.manual_seed(2)
    matrix = torch.randn(12, 8, dtype=torch.float64)
    one, other = signed_svd(matrix), signed_svd(matrix + 1e-9 * torch.randn_like(matrix))
    torch.testing.assert_close(one.u, other.u, atol=1e-6, rtol=0)
    torch.testing.assert_close(one.u * one.sigma @ one.vh, matrix)
    assert all(column[column.abs().argmax()] > 0 for column in one.u.mT)


# -- checks --------------------------------------------------------------------------------


def _simulated(delay, frequency, share, pause, layers, steps):
    """The bookkeeping of the authors' loop: counters of their own for the network and for each layer."""
    found, next_check, taken = [], delay or frequency, 0
    waits = [0] * layers
    for step in range(1, steps + 1):
        if step != next_check:
            continue
        next_check += frequency
        taken = min(layers, taken + (int((layers - 1) * share) or layers))
        for index in range(layers - taken, layers):
            if waits[index] == 0:
                found.append((step, index))
                waits[index] = max(1, pause)
            waits[index] -= 1
    return found


@given(
    st.integers(0, 9), st.integers(1, 5), st.sampled_from([0.0, 0.1, 0.35, 0.5, 1.0]), st.integers(0, 4),
    st.integers(1, 12),
)  # fmt: skip
def test_checks_are_those_of_a_loop_with_counters(delay, frequency, share, pause, layers):
    checks = Checks(delay, frequency, share, pause)
    due = [(step, index) for step in range(1, 40) for index in checks.due(step, layers)]
    assert due == _simulated(delay, frequency, share, pause, layers, 39)


# -- layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_a_low_rank_layer_is_the_plain_one_with_its_product(kind, share, monkeypatch):
    """Output and gradients, through the factors and through W; so are both exports."""
    torch.manual_seed(3)
    make, size = LAYERS[kind]
    layer = make()
    model = nn.Sequential(copy.deepcopy(layer))
    n = min(tall(layer.weight).shape)
    low = to_low_rank(model, "0", decomposed(layer.weight, max(1, int(share * n))))
    product = low.dense_weight().detach()
    if share == 1:
        torch.testing.assert_close(product, layer.weight, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        low.s.add_(0.1 * torch.randn_like(low.s))
        layer.weight.copy_(low.dense_weight())
    x = torch.randn(size, requires_grad=True)
    expected = layer(x)
    g = torch.randn_like(expected)
    expected.backward(g)
    matrix = layer.weight.grad.flatten(1)
    matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    for factored in (True, False):
        monkeypatch.setattr(LowRankLayer, "_saves", lambda *_, factored=factored: factored)
        model.zero_grad()
        input_ = x.detach().clone().requires_grad_()
        y = model(input_)
        y.backward(g)
        torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(input_.grad, x.grad, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(low.s.grad, low.u.mT @ matrix @ low.vh.mT, atol=5e-5, rtol=1e-4)
        if layer.bias is not None:
            torch.testing.assert_close(low.bias.grad, layer.bias.grad, atol=2e-5, rtol=1e-4)
    for exported in (dense(model), factorised(model)):
        assert not low_rank_layers(exported)
        torch.testing.assert_close(exported(x), expected, atol=2e-5, rtol=1e-4)
    assert dense(model)[0].state_dict().keys() == layer.state_dict().keys()
    numbers = counts(model)
    assert numbers["dense"] == sum(p.numel() for p in layer.parameters())
    assert numbers["total"] == sum(p.numel() for p in model.parameters())
    assert numbers["inference"] == sum(p.numel() for p in factorised(model).parameters())
    assert {name for name, p in low.named_parameters() if p.requires_grad} == {"s", "bias"} & {
        "s",
        *dict(layer.named_parameters()),
    }


@pytest.mark.parametrize("kind", ["linear, tall", "conv2d, grouped"])
def test_the_path_of_fewer_operations_is_taken(kind):
    make, size = LAYERS[kind]
    model = nn.Sequential(make())
    n = min(tall(model[0].weight).shape)
    low = to_low_rank(model, "0", decomposed(model[0].weight, 1))
    assert low._saves(10**6, getattr(low, "groups", 1))
    full = to_low_rank(nn.Sequential(layer := make()), "0", decomposed(layer.weight, n))
    assert not full._saves(10**6, getattr(full, "groups", 1))


@pytest.mark.parametrize("training", [True, False])
def test_attention_is_the_plain_one(training):
    torch.manual_seed(4)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.Sequential(copy.deepcopy(attention))
    to_low_rank(model, "0", decomposed(attention.in_proj_weight))
    x = torch.randn(2, 5, 16)
    for module in (attention, model):
        module.train(training)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(model[0](x, x, x), attention(x, x, x), atol=2e-6, rtol=1e-5)
    assert dense(model)[0].state_dict().keys() == attention.state_dict().keys()
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True), 2).train(training)
    low = copy.deepcopy(encoder)
    for name in eligible_layers(low, False, False):
        to_low_rank(low, name, decomposed(low.get_submodule(name)._parameters[weight_name(low.get_submodule(name))]))
    assert len(low_rank_layers(low)) == 6
    torch.testing.assert_close(low(x), encoder(x), atol=5e-5, rtol=1e-4)


def test_layers_that_pay():
    """More than a tenth for linear layers; convolutions the other way round; and none of another kind."""
    tied = nn.Linear(8, 8)
    model = nn.Sequential(
        nn.Linear(10, 100), nn.Linear(11, 109), nn.Linear(109, 10), nn.Conv2d(1, 90, 3), nn.Conv2d(1, 91, 3),
        nn.Conv3d(3, 3, 3), tied, nn.Bilinear(8, 8, 8), nn.MultiheadAttention(8, 2),
        nn.MultiheadAttention(8, 2, kdim=4), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Embedding(8, 8),
    )  # fmt: skip
    model[11].weight = tied.weight
    assert eligible_layers(model, False, False) == ["1", "3", "8"]
    assert eligible_layers(model, True, False) == ["3", "8"]
    mlp = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 64), nn.Linear(64, 48), nn.Linear(48, 4))
    assert eligible_layers(mlp, False, True) == ["0", "1"]  # the last has nothing to gain, so it is not the last one


@pytest.mark.parametrize(
    ("model", "keep_first", "trainable", "total"),
    [("vit_base", False, 34.6, 166.8), ("timm_resnet50", True, 28.4, 140.3)],
)
def test_counts_of_large_networks_are_the_originals(model, keep_first, trainable, total):
    network = build_model(model, 1000, image_size=224, in_channels=3, **_options_of(model))
    method = _method(keep_last_layer=True, keep_first_layer=keep_first)
    method.apply(network)
    ranks = {name: min(tall(network.get_submodule(name).weight).shape) for name in method._chosen(network)}
    method.match(network, {f"{name}.s": torch.zeros(rank, rank) for name, rank in ranks.items()})
    numbers = counts(network)
    assert 100 * numbers["trainable"] / numbers["dense"] == pytest.approx(trainable, abs=0.05)
    assert 100 * numbers["total"] / numbers["dense"] == pytest.approx(total, abs=0.05)


def _options_of(model):
    from experiments.config import compose_config, options_of

    return options_of(compose_config("oialr", {"model": model}).model)


def test_weights_of_a_plain_model_go_in_and_out():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 12))
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    for name in ("0", "2"):
        to_low_rank(model, name, decomposed(model.get_submodule(name).weight))
    load_dense(model, other.state_dict())
    for name, tensor in dense(model).state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="without 2.bias; it must be of the same"):
        load_dense(model, {k: v for k, v in other.state_dict().items() if k != "2.bias"})
    with pytest.raises(ValueError, match=r"expected 0.weight of shape \(12, 8\), got \(8, 12\)"):
        load_dense(model, other.state_dict() | {"0.weight": torch.zeros(8, 12)})


def test_loading_into_a_smaller_rank_takes_the_best_approximation():
    torch.manual_seed(6)
    plain = nn.Sequential(nn.Linear(9, 9, bias=False))
    low = copy.deepcopy(plain)
    to_low_rank(low, "0", decomposed(low[0].weight, 4))
    load_dense(low, plain.state_dict())
    error = (low[0].weight - plain[0].weight).norm().item()
    assert error == pytest.approx(torch.linalg.svdvals(plain[0].weight)[4:].norm().item(), rel=1e-4)


# -- training ------------------------------------------------------------------------------


def _net(seed=0, width=10):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))


def _train(method, steps, optimizer=torch.optim.SGD, width=10, average=None, **options):
    model = _net(width=width).double()
    method.apply(model)
    steps_of = optimizer(model.parameters(), **options)
    generator = torch.Generator().manual_seed(1)
    network = Network(tiny_config("unused", ema_decay=average), model, method, steps_of, Ranks())
    for step in range(steps):
        x = torch.randn(16, width, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (16,), generator=generator)
        steps_of.zero_grad()
        F.cross_entropy(model(x), y).backward()
        steps_of.step()
        network.after_step(step)
    return model, steps_of, network


@pytest.mark.parametrize("shapes", [True, False])
def test_with_momentum_a_check_that_cuts_nothing_changes_nothing(shapes):
    """SGD does not care which orthonormal basis Sigma is written in, as long as its momentum follows."""
    options = {"lr": 0.1, "momentum": 0.9}
    kept = {"sigma_cutoff_fraction": 0.0, "reinit_shapes": shapes}
    checked, *_ = _train(_method(stability_frequency=1, **kept), 12, **options)
    unchecked, *_ = _train(_method(stability_frequency=100, **kept), 12, **options)
    for one, other in zip(dense(checked).parameters(), dense(unchecked).parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)
    cut, *_ = _train(_method(stability_frequency=1, moments="original", **kept), 12, **options)
    apart = [(a - b).norm() for a, b in zip(dense(cut).parameters(), dense(unchecked).parameters(), strict=True)]
    assert max(apart) > 1e-4, "momentum that does not follow is another training"


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam"])
def test_any_optimizer_holds_the_models_parameters_after_every_change(optimizer):
    options = {"lr": 0.01} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    model, its, _ = _train(_method(), 9, getattr(torch.optim, optimizer), **options)
    require_held(its, model)
    held = [id(p) for group in its.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    for parameter, state in its.state.items():
        for name, value in state.items():
            assert not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == parameter.shape, name
            assert not isinstance(value, torch.Tensor) or value.isfinite().all()
    assert any(len(layer.s) < 10 for layer in low_rank_layers(model).values())
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert all(its.state.get(bias) or optimizer == "SGD" for bias in biases), "biases go on training"


def test_squares_of_gradients_stay_squares():
    """The projected mean of squares is that of independent gradients, by a sample of them."""
    torch.manual_seed(7)
    u = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64)).Q
    vh = torch.linalg.qr(torch.randn(5, 4, dtype=torch.float64)).Q.mT
    scale = torch.rand(6, 5, dtype=torch.float64)
    gradients = scale * torch.randn(20000, 6, 5, dtype=torch.float64)
    move = moved(u, vh, "rotated")
    expected = (u.mT @ gradients @ vh.mT).square().mean(0)
    torch.testing.assert_close(move("exp_avg_sq", gradients.square().mean(0)), expected, rtol=0.06, atol=0)
    torch.testing.assert_close(move("exp_avg", gradients.mean(0)), u.mT @ gradients.mean(0) @ vh.mT)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_of_sigma_is_the_average_of_the_weights(decay):
    """In square layers, whose bases span everything, and while nothing is cut: by averaging W itself."""
    changes = {"sigma_cutoff_fraction": 0.0, "keep_last_layer": True, "delay": 4}
    literal = None
    for steps in range(1, 10):
        model, _, network = _train(_method(**changes), steps, lr=0.2, momentum=0.9, average=decay)
        now = [p.detach() for p in dense(model).parameters()]
        literal = now if literal is None else [decay * a + (1 - decay) * w for a, w in zip(literal, now, strict=True)]
        for found, expected in zip(dense(network.average.module).parameters(), literal, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


def test_an_update_cuts_the_smallest_and_keeps_the_product_of_the_rest():
    sigma = [1.0, 0.8, 0.5, 0.29, 0.1]
    model = nn.Sequential(_with_spectrum(nn.Linear(5, 8, bias=False), sigma))
    low = to_low_rank(model, "0", decomposed(model[0].weight))
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    with torch.no_grad():
        low.s.copy_(turn @ low.s)
    expected = decomposed(low.dense_weight(), 3)
    apply_update(low, updated(low, 0.3), reshape=True)
    assert low.u.shape == (8, 3)
    torch.testing.assert_close(
        low.dense_weight().double(), expected.u * expected.sigma @ expected.vh, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(low.u.mT @ low.u, torch.eye(3), atol=1e-6, rtol=0)
    assert not (low.s - torch.diag(low.s.diag())).any()


@pytest.mark.parametrize(("threshold", "low"), [(-1.0, 3), (1.0, 0)])
def test_by_stability_layers_are_frozen_when_they_reach_the_threshold(threshold, low):
    changes = {"freeze": "stability", "stability_threshold": threshold, "delay": 1, "stability_frequency": 2}
    model, optimizer, _ = _train(_method(**changes), 8, torch.optim.Adam, lr=0.01)
    assert len(low_rank_layers(model)) == low
    references = [name for name in model.state_dict() if name.endswith("reference")]
    assert len(references) == 3 - low
    require_held(optimizer, model)
    assert dense(model).state_dict().keys() == _net().state_dict().keys()


def test_watching_changes_nothing_and_logs_what_two_weights_say():
    changes = {"freeze": "never", "delay": 3, "stability_frequency": 3}
    method = _method(**changes)
    watched, *_ = _train(method, 8, lr=0.1)
    plain, *_ = _train(_method(delay=1000), 8, lr=0.1)
    for one, other in zip(dense(watched).parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    weights = [_train(_method(delay=1000), steps, lr=0.1)[0] for steps in (5, 8)]  # before forward passes 6 and 9
    found = dict(method.metrics(watched))
    for name in ("0", "2", "4"):
        one, other = (decomposed(model.get_submodule(name).weight) for model in weights)
        expected = stability(basis(one.u, one.vh), basis(other.u, other.vh)).item()
        assert found[f"oialr/stability/{name}"] == pytest.approx(expected, abs=1e-9)
        distance = mixing_distance(*(tall(model.get_submodule(name).weight) for model in weights)).item()
        assert found[f"oialr/mixing_distance/{name}"] == pytest.approx(distance, abs=1e-9)


def test_from_the_start_it_is_low_rank_and_checked_later():
    """delay=0 checks after the first ``stability_frequency`` steps; without warm-up checks wait for ``delay``."""
    for changes, first in (({"delay": 0}, 3), ({"delay": 5, "full_rank_warmup": False}, 5)):
        ranks = []
        for steps in range(7):
            method = _method(stability_frequency=3, **changes)
            model, *_ = _train(method, steps, lr=0.1)
            ranks.append([len(layer.s) for layer in low_rank_layers(model).values()])
        assert all(len(layers) == 3 for layers in ranks)
        changed = [steps for steps, (a, b) in enumerate(itertools.pairwise(ranks)) if a != b]
        assert changed[0] + 2 == first, "before this forward pass, counted from 1"


def test_each_rank_computes_its_share(monkeypatch):
    asked, sent = [], []
    monkeypatch.setattr("tract.oialr.updates.world_size", lambda: 2)
    monkeypatch.setattr("tract.oialr.updates.dist.get_rank", lambda: 1)
    monkeypatch.setattr("tract.oialr.updates._broadcast", lambda tensors, source, _: sent.append((tensors, source)))
    from_owners([0, 3, 4, 5], lambda number: asked.append(number) or (torch.tensor(number),), torch.device("cpu"))
    assert asked == [3, 5]
    assert [(tensors and int(tensors[0]), source) for tensors, source in sent] == [(None, 0), (3, 1), (None, 0), (5, 1)]


def test_a_single_layer_works_and_none_is_one_sentence():
    model = nn.Sequential(nn.Linear(8, 8))
    assert "OIALR on 1 layers" in _method(delay=0).apply(model)
    with pytest.raises(ValueError, match="expected a model with layers that a low rank pays for, got Sequential"):
        _method(keep_last_layer=True).apply(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"freeze": "always"}, "expected freeze to be conversion, stability or never, got 'always'"),
        ({"moments": "none"}, "expected moments to be rotated or original, got 'none'"),
        ({"sigma_cutoff_fraction": 1.0}, "expected 0 <= sigma_cutoff_fraction < 1"),
        ({"stability_threshold": math.nan}, "-1 <= stability_threshold <= 1"),
        ({"stability_frequency": 0}, "stability_frequency of 1 or more"),
    ],
)
def test_bad_options_are_one_sentence(changes, said):
    with pytest.raises(ValueError, match=said):
        _method(**changes)


def test_operations_of_a_step_are_those_of_the_products():
    """Six rows through the factors of an 8 x 8 layer: A = Sigma V^h, x A, x A B, and the way back to Sigma."""
    method, model = _method(delay=0), nn.Sequential(nn.Linear(8, 8, bias=False))
    method.apply(model)
    [(tag, measure)] = method.measured(model, None)
    found = measure(torch.randn(6, 8), torch.zeros(6))
    assert tag == "oialr"
    assert found["flops_inference"].tolist() == [2 * 8 * 8] * 6
    small, rows = 2 * 8 * 8 * 8, 2 * 6 * 8 * 8
    assert found["flops_step"].tolist() == pytest.approx([(small + 2 * rows + 2 * rows + small) / 6] * 6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("optimizer", "options"), [("Adamax", {}), ("RMSprop", {"centered": True}), ("Adafactor", {})])
def test_state_that_is_no_moment_starts_anew(optimizer, options):
    """Largest values, a mean beside a mean of squares, rows and columns: none of them can be turned."""
    before, *_ = _train(_method(delay=1000), 12, getattr(torch.optim, optimizer), lr=1e-3, **options)
    model, its, _ = _train(_method(delay=6), 12, getattr(torch.optim, optimizer), lr=1e-3, **options)
    require_held(its, model)
    assert low_rank_layers(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for state in its.state.values():
        assert all((value >= 0).all() for name, value in state.items() if name in ("exp_inf", "square_avg"))
    assert not low_rank_layers(before)


def test_frozen_layers_and_layers_that_are_not_finite_stay():
    model = _net()
    model[0].weight.requires_grad_(False)
    assert eligible_layers(model, False, False) == ["2", "4"]
    model = _net().double()
    method = _method(delay=2)
    method.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    method.after_step(model, optimizer, 0)
    assert list(low_rank_layers(model)) == ["0", "4"]
    with torch.no_grad():
        model[0].s.fill_(math.inf)
    method.after_step(model, optimizer, 2)  # the loop says that the loss is not finite


@pytest.mark.parametrize("freeze", ["stability", "never"])
def test_the_first_check_may_come_before_the_first_step(freeze):
    method, model = _method(freeze=freeze, delay=1), _net()
    method.apply(model)
    assert all(torch.equal(layer.reference, layer.weight) for layer in model if isinstance(layer, nn.Linear))


def test_whoever_reads_the_weight_of_a_factorised_layer_gets_it():
    """As PyTorch's own encoder layers do."""
    torch.manual_seed(9)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True), 2).eval()
    for name in eligible_layers(encoder, False, False):
        layer = encoder.get_submodule(name)
        to_low_rank(encoder, name, decomposed(layer._parameters[weight_name(layer)], 3))
    x, drawn = torch.randn(2, 5, 16), torch.get_rng_state()
    small = factorised(encoder)
    assert torch.equal(torch.get_rng_state(), drawn), "nothing is drawn"
    with torch.no_grad():
        torch.testing.assert_close(small(x), encoder(x), atol=1e-5, rtol=1e-4)
    for kind in ("linear, tall", "conv2d, grouped", "conv1d"):
        model = nn.Sequential(LAYERS[kind][0]())
        low = to_low_rank(model, "0", decomposed(model[0].weight, 1))
        torch.testing.assert_close(factorised(model)[0].weight, low.weight)
    low.register_forward_hook(lambda *args: 2 * args[-1])
    x = torch.randn(LAYERS["conv1d"][1])
    torch.testing.assert_close(factorised(model)(x), model(x), atol=1e-6, rtol=1e-5)
