"""Lines, curves and simplexes of networks: laws, each by two routes."""

import copy
import io
import math
import pickle
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from experiments.training.schedule import SubspaceSchedule
from tract.subspaces import (
    Curve,
    Line,
    Simplex,
    SubspaceLayer,
    absolute_cosine,
    apply_subspace,
    average,
    distance,
    endpoint_weights,
    load_endpoint,
    path_of,
    plain_at,
    plain_with,
    random_average,
    reestimated,
    set_coefficients,
    set_coefficients_layerwise,
    squared_cosine,
    statistics,
    subspace_layers,
    swag_sample,
)
from tract.subspaces import evaluation as ev
from tract.subspaces.paths import Numbers

PATHS = [Line(), Curve(), Simplex(2), Simplex(3), Simplex(5)]


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.LayerNorm(54),
        nn.Linear(54, 5),
    )


def filled(make, seed: int) -> nn.Module:
    """A network all of whose numbers are random, norms' too."""
    torch.manual_seed(seed)
    model = make().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    return model


def subspace(path, make=small_net, **options) -> tuple[nn.Module, list[nn.Module]]:
    """A model with endpoints, and the plain networks that they are."""
    networks = [filled(make, seed) for seed in range(path.endpoints)]
    model = copy.deepcopy(networks[0])
    apply_subspace(model, path, networks[1:], **options)
    return model, networks


def images(count: int = 6, seed: int = 7) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- points -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_coefficients_sum_to_one(path):
    generator = np.random.default_rng(0)
    for alpha in [path.midpoint(), *(path.draw(generator) for _ in range(20))]:
        assert len(path.coefficients(*alpha)) == path.endpoints
        assert sum(path.coefficients(*alpha)) == pytest.approx(1.0, abs=1e-15)


def test_the_midpoint_of_a_simplex_is_as_far_from_all_corners():
    for n in range(1, 6):
        assert Simplex(n).coefficients(*Simplex(n).midpoint()) == pytest.approx([1 / n] * n)


def test_a_curve_is_the_line_between_the_points_of_two_lines():
    """De Casteljau's construction of a quadratic Bezier curve; the control point is the last endpoint."""
    start, end, control = np.eye(3)
    for a in (0.0, 0.2, 0.7, 1.0):
        first, second = (1 - a) * start + a * control, (1 - a) * control + a * end
        np.testing.assert_allclose(Curve().coefficients(a), (1 - a) * first + a * second, atol=1e-15)


def test_a_simplex_with_two_corners_is_a_line():
    for a in (0.0, 0.3, 1.0):
        assert Simplex(2).coefficients(a) == Line().coefficients(a)
    assert Simplex(2).midpoint() == Line().midpoint()


def test_points_are_drawn_uniformly():
    """Alpha of a line has variance 1/12, the coefficients of a simplex mean 1/n and variance (n-1)/(n^2 (n+1))."""
    generator, n = np.random.default_rng(1), 4
    line = np.array([Line().draw(generator) for _ in range(20000)])
    assert line.mean() == pytest.approx(0.5, abs=0.01)
    assert line.var() == pytest.approx(1 / 12, abs=0.002)
    points = np.array([Simplex(n).coefficients(*Simplex(n).draw(generator)) for _ in range(20000)])
    np.testing.assert_allclose(points.mean(0), 1 / n, atol=0.01)
    np.testing.assert_allclose(points.var(0), (n - 1) / n**2 / (n + 1), atol=0.002)
    assert (points > 0).all()


@pytest.mark.parametrize("generator", [np.random.default_rng(2), random.Random(2)], ids=["numpy", "python"])
@pytest.mark.parametrize("path", [Line(), Curve(), Simplex(4)], ids=str)
def test_every_pair_of_endpoints_is_drawn_as_often(path, generator):
    pairs = [tuple(sorted(path.draw_pair(generator))) for _ in range(6000)]
    assert set(pairs) == set(path.pairs())
    for pair in path.pairs():
        assert pairs.count(pair) == pytest.approx(6000 / len(path.pairs()), rel=0.15)


def test_paths_have_names():
    assert path_of("line", 2) == Line()
    assert path_of("curve", 3) == Curve()
    assert path_of("simplex", 7) == Simplex(7)


# -- layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_at_a_corner_the_model_is_that_endpoint(path):
    model, networks = subspace(path)
    for index, network in enumerate(networks):
        set_coefficients(model, [float(index == other) for other in range(path.endpoints)])
        for mode in (True, False):
            torch.testing.assert_close(
                copy.deepcopy(model).train(mode)(images()),
                copy.deepcopy(network).train(mode)(images()),
                rtol=0,
                atol=1e-14,
            )


def test_a_line_goes_from_endpoint_0_to_endpoint_1():
    model, (first, second) = subspace(Line())
    for alpha, network in ((0.0, first), (1.0, second)):
        set_coefficients(model, Line().coefficients(alpha))
        torch.testing.assert_close(model.eval()(images()), network.eval()(images()), rtol=0, atol=1e-14)


def untracked(norm: nn.Module) -> nn.Module:
    norm.track_running_stats = False
    return norm


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (5, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7, 8)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, (3, 5), padding=2, padding_mode="reflect", bias=False), (2, 4, 7, 8)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1), (2, 2, 4, 5, 6)),
    "batchnorm1d": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "batchnorm2d": (lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=0.3), (5, 4, 3, 2)),
    "batchnorm2d cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), (5, 4, 3, 2)),
    "batchnorm2d of the batch": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (5, 4, 3, 2)),
    "batchnorm2d of the batch, later": (lambda: untracked(nn.BatchNorm2d(4)), (5, 4, 3, 2)),
    "batchnorm3d": (lambda: nn.BatchNorm3d(4), (3, 4, 2, 2, 2)),
    "layernorm": (lambda: nn.LayerNorm((3, 4)), (5, 3, 4)),
    "layernorm without bias": (lambda: nn.LayerNorm(4, bias=False), (5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_computes_what_torch_computes_with_the_mixed_weights(name):
    """torch.func calls the plain layer with W = sum c_i W_i; values, gradients and statistics, in both modes."""
    make, shape = LAYERS[name]
    model, networks = subspace(Curve(), lambda: nn.Sequential(make()))
    plain, shares = copy.deepcopy(networks[0]), Curve().coefficients(0.3)
    set_coefficients(model, shares)
    weights = [dict(network.named_parameters()) for network in networks]
    for mode in (True, True, False):
        x = torch.randn(shape, dtype=torch.float64)
        mixed = {n: sum(c * w[n] for c, w in zip(shares, weights, strict=True)) for n in weights[0]}
        output, expected = model.train(mode)(x), torch.func.functional_call(plain.train(mode), mixed, (x,))
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad((expected**3).sum(), list(mixed.values()))
        (output**3).sum().backward()
        for key, gradient in zip(mixed, gradients, strict=True):
            _, leaf = key.split(".")
            for index, share in enumerate(shares):
                torch.testing.assert_close(model[0].endpoint(leaf, index).grad, share * gradient, rtol=1e-9, atol=1e-9)
        model.zero_grad()
        for key, value in plain.named_buffers():
            torch.testing.assert_close(model.get_buffer(key), value)


def test_a_simplex_with_one_corner_is_the_plain_model_byte_for_byte():
    model, (plain,) = subspace(Simplex(1))
    assert all(isinstance(layer, SubspaceLayer) for layer in (model[0], model[1], model[6], model[7]))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.01, momentum=0.9) for one in (model, plain)]
    for step in range(4):
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(one.train()(images(seed=step)), torch.arange(6) % 5).backward()
            optimizer.step()
    assert model[0].point()[0] is model[0].weight  # no product with 1
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(plain_at(model).eval()(images()), plain.eval()(images()))


def test_endpoint_0_keeps_the_parameters_and_the_others_are_copies():
    networks = [small_net() for _ in range(3)]
    before = dict(networks[0].named_parameters())
    keys = list(networks[0].state_dict())
    apply_subspace(networks[0], Curve(), networks[1:])
    for name, parameter in before.items():
        assert networks[0].get_parameter(name) is parameter
        for index in (1, 2):
            value = networks[0].get_parameter(f"{name}{index}")
            assert torch.equal(value, networks[index].get_parameter(name))
            assert value.data_ptr() != networks[index].get_parameter(name).data_ptr()
    assert [key for key in networks[0].state_dict() if key in keys] == keys
    assert isinstance(networks[0][0], nn.Conv2d)
    assert "Curve" in str(networks[0])


def test_endpoints_of_the_same_model_are_two():
    model, other = small_net(), small_net()
    apply_subspace(model, Curve(), [other, other])
    assert torch.equal(model[0].weight1, model[0].weight2)
    assert model[0].weight1 is not model[0].weight2


def test_a_shared_bias_is_one_vector_for_linear_and_convolution_only():
    model, networks = subspace(Line(), shared_bias=True)
    assert {name for name, _ in model.named_parameters() if name.endswith("bias1")} == {"1.bias1", "4.bias1", "6.bias1"}
    set_coefficients(model, Line().coefficients(1.0))
    networks[1].load_state_dict(
        {n: v for n, v in networks[0].state_dict().items() if n in ("0.bias", "7.bias")}, strict=False
    )
    torch.testing.assert_close(model.eval()(images()), networks[1].eval()(images()))


def test_a_backward_pass_may_come_after_the_next_point():
    """Two forward passes at different points, then one backward pass, as two pairs of passes."""
    model, _ = subspace(Line())
    twin, total = copy.deepcopy(model), 0.0
    for alpha in (0.2, 0.9):
        set_coefficients(model, Line().coefficients(alpha))
        total = total + model(images()).square().mean()
        set_coefficients(twin, Line().coefficients(alpha))
        twin(images()).square().mean().backward()
    total.backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_tied_layer_is_one_layer_and_tied_parameters_have_tied_endpoints():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.again = self.one
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.again(F.relu(self.two(F.relu(self.one(x)))))

    model, networks = subspace(Line(), Tied)
    assert len(subspace_layers(model)) == 2
    assert model.one is model.again
    assert model.two.weight1 is model.one.weight1
    plain = plain_at(model, 1.0)
    assert plain.one is plain.again
    assert plain.two.weight is plain.one.weight
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(plain(x), networks[1](x))


class Own(nn.Linear):
    """May compute something else."""


def test_what_has_no_endpoints_is_shared_and_named():
    def make():
        return nn.Sequential(
            nn.Linear(8, 8),
            Own(8, 8),
            nn.GroupNorm(2, 8),
            nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            nn.BatchNorm1d(8, affine=False),
            nn.LayerNorm(8, elementwise_affine=False),
        )

    model = make()
    first, second = apply_subspace(model, Line(), [make()])
    assert first == "1 layer with 2 endpoints each: Line()."
    assert second.startswith("7 parameters shared by all points: 1.weight, 1.bias, 2.weight, ")
    assert [type(module).__name__ for module in model][1:] == [type(module).__name__ for module in make()][1:]
    lazy = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    assert apply_subspace(lazy, Line(), [copy.deepcopy(lazy)])[1].startswith(
        "2 parameters shared by all points: 1.weight"
    )


def test_a_layer_that_shares_its_weight_with_another_kind_stays_as_it_is():
    def make():
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
        model[2].weight = model[0].weight
        return model

    model = make()
    assert apply_subspace(model, Line(), [make()])[1] == "1 parameter shared by all points: 0.weight."
    assert type(model[2]) is nn.Linear


def test_layers_can_be_at_points_of_their_own():
    model, _ = subspace(Line())
    generator = np.random.default_rng(3)
    draws = [Line().coefficients(*Line().draw(generator)) for _ in subspace_layers(model)]
    buffers = [layer.coefficients for layer in subspace_layers(model)]
    set_coefficients_layerwise(model, draws)
    assert all(layer.coefficients is buffer for layer, buffer in zip(subspace_layers(model), buffers, strict=True))
    for layer, draw in zip(subspace_layers(model), draws, strict=True):
        assert tuple(layer.coefficients.tolist()) == draw
        torch.testing.assert_close(layer.point()[0], draw[0] * layer.weight + draw[1] * layer.weight1)
    torch.testing.assert_close(plain_with(model, draws).eval()(images()), model.eval()(images()), rtol=0, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_plain_model_at_a_point_computes_the_same_and_leaves_its_source(path):
    model, networks = subspace(path)
    model.train()(images())
    before = copy.deepcopy(model.state_dict())
    alpha = path.draw(np.random.default_rng(4))
    point = [layer.coefficients.clone() for layer in subspace_layers(model)]
    plain = plain_at(model, *alpha)
    assert list(plain.state_dict()) == list(networks[0].state_dict())
    assert [type(one) for one in plain.modules()] == [type(one) for one in networks[0].modules()]
    assert not any(hasattr(module, name) for module in plain.modules() for name in ("path", "mixed", "coefficients"))
    small_net().load_state_dict(plain.state_dict())
    for layer, old in zip(subspace_layers(model), point, strict=True):
        assert torch.equal(layer.coefficients, old)
    set_coefficients(model, path.coefficients(*alpha))
    for mode in (True, False):
        assert torch.equal(*(copy.deepcopy(one).train(mode)(images()) for one in (plain, model)))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_plain_model_is_trainable_where_its_source_is():
    networks = [small_net() for _ in range(2)]
    networks[0][0].weight.requires_grad_(False)
    apply_subspace(networks[0], Line(), networks[1:])
    assert not networks[0][0].weight1.requires_grad
    plain = plain_at(networks[0], 0.5)
    assert [n for n, p in plain.named_parameters() if not p.requires_grad] == ["0.weight"]
    assert all(parameter.is_leaf for parameter in plain.parameters())


def test_an_endpoint_takes_a_plain_state_and_gives_it_back():
    model, _ = subspace(Curve())
    before = copy.deepcopy(model.state_dict())
    state = filled(small_net, 9).state_dict()
    load_endpoint(model, 2, state)
    back = plain_with(model, (0.0, 0.0, 1.0)).state_dict()
    for name, value in state.items():
        if name.endswith(("weight", "bias")):
            assert torch.equal(back[name], value), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or name.endswith("2"), name
    load_endpoint(model, 0, state)
    assert torch.equal(model[0].weight, state["0.weight"])


def test_hooks_stay():
    model, seen = small_net(), []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    apply_subspace(model, Line(), [small_net()])
    model(images().float())
    handle.remove()
    model(images().float())
    assert seen == [1]


# -- torch around it --------------------------------------------------------------------


def test_new_coefficients_do_not_compile_anew():
    torch.compiler.reset()
    model, _ = subspace(Curve())
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for alpha in (0.1, 0.5, 0.9):
            for one in (model, twin):
                set_coefficients(one, Curve().coefficients(alpha))
            torch.testing.assert_close(compiled(images()), twin(images()))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_backward_pass_may_come_after_the_next_point(backend):
    torch.compiler.reset()
    model, _ = subspace(Line(), lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))
    twin, total = copy.deepcopy(model), 0.0
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(5, 4, dtype=torch.float64)
    for alpha in (0.2, 0.9):
        set_coefficients(model, Line().coefficients(alpha))
        total = total + (compiled(x) ** 3).mean()
        set_coefficients(twin, Line().coefficients(alpha))
        (twin(x) ** 3).mean().backward()
    total.backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_copies_and_pickles_compute_the_same():
    model, _ = subspace(Simplex(3))
    set_coefficients(model, (0.2, 0.3, 0.5))
    model.eval()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(images()), model(images()))
        set_coefficients(twin, (1.0, 0.0, 0.0))
    assert model[0].coefficients.tolist() == [0.2, 0.3, 0.5]
    assert not any("coefficients" in name for name in model.state_dict())


def test_autocast_and_half_work_as_on_the_plain_model():
    model, _ = subspace(Line())
    model.float().eval()
    set_coefficients(model, (0.7, 0.3))
    plain, x = plain_at(model, 0.3), images().float()
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = model(x), plain(x)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
    model.bfloat16()
    assert model[0].coefficients.dtype == torch.bfloat16
    torch.testing.assert_close(model(x.bfloat16()).float(), plain(x), rtol=0.1, atol=0.3)
    assert model.half()[7](torch.ones(1, 54).half()).dtype == torch.float16


# -- regulariser ------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [(0, 1), (2, 0), (1, 2)])
def test_the_cosine_is_that_of_all_matrices_in_one_row(pair):
    model, networks = subspace(Curve())
    rows = []
    for index in pair:
        plain = networks[index]
        rows.append(torch.cat([plain[place].weight.detach().flatten() for place in (0, 3, 7)]).requires_grad_())
    cosine = F.cosine_similarity(*rows, dim=0)
    torch.testing.assert_close(squared_cosine(model, *pair), cosine**2)
    torch.testing.assert_close(absolute_cosine(model, *pair), cosine.abs())
    torch.testing.assert_close(distance(model, *pair), torch.dist(*rows))
    for ours, theirs in ((squared_cosine(model, *pair), cosine**2), (absolute_cosine(model, *pair), cosine.abs())):
        expected = torch.autograd.grad(theirs, rows, retain_graph=True)
        model.zero_grad()
        ours.backward()
        for index, gradient in zip(pair, expected, strict=True):
            got = torch.cat([model[place].endpoint("weight", index).grad.flatten() for place in (0, 3, 7)])
            torch.testing.assert_close(got, gradient)
    assert all(p.grad is None for name, p in model.named_parameters() if "bias" in name or name[0] in "146")


def test_only_the_squared_cosine_loses_its_gradient_with_the_cosine():
    """At a cosine of 1e-4 the squared one's gradient is 2e-4 as long."""
    lengths = {}
    for kind in (squared_cosine, absolute_cosine):
        model, _ = subspace(Line(), lambda: nn.Sequential(nn.Linear(2, 1, bias=False)))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
            model[0].weight1.copy_(torch.tensor([[1e-4, 1.0]]))
        kind(model, 0, 1).backward()
        lengths[kind] = model[0].weight.grad.norm().item()
    assert lengths[absolute_cosine] == pytest.approx(1.0, rel=1e-3)
    assert lengths[squared_cosine] == pytest.approx(2e-4, rel=1e-3)


@pytest.mark.parametrize("path", [Curve(), Simplex(3)], ids=str)
def test_statistics_are_sums_over_a_curves_pairs_and_means_over_a_simplexes(path):
    model, _ = subspace(path)
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = sum(squared_cosine(model, *pair) for pair in pairs)
    squares = sum(distance(model, *pair) ** 2 for pair in pairs)
    by = 3 if isinstance(path, Simplex) else 1
    torch.testing.assert_close(torch.stack(statistics(model)), torch.stack([cosines / by, (squares / by).sqrt()]))


def test_statistics_of_one_network_are_zero():
    model, _ = subspace(Simplex(1))
    assert [value.item() for value in statistics(model)] == [0.0, 0.0]


# -- batch norm -------------------------------------------------------------------------


class Normed(nn.Module):
    """Two batch norms that are used, one that is not, and dropout."""

    def __init__(self):
        super().__init__()
        self.one, self.conv, self.two = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)
        self.never, self.dropout = nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.grad_modes = set()

    def forward(self, x):
        self.grad_modes.add(torch.is_grad_enabled())
        return self.two(self.conv(self.dropout(self.one(x))))


BATCHES = [images(6, 1) * 2 + 1, images(4, 2), images(3, 3) - 5]


def literal_statistics(model, batches):
    """Mean over batches of mean and unbiased variance, from the definition."""
    axes = (0, 2, 3)
    found = {"one": [], "two": []}
    for x in batches:
        found["one"].append((x.mean(axes), x.var(axes)))
        spread = (x.var(axes, correction=0, keepdim=True) + model.one.eps).sqrt()
        scaled = (x - x.mean(axes, keepdim=True)) / spread
        x = model.conv(scaled * model.one.weight.view(-1, 1, 1) + model.one.bias.view(-1, 1, 1))
        found["two"].append((x.mean(axes), x.var(axes)))
    return {name: [torch.stack(part).mean(0) for part in zip(*pairs, strict=True)] for name, pairs in found.items()}


@pytest.mark.parametrize("training", [True, False])
def test_new_statistics_are_the_mean_over_batches(training):
    model = filled(Normed, 0).train(training)
    model.never.running_mean.fill_(3.0)
    model.conv.train(not training)
    with torch.no_grad():
        expected = literal_statistics(model, BATCHES)
    modes = [module.training for module in model.modules()]
    assert reestimated(model, iter(BATCHES)) is model
    for name, (mean, variance) in expected.items():
        torch.testing.assert_close(getattr(model, name).running_mean, mean)
        torch.testing.assert_close(getattr(model, name).running_var, variance)
        assert getattr(model, name).num_batches_tracked == 3
    assert (model.one.momentum, model.two.momentum) == (0.1, None)
    assert [module.training for module in model.modules()] == modes
    assert model.never.running_mean.eq(3.0).all()
    assert model.never.num_batches_tracked == 0
    assert model.grad_modes == {False}
    assert all(p.grad is None for p in model.parameters())
    assert not model.one._forward_hooks


@pytest.mark.parametrize("split", [[[0, 1, 2], []], [[2], [0], [1]], [[1], [2, 0]]], ids=str)
def test_new_statistics_do_not_depend_on_which_rank_has_which_batch(split):
    expected = reestimated(filled(Normed, 0), BATCHES).state_dict()
    parts = []

    def gather(tensor):  # what each rank gives
        parts.append(tensor.clone())
        return torch.ones_like(tensor)

    for own in split:
        reestimated(filled(Normed, 0), [BATCHES[index] for index in own], gather)
    assert [part.dtype for part in parts] == [torch.float64] * len(split)
    for own in split:
        model = reestimated(filled(Normed, 0), [BATCHES[index] for index in own], lambda _: torch.stack(parts).sum(0))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-14, atol=1e-14)


def test_a_copy_leaves_the_trained_statistics():
    model, _ = subspace(Line())
    model.train()(images())
    before = copy.deepcopy(model.state_dict())
    plain = reestimated(plain_at(model, 0.2), BATCHES)
    assert not torch.equal(plain[1].running_mean, model[1].running_mean)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_failed_pass_leaves_the_model_as_it_was():
    model = filled(Normed, 0).train()
    model(images())
    before = copy.deepcopy(model.state_dict())
    for batches in ([BATCHES[0], torch.zeros(1, 2)], []):
        with pytest.raises((ValueError, RuntimeError)):
            reestimated(model, batches)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert all(module.training for module in model.modules())


def test_a_model_without_batch_norm_needs_no_batch():
    def never():
        raise AssertionError("a batch was asked for")
        yield

    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert reestimated(model, never()) is model


# -- evaluation -------------------------------------------------------------------------


def some_logits(count=3, samples=200, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(samples, classes, dtype=torch.float64, generator=generator) for _ in range(count)]
    return logits, torch.randint(classes, (samples,), generator=generator)


@pytest.mark.parametrize("bins", [20, 7])
def test_the_calibration_error_is_that_of_a_loop_over_bins(bins):
    (logits,), targets = some_logits(1)
    logits[0] = torch.tensor([1000.0, 0.0, 0.0, 0.0])  # confidence 1 belongs to the last bin
    total = 0.0
    for b in range(bins):
        hits, confidences = 0, 0.0
        for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
            shares = [math.exp(value - max(row)) for value in row]
            confidence = max(shares) / sum(shares)
            if b / bins <= confidence < (b + 1) / bins or (b == bins - 1 and confidence == 1):
                hits += row.index(max(row)) == target
                confidences += confidence
        total += abs(hits - confidences)
    assert ev.expected_calibration_error(logits, targets, bins) == pytest.approx(total / len(targets), rel=1e-12)


def test_measures_of_several_networks_are_means_over_pairs():
    logits, targets = some_logits()
    ids = [(0, 1), (0, 2), (1, 2)]
    predicted = [[row.index(max(row)) for row in one.tolist()] for one in logits]
    apart = [[p != q for p, q in zip(predicted[i], predicted[j], strict=True)] for i, j in ids]
    right = [
        [p != q and t in (p, q) for p, q, t in zip(predicted[i], predicted[j], targets.tolist(), strict=True)]
        for i, j in ids
    ]
    assert ev.disagreement(logits) == pytest.approx(np.mean(apart))
    assert ev.disagreement_where_one_is_right(logits, targets) == pytest.approx(np.mean(right))
    shares = [one.softmax(1) for one in logits]
    variation = [torch.clamp(shares[i] - shares[j], min=0).sum(1).mean().item() for i, j in ids]
    assert ev.total_variation(logits) == pytest.approx(np.mean(variation))
    total = sum(one.numpy() for one in logits)
    assert ev.ensemble_accuracy(logits, targets) == pytest.approx((total.argmax(1) == targets.numpy()).mean())
    features = [torch.randn(10, 3, 2, 2, dtype=torch.float64) for _ in range(3)]
    cosines = [F.cosine_similarity(features[i].flatten(1), features[j].flatten(1)) for i, j in ids]
    assert ev.feature_cosine(features, squared=False) == pytest.approx(torch.stack(cosines).mean().item())
    assert ev.feature_cosine(features, squared=True) == pytest.approx(torch.stack(cosines).square().mean().item())
    alone = [ev.total_variation(logits[:1]), ev.disagreement(logits[:1]), ev.feature_cosine(features[:1], squared=True)]
    assert alone == [0.0, 0.0, 0.0]


# -- averages ---------------------------------------------------------------------------


def snapshots(count=3, numbers=50):
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "a.weight": torch.randn(numbers, dtype=torch.float64, generator=generator),
            "a.bias": torch.randn(2, dtype=torch.float64, generator=generator),
            "b.weight": torch.randn(3, 2, dtype=torch.float64, generator=generator),
            "b.running_mean": torch.randn(3, dtype=torch.float64, generator=generator),
            "b.num_batches_tracked": torch.tensor(10 + index),
        }
        for index in range(count)
    ]


def test_an_average_at_a_lines_point_is_the_line():
    model, networks = subspace(Line())
    expected = plain_at(model, 0.3).state_dict()
    got = average([network.state_dict() for network in networks], endpoint_weights(0.3, 1, 2))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
    states = snapshots()
    assert average(states)["b.num_batches_tracked"] == 10
    torch.testing.assert_close(average(states)["b.weight"], sum(state["b.weight"] for state in states) / 3)


@pytest.mark.parametrize("level", ["global", "layer", "weight"])
def test_a_random_average_lies_between_the_networks(level):
    """With networks that are the unit vectors, the average shows the weights it was made with."""
    shapes = {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (4,)}
    states = [{name: torch.full(shape, float(i == 0)) for name, shape in shapes.items()} for i in range(3)]
    first = random_average(states, np.random.default_rng(6), level)
    values = {name: set(value.flatten().tolist()) for name, value in first.items()}
    assert all(0 < value < 1 for found in values.values() for value in found)
    assert len(set().union(*values.values())) == {"global": 1, "layer": 2, "weight": 12}[level]
    assert (values["a.weight"] == values["a.bias"]) is (level != "weight")
    generator = np.random.default_rng(6)
    drawn = [random_average(states, generator, level)["b.weight"][0].item() for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(1 / 3, abs=0.02)
    assert np.var(drawn) == pytest.approx(2 / 36, abs=0.005)


def test_samples_of_swag_have_its_mean_and_covariance():
    """diag(sd^2) / 2 + sum (theta_i - mean)(theta_i - mean)^T / (2 (n - 1))."""
    states = snapshots(numbers=2)
    flat = torch.stack([torch.cat([s["a.weight"], s["a.bias"]]) for s in states])
    mean, apart = flat.mean(0), flat - flat.mean(0)
    generator = torch.Generator().manual_seed(8)
    samples = [swag_sample(states, generator) for _ in range(4000)]
    samples = torch.stack([torch.cat([s["a.weight"], s["a.bias"]]) for s in samples])
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.06)
    expected = torch.diag(apart.square().mean(0)) / 2 + apart.T @ apart / 4
    torch.testing.assert_close(samples.T.cov(), expected, rtol=0.1, atol=0.06)


def test_swag_of_equal_snapshots_is_that_snapshot():
    state = snapshots(1)[0]
    state["a.weight"] *= 1e-20
    sample = swag_sample([state] * 3, torch.Generator())
    for name, value in state.items():
        torch.testing.assert_close(sample[name], value)


def test_float32_stays_float32():
    states = [{"w": torch.ones(3)}, {"w": torch.zeros(3)}]
    made = average(states), random_average(states, np.random.default_rng(0)), swag_sample(states, torch.Generator())
    assert [state["w"].dtype for state in made] == [torch.float32] * 3


# -- schedule and labels ----------------------------------------------------------------


def schedule(policy, **options):
    given = {"warmup_epochs": 2, "swa_lr": 0.05, "swa_start": 0.75, "snapshots": 2, "of_epochs": None}
    return SubspaceSchedule(policy, lr=0.1, **given | options)


def rates(one, epochs, per_epoch=3):
    steps = [one.factor(step, per_epoch, epochs * per_epoch) for step in range(epochs * per_epoch)]
    assert all(len(set(steps[at : at + per_epoch])) == 1 for at in range(0, len(steps), per_epoch))
    return steps[::per_epoch]


def test_rates_are_those_of_the_definitions():
    half = lambda progress: math.cos(math.pi * progress / 2) ** 2  # noqa: E731
    warm, thirds = [0.5, 1.0], [half(k / 3) / 2 for k in range(3)]
    cases = {
        "cosine_lr": warm + [half((e - 2) / 18) for e in range(2, 20)],
        "constant_lr": warm + [1.0] * 18,
        "linear": [1 - e / 20 for e in range(20)],
        "snapshot_cyc_lr": warm + [half(k / 9) for k in range(9)] * 2,
        "swa_constant_lr": warm + [1.0] * 9 + [1 - k / 16 for k in range(1, 8)] + [0.5, 0.5],
        "cyc_lr": warm + [half(k / 13) for k in range(13)] + [half(k / 2) / 2 for k in range(2)] + [0.5, *thirds[1:]],
        "swa_cyc_lr": warm + [half(k / 13) for k in range(13)] + [half(k / 5) / 2 for k in range(5)],
    }
    for policy, expected in cases.items():
        assert rates(schedule(policy), 20) == pytest.approx(expected, abs=1e-12), policy
    assert rates(schedule("lth_lr"), 160) == pytest.approx([1.0] * 80 + [0.1] * 40 + [0.01] * 40)
    for policy in ("snapshot_cyc_lr", "swa_cyc_lr"):
        assert rates(schedule(policy, snapshots=1), 20) == rates(schedule("cosine_lr"), 20)
    four = [half(k / 13) / 2 for k in range(13)] * 2 + [half(k / 14) / 2 for k in range(14)]
    late = rates(schedule("swa_cyc_lr", snapshots=4, warmup_epochs=5), 160)[120:]
    assert late == pytest.approx(four)  # 40 = 13 + 13 + 14 epochs
    assert rates(schedule("swa_cyc_lr", of_epochs=16), 20)[11] == pytest.approx(half(9 / 10))
    assert rates(schedule("swa_cyc_lr", of_epochs=16), 20)[12] == pytest.approx(0.5)


# -- errors -----------------------------------------------------------------------------

LINE = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
ERRORS = {
    "expected a subspace named line, curve or simplex, got 'plane'": lambda: path_of("plane", 2),
    "expected 2 endpoints for a line, got 3": lambda: path_of("line", 3),
    "expected 3 endpoints for a curve, got 2": lambda: path_of("curve", 2),
    "expected a simplex of 1 endpoint or more, got 0": lambda: path_of("simplex", 0),
    "expected two endpoints or more to draw a pair": lambda: Simplex(1).draw_pair(np.random.default_rng(0)),
    "expected 2 numbers for a point of Simplex(n=3), got 1": lambda: Simplex(3).coefficients(0.5),
    "expected 1 further models for the endpoints of Line(), got 0": lambda: apply_subspace(small_net(), Line(), []),
    "expected a model that contains one of Linear, Conv1d": lambda: apply_subspace(nn.ReLU(), Line(), [nn.ReLU()]),
    "put a lone layer into nn.Sequential": lambda: apply_subspace(nn.Linear(2, 2), Line(), [nn.Linear(2, 2)]),
    "expected a plain model, got one with subspace layers": lambda: apply_subspace(subspace(Line())[0], Line(), [LINE]),
    "endpoint 1: expected a Linear with 0.weight of shape (4, 4), got shape (4, 5)": lambda: apply_subspace(
        copy.deepcopy(LINE), Line(), [nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))]
    ),
    "endpoint 1: expected a LayerNorm with 1.weight of shape (4,), got no such layer": lambda: apply_subspace(
        copy.deepcopy(LINE), Line(), [nn.Sequential(nn.Linear(4, 4))]
    ),
    "endpoint 1: expected a Linear with 0.bias of shape (4,), got no such": lambda: apply_subspace(
        copy.deepcopy(LINE), Line(), [nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4))]
    ),
    "expected a model with subspace layers, got none": lambda: set_coefficients(small_net(), (1.0, 0.0)),
    "expected 2 coefficients, one for each endpoint, got 3": lambda: set_coefficients(subspace(Line())[0], (1, 0, 0)),
    "expected a point for each of 6 subspace layers, got 1": lambda: plain_with(subspace(Line())[0], [(1, 0)]),
    "expected an endpoint from 0 to 1, got 2": lambda: load_endpoint(subspace(Line())[0], 2, {}),
    "got one without 0.bias": lambda: load_endpoint(subspace(Line())[0], 1, {}),
    "got one with other": lambda: load_endpoint(subspace(Line())[0], 1, small_net().state_dict() | {"other": 1}),
    "expected 0.bias of shape (4,), got (5,)": lambda: load_endpoint(
        subspace(Line())[0], 1, small_net().state_dict() | {"0.bias": torch.zeros(5)}
    ),
    "expected a model whose convolutions or linear layers have": lambda: squared_cosine(small_net(), 0, 1),
    "expected a batch or more to estimate": lambda: reestimated(small_net(), []),
    "expected one state dict or more": lambda: average([]),
    "expected state dicts with the same keys, got b": lambda: average([{}, {"b": torch.ones(1)}]),
    "expected a of shape (1,) in all states, got (2,) in state 1": lambda: average(
        [{"a": torch.ones(1)}, {"a": torch.ones(2)}]
    ),
    "expected a weight for each of 3 states, got 2": lambda: average(snapshots(), (0.5, 0.5)),
    "expected the level global, layer or weight, got 'all'": lambda: random_average(
        snapshots(), np.random.default_rng(0), "all"
    ),
    "expected two snapshots or more": lambda: swag_sample(snapshots(1), torch.Generator()),
    "expected a snapshot from 0 to 2, got 3": lambda: endpoint_weights(0.5, 3, 3),
    "expected t = 1 for a single snapshot, got 0.5": lambda: endpoint_weights(0.5, 0, 1),
    "expected a policy of cosine_lr": lambda: schedule("cosine"),
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_errors_say_what_was_expected_and_what_came(sentence):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        ERRORS[sentence]()
    assert sentence in str(raised.value)


def test_a_model_that_does_not_fit_is_left_as_it_was():
    model = small_net()
    other = small_net()
    other[7] = nn.Linear(54, 6)
    with pytest.raises(ValueError, match="7.weight"):
        apply_subspace(model, Line(), [other])
    assert not subspace_layers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_subspace(model, Line(), [small_net()])


# -- random numbers ---------------------------------------------------------------------


def test_numbers_of_a_place_are_its_own_and_of_their_distribution():
    numbers = Numbers(3, 1, 4)
    assert numbers.exponential(1.0, 4).tolist() == Numbers(3, 1, 4).exponential(1.0, 4).tolist()
    assert Numbers(3, 1, 4).uniform(0.0, 1.0) != Numbers(3, 14).uniform(0.0, 1.0)
    drawn = numbers.exponential(2.0, (100, 200))
    assert drawn.mean().item() == pytest.approx(2.0, rel=0.03)
    assert (drawn > 2.0).double().mean().item() == pytest.approx(math.exp(-1), abs=0.01)
    uniform = [numbers.uniform(-1.0, 3.0) for _ in range(2000)]
    assert -1 <= min(uniform) < -0.98 < 2.98 < max(uniform) < 3
    pairs = Counter(tuple(sorted(numbers.sample(range(3), 2))) for _ in range(3000))
    assert set(pairs) == {(0, 1), (0, 2), (1, 2)}
    assert all(900 < count < 1100 for count in pairs.values())
    assert Simplex(4).draw(Numbers(0)) == Simplex(4).draw(Numbers(0))
    assert Curve().draw_pair(Numbers(0)) == Curve().draw_pair(Numbers(0))
