"""Two methods at once: every ordered pair trains by the law of both, or is refused in one sentence."""

import copy
import re
from itertools import permutations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from experiments.config import CONF, compose_config, config_hash, folder_of, options_of
from experiments.models import build_model
from experiments.randomness import seed_torch
from experiments.tools.export_point import main as export_main
from experiments.training import checkpoint
from experiments.training.loop import Trainer
from experiments.training.run import run
from slurm.command import main
from tests.cases import METHODS, TINY
from tests.same_runs import assert_equal_trees
from tract import TrActLayer, unwrap
from tract.methods.base import Occasion, Setting
from tract.methods.composed import Composed
from tract.methods.oialr import OIALRMethod
from tract.methods.patchnorm import PatchNormMethod
from tract.methods.proxprop import ProxPropMethod
from tract.methods.snapshots import SnapshotMethod
from tract.methods.subspace import SubspaceMethod
from tract.methods.tract import TrActMethod
from tract.methods.whitening import WhiteningMethod
from tract.oialr.layers import low_rank_layers
from tract.subspaces import Line, apply_subspace, plain_at
from tract.subspaces.layers import SubspaceLayer, SubspaceLinear, TrActSubspaceLinear, set_coefficients

SUBSPACES = ("line", "curve", "simplex")
WORKING = [
    *(("vanilla", other) for other in METHODS if other != "vanilla"),
    *(("tract", other) for other in ("patchnorm", "dual_patchnorm", *SUBSPACES, "oialr", "swa")),
    *(("patchnorm", other) for other in ("proxprop", *SUBSPACES, "oialr", "whitening", "swa")),
    *(("dual_patchnorm", other) for other in ("proxprop", *SUBSPACES, "oialr", "whitening", "swa")),
    *((path, "swa") for path in SUBSPACES),
    ("proxprop", "swa"),
    ("whitening", "oialr"),
    ("whitening", "swa"),
]
NONE_LEFT = "expected a model with layers that a low rank pays for, got ViT with none; layers made by "
# In both orders, unless there is a sentence for each.
REFUSED = {
    ("tract", "proxprop"): "ProxProp without layers=[NAMES] takes every layer but the last: expected plain ones, got",
    ("proxprop", "tract"): "TrAct: expected a plain layer, got ProxPropLinear, made by ProxProp; give one of",
    ("tract", "whitening"): "got tract and whitening both on emb.weight; give one of them another layer",
    ("whitening", "tract"): "got whitening and tract both on emb.weight; give one of them another layer",
    ("patchnorm", "dual_patchnorm"): "expected a model without normalised patches, got 'emb.before' already; use one",
    ("proxprop", "whitening"): "got proxprop and whitening both on emb.weight; give one of them another layer",
    ("whitening", "proxprop"): "got whitening and proxprop both on emb.weight; give one of them another layer",
    ("proxprop", "oialr"): NONE_LEFT + "ProxProp stay as they are, so leave that out",
    ("oialr", "swa"): "expected weights that keep their shapes for swa, got oialr, which changes them while it trains; "
    "leave one",
} | {
    pair: sentence
    for path in SUBSPACES
    for pair, sentence in {
        (path, "proxprop"): "every layer but the last: expected plain ones, got emb: SubspaceLinear, made by a line",
        ("proxprop", path): "expected layers that are plain or have TrAct, got emb: ProxPropLinear, made by ProxProp",
        (path, "oialr"): NONE_LEFT + "a line, curve or simplex stay as they are, so leave that out",
        (path, "whitening"): "whitening: expected a plain layer, got emb: SubspaceLinear, made by a line, curve",
        **{(path, other): "got one with subspace layers already; use one" for other in SUBSPACES if other != path},
    }.items()
}  # fmt: skip
SENTENCES = {(second, first): sentence for (first, second), sentence in REFUSED.items()} | REFUSED
# Refused, but for these options.
APART = {
    ("tract", "proxprop"): {"method.proxprop.layers": ["blocks.0.mlp.0"]},
    ("tract", "whitening"): {"method.tract.layer": "blocks.0.mlp.0"},
    ("proxprop", "whitening"): {"method.proxprop.layers": ["blocks.0.mlp.0"]},
    ("proxprop", "oialr"): {"method.proxprop.layers": ["blocks.0.mlp.0"]},
}
# The embedding's norms have endpoints only if they are there before the line.
ORDERED = [("dual_patchnorm", path) for path in SUBSPACES]

OPTIONS = METHODS | {
    "swa": {"method.start": 0.0, "method.count": 3, "method.samples": 0, "method.points": 0},
    "oialr": {"method.delay": 2, "method.stability_frequency": 1, "method.sigma_cutoff_fraction": 0.3},
}
SHORT = {"max_steps": 4, "batch_size": 48, "eval_images": 40, "model.width": 8, "ema_decay": 0.8}


def _config(folder, *methods, **changes):
    options = {
        key.replace("method.", f"method.{name}."): value for name in methods for key, value in OPTIONS[name].items()
    }
    where = {"runtime.runs": str(folder), "method": list(methods)}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return compose_config("quickstart", TINY | SHORT | options | where | changes)


def _train(folder, *methods, **changes):
    """(what is logged at the end, the last checkpoint)."""
    config = _config(folder, *methods, **changes)
    metrics = run(config)["metrics"]
    return metrics, checkpoint.load(folder_of(config).newest_checkpoint(), config_hash(config))


def _assert_same(first, second):
    for key in ("model", "ema", "optimizer"):
        assert_equal_trees(first[1][key], second[1][key])
    assert first[0] == second[0]


# -- the table ----------------------------------------------------------------------------------------


def test_every_ordered_pair_either_works_or_is_refused():
    works = {order for pair in WORKING for order in permutations(pair)}
    assert len(works) == 2 * len(WORKING)
    assert not works & SENTENCES.keys()
    assert works | SENTENCES.keys() == set(permutations(METHODS, 2))


def test_the_page_has_the_same_table():
    page = (CONF.parents[1] / "docs" / "extending.md").read_text()
    head, _, *rows = [line.split("|")[1:-1] for line in page[page.index("| | `tract`") :].split("\n\n")[0].splitlines()]
    names = [name.strip(" `") for name in head[1:]]
    found = {}
    for row in rows:
        for name, cell in zip(names, row[1:], strict=True):
            found[row[0].strip(" `"), name] = cell.strip()
    works = {order for pair in WORKING for order in permutations(pair)}
    apart = {order for pair in APART for order in permutations(pair)}
    assert set(names) == METHODS.keys() - {"vanilla"}
    for pair in permutations(names, 2):
        assert found[pair] == ("yes" if pair in works else "apart" if pair in apart else "no"), pair


@pytest.mark.parametrize("pair", APART, ids=",".join)
def test_methods_on_layers_of_their_own_go_together(pair, tmp_path):
    first = _train(tmp_path / "first", *pair, **APART[pair])
    _assert_same(_train(tmp_path / "second", *reversed(pair), **APART[pair]), first)


@pytest.mark.parametrize("pair", SENTENCES, ids=",".join)
def test_an_impossible_pair_is_one_sentence_before_training(pair, tmp_path, capsys):
    words = [f"method=[{','.join(pair)}]", "model=vit_small", "model.width=8", "model.depth=1", "model.heads=2"]
    assert main("quickstart", "", "", [*words, "max_steps=1", f"runtime.runs={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert SENTENCES[pair] in said
    assert said.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("pair", [pair for pair in WORKING if "vanilla" not in pair], ids=",".join)
def test_a_pair_continues_to_the_same_bytes_and_its_order_makes_no_difference(pair, tmp_path, monkeypatch):
    class StopError(BaseException):
        pass

    whole = _train(tmp_path / "whole", *pair)
    if pair not in ORDERED:
        _assert_same(_train(tmp_path / "other", *reversed(pair)), whole)
    after_step, stopped = Trainer.after_step, []

    def stopping(trainer, at_end):
        after_step(trainer, at_end)
        if trainer.progress.step == 2 and not stopped:
            stopped.append(True)
            raise StopError

    monkeypatch.setattr(Trainer, "after_step", stopping)
    with pytest.raises(StopError):
        _train(tmp_path / "parts", *pair, runtime__checkpoint_steps=1)
    _assert_same(_train(tmp_path / "parts", *pair, runtime__checkpoint_steps=1), whole)


# -- TrAct on a line -------------------------------------------------------------------------------------

DAMPING = 0.1
# name: (plain first layer, shape of a batch); with fewer rows than row elements, and with more
FIRST = {
    "linear": (lambda: nn.Linear(6, 4), (20, 6)),
    "linear, few rows": (lambda: nn.Linear(30, 4), (7, 30)),
    "no bias": (lambda: nn.Linear(6, 4, bias=False), (20, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 5, 5)),
    "convolution, few rows": (lambda: nn.Conv2d(3, 4, 4, stride=4), (2, 3, 8, 8)),
}


def _line(path="line", **options):
    usual = {"layerwise": False, "num_samples": 1, "beta": 0.0, "cosine": "squared", "shared_bias": False}
    usual |= {"reestimate": False, "points": 0, "members": 0}
    endpoints = {"line": 2, "curve": 3, "simplex": 3}[path]
    return SubspaceMethod(path=path, endpoints=endpoints, seed=0, **(usual | options))


def _tract():
    return TrActMethod(DAMPING, None, "global")


def _network(first):
    return nn.Sequential(FIRST[first][0](), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()


def _applied(order, first="linear", path="line", **options):
    """A network with both methods, and the method."""
    torch.manual_seed(3)
    parts = {"line": _line(path, **options), "tract": _tract()}
    both = Composed(**{name: parts[name] for name in order})
    x = torch.zeros(FIRST[first][1], dtype=torch.float64)

    def another():
        model = _network(first)
        model(x)
        return model

    model = another()
    both.prepare(Setting(another, 10, 10))
    both.apply(model)
    return model, both


def _rows(layer, x):
    """X of shape (groups, rows, n)."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)[None]
    columns = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    groups = layer.groups
    return columns.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _output(layer, x, weight, bias):
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, groups=layer.groups)


def _literal(model, parts, points):
    """The gradients of a sum over parts, each at its point of both layers: {name: gradient}, by the chain rule.

    G_k is the plain gradient at the weight of part k, A the second moment of all rows together; endpoint i of the
    first layer gets (sum_k c_i(k) G_k) (A + lambda I)^-1.
    """
    first, last = model[0], model[3]
    rows = torch.cat([_rows(first, x) for x in parts], 1)
    groups, count, n = rows.shape
    inverse = torch.linalg.inv(rows.mT @ rows / count + DAMPING * torch.eye(n, dtype=torch.float64))
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, (of_first, of_last) in zip(parts, points, strict=True):
        at = {}
        for index, (layer, shares) in {0: (first, of_first), 3: (last, of_last)}.items():
            for kind in ("weight", "bias"):
                ends = [
                    layer._parameters[f"{kind}{i or ''}"]
                    for i in range(len(shares))
                    if getattr(layer, kind) is not None
                ]
                if ends:
                    point = sum(c * end.detach() for c, end in zip(shares, ends, strict=True))
                    at[index, kind] = point.requires_grad_()
        z = _output(first, x, at[0, "weight"], at.get((0, "bias")))
        F.linear(torch.tanh(z).flatten(1), at[3, "weight"], at[3, "bias"]).square().sum().backward()
        for (index, kind), point in at.items():
            gradient = point.grad
            if (index, kind) == (0, "weight"):
                gradient = (gradient.reshape(groups, -1, n) @ inverse).reshape(gradient.shape)
            for i, share in enumerate(of_first if index == 0 else of_last):
                expected[f"{index}.{kind}{i or ''}"] += share * gradient
    return expected


def _gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def _assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


ORDERS = [("tract", "line"), ("line", "tract")]


@pytest.mark.parametrize("path", SUBSPACES)
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("order", ORDERS, ids=",".join)
def test_an_endpoint_gets_its_share_of_the_tract_gradient_at_the_point(order, first, path):
    model, _ = _applied(order, first, path)
    x = torch.randn(FIRST[first][1], dtype=torch.float64)
    for shares in ((0.7, 0.3), (1.0, 0.0), (0.2, 0.8)):
        shares = (*shares, -0.4)[: model[0].path.endpoints]
        model.zero_grad()
        set_coefficients(model, shares)
        model(x).square().sum().backward()
        _assert_close(_gradients(model), _literal(model, [x], [(shares, shares)]))


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("order", ORDERS, ids=",".join)
def test_parts_at_points_of_their_own_have_one_second_moment(order, first, layerwise):
    """The exact chain rule: each part's gradient goes to the endpoints by its own point, all rows make one matrix."""
    model, both = _applied(order, first, layerwise=layerwise, num_samples=2)
    size, *shape = FIRST[first][1]
    parts = [torch.randn(rows, *shape, dtype=torch.float64) for rows in (size, 2 * size, size, size + 1)]
    points = []
    both.before_step(model, 0)
    with both.accumulating(model):
        for number, x in enumerate(parts):
            both.before_part(model, 0, number, len(parts))
            points.append((model[0].coefficients.tolist(), model[3].coefficients.tolist()))
            model(x).square().sum().backward()
    assert points[0] == points[1] != points[2] == points[3]  # two points, each for two micro-batches
    assert (points[0][0] == points[0][1]) == (not layerwise)
    _assert_close(_gradients(model), _literal(model, parts, points))


def test_a_step_that_forgets_its_gradients_forgets_its_rows_too():
    model, both = _applied(("tract", "line"))
    x, y = torch.randn(2, 20, 6, dtype=torch.float64)
    with both.accumulating(model):
        model(x).square().sum().backward()
        model.zero_grad()
        model(y).square().sum().backward()
    _assert_close(_gradients(model), _literal(model, [y], [((0.5, 0.5), (0.5, 0.5))]))


def test_the_penalty_of_a_line_stays_plain(tmp_path):
    """Weights after one step with and without it differ by the gradient of beta |cos|, at the weights before."""
    options = {"optim": "sgd", "optim.lr": 0.5, "optim.momentum": 0.0, "max_steps": 1, "ema_decay": None}
    options |= {"method.line.cosine": "absolute", "method.line.num_samples": 2, "schedule": "constant"}
    found = {
        beta: _train(tmp_path / str(beta), "tract", "line", **options, **{"method.line.beta": beta})[1]["model"]
        for beta in (0.0, 3.0)
    }
    config = _config(tmp_path, "tract", "line")
    seed_torch(config.seed, "initialisation")
    size = {"in_channels": 1, "image_size": 8, **options_of(config.model)}
    ends = [dict(build_model("vit_small", 10, **size).named_parameters()) for _ in range(2)]
    names = [name for name in found[0.0] if f"{name}1" in found[0.0] and ends[0][name].dim() > 1]
    assert "emb.weight" in names
    a, b = (torch.cat([end[name].flatten() for name in names]) for end in ends)
    (3 * (a @ b).abs() / (a.norm() * b.norm())).backward()
    for index, end in enumerate(ends):
        key = "emb.weight1" if index else "emb.weight"
        torch.testing.assert_close(
            found[3.0][key] - found[0.0][key], -0.5 * end["emb.weight"].grad, rtol=0.02, atol=1e-6
        )


@pytest.mark.parametrize("micro_batch", [16, 7])
def test_micro_batches_of_a_line_with_tract_are_one_batch(micro_batch, tmp_path):
    options = {"optim": "sgd", "optim__lr": 0.05, "ema_decay": None}
    whole, parts = (
        _train(tmp_path / str(size), "line", "tract", **options, micro_batch=size)[1]["model"]
        for size in (None, micro_batch)
    )
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("order", ORDERS, ids=",".join)
def test_the_pair_comes_apart_again(order):
    model, both = _applied(order)
    alone = _network("linear")
    alone(torch.zeros(1, 6, dtype=torch.float64))
    apply_subspace(alone, Line(), [copy.deepcopy(alone)])
    assert list(model.state_dict()) == list(alone.state_dict())
    assert type(model[0]) is TrActSubspaceLinear
    x = torch.randn(5, 6, dtype=torch.float64)
    first, last = model[0], model[3]
    z = F.linear(x, first.weight / 4 + 3 * first.weight1 / 4, first.bias / 4 + 3 * first.bias1 / 4)
    expected = F.linear(z.tanh(), last.weight / 4 + 3 * last.weight1 / 4, last.bias / 4 + 3 * last.bias1 / 4)
    at_point = plain_at(model, 0.75)
    torch.testing.assert_close(at_point(x), expected)
    assert isinstance(at_point[0], TrActLayer)
    assert not any(isinstance(module, SubspaceLayer) for module in at_point.modules())
    assert dict(both.metrics(model))["tract/weight_norm"] == pytest.approx(
        ((first.weight + first.weight1) / 2).norm().item()
    )
    marked = [group for group in both.param_groups(model) if group.get("first_layer")]
    assert {id(p) for group in marked for p in group["params"]} == {id(p) for p in first.parameters()}
    unwrap(model)
    assert type(model[0]) is SubspaceLinear
    assert not hasattr(model[0], "lambda_")


def test_a_point_of_a_line_with_tract_is_exported(tmp_path, capsys):
    config = _config(tmp_path, "tract", "line", max_steps=2)
    run(config)
    folder = folder_of(config)
    assert export_main([str(folder), "--alpha", "0.25", "--out", str(tmp_path / "point.pt")]) == 0
    point = torch.load(tmp_path / "point.pt", weights_only=True)["model"]
    weights = checkpoint.load(folder.newest_checkpoint(), config_hash(config))["model"]
    size = {"in_channels": 1, "image_size": 8, **options_of(config.model)}
    plain = build_model("vit_small", 10, **size).state_dict()
    assert point.keys() == plain.keys()
    for name, value in point.items():
        other = weights.get(f"{name}1", weights[name])
        torch.testing.assert_close(value, 0.75 * weights[name] + 0.25 * other)
    config = _config(tmp_path, "line", "swa", max_steps=2)
    run(config)
    assert export_main([str(folder_of(config)), "--out", str(tmp_path / "point.pt")]) == 2
    assert "expected a run without swa, whose snapshots are no point, got line+swa" in capsys.readouterr().err


# -- other pairs ------------------------------------------------------------------------------------------


def _oialr(**options):
    usual = {
        "freeze": "conversion", "delay": 1, "full_rank_warmup": True, "stability_frequency": 1,
        "stability_threshold": 0.9, "sigma_cutoff_fraction": 0.0, "keep_first_layer": False, "keep_last_layer": True,
        "network_layer_perc_step": 0.0, "stable_update_delay": 1, "inner_dim_init_ratio": 1.0,
        "fixed_inner_dim": True, "reinit_shapes": True, "moments": "rotated",
    }  # fmt: skip
    return OIALRMethod(**(usual | options))


def _mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)).double()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("freeze", ["conversion", "stability", "never"])
@pytest.mark.parametrize("order", [("tract", "oialr"), ("oialr", "tract")], ids=",".join)
def test_tract_keeps_the_first_layer_from_low_rank_and_its_gradient(order, freeze, keep):
    parts = {"tract": _tract(), "oialr": _oialr(freeze=freeze, keep_first_layer=keep)}
    model, plain, x = _mlp(), _mlp(), torch.randn(20, 6, dtype=torch.float64)
    said = Composed(**{name: parts[name] for name in order}).apply(model)
    assert said.endswith(": 2")  # the only layer that is left: the first has TrAct, the last is kept
    assert list(low_rank_layers(model)) == (["2"] if freeze == "conversion" else [])
    assert "reference" not in model[0]._parameters
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    inverse = torch.linalg.inv(x.T @ x / 20 + DAMPING * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad @ inverse)


@pytest.mark.parametrize("changes", [{"full_rank_warmup": False}, {"keep_first_layer": False}], ids=str)
def test_tract_and_oialr_are_the_same_in_both_orders_whatever_oialr_takes(changes, tmp_path):
    changes = {f"method.oialr.{key}": value for key, value in changes.items()}
    first = _train(tmp_path / "first", "tract", "oialr", **changes)
    _assert_same(_train(tmp_path / "second", "oialr", "tract", **changes), first)
    assert "emb.weight" in first[1]["model"]
    assert any(name.endswith(".s") for name in first[1]["model"])


@pytest.mark.parametrize("order", [("tract", "proxprop"), ("proxprop", "tract")], ids=",".join)
def test_proximal_steps_may_have_the_layers_that_tract_leaves(order):
    tau, x = 0.5, torch.randn(20, 6, dtype=torch.float64)
    parts = {"tract": _tract(), "proxprop": ProxPropMethod(tau, "prox_exact", ["2"], "standard", "global")}
    model, plain = _mlp(), _mlp()
    Composed(**{name: parts[name] for name in order}).apply(model)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    inverse = torch.linalg.inv(x.T @ x / 20 + DAMPING * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad @ inverse)
    h = torch.cat([plain[:2](x).detach(), torch.ones(20, 1, dtype=torch.float64)], 1)
    gradient = torch.cat([plain[2].weight.grad, plain[2].bias.grad[:, None]], 1)
    increment = gradient @ torch.linalg.inv(h.T @ h + torch.eye(6, dtype=torch.float64) / tau)
    torch.testing.assert_close(model[2].weight.grad, increment[:, :-1])
    torch.testing.assert_close(model[4].weight.grad, plain[4].weight.grad)


@pytest.mark.parametrize("other", [_tract, _line])
def test_proximal_steps_on_a_layer_of_another_method_are_refused(other):
    first, second = other(), ProxPropMethod(1.0, "prox_cg1", ["0"], "standard", "global")
    first.prepare(Setting(_mlp, 1, 1))
    for parts in ({"first": first, "second": second}, {"second": second, "first": first}):
        with pytest.raises(
            (TypeError, ValueError), match="expected .* plain .*, got .*, made by .*; give one of the met"
        ):
            Composed(**parts).apply(_mlp())


@pytest.mark.parametrize("order", [("patchnorm", "line"), ("line", "patchnorm")], ids=",".join)
def test_a_line_of_networks_with_normalised_patches(order):
    """The endpoints' gradients are those of a line whose input is normalised by hand."""
    x = torch.randn(20, 6, dtype=torch.float64) * 3 + 1
    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.manual_seed(0)
    by_hand, other = _mlp(), _mlp().requires_grad_(True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3)
    model = _mlp()
    parts = {"line": _line(), "patchnorm": PatchNormMethod(None)}
    both = Composed(**{name: parts[name] for name in order})
    both.prepare(Setting(lambda: copy.deepcopy(other), 1, 1))
    both.apply(model)
    apply_subspace(by_hand, Line(), [other])
    for network, images in ((model, x), (by_hand, normed)):
        set_coefficients(network, (0.7, 0.3))
        network(images).square().sum().backward()
    found = {name.replace(".embedding", ""): value for name, value in _gradients(model).items()}
    _assert_close(found, _gradients(by_hand))


@pytest.mark.parametrize("order", [("line", "swa"), ("swa", "line")], ids=",".join)
def test_snapshots_of_a_line_are_averaged_by_endpoint_and_evaluated_at_the_midpoint(order):
    parts = {
        "line": _line(),
        "swa": SnapshotMethod(seed=0, count=2, start=0.0, epochs=None, samples=0, t=0.5, points=0),
    }
    model, x = _mlp(), torch.randn(5, 6, dtype=torch.float64)
    both = Composed(**{name: parts[name] for name in order})
    both.prepare(Setting(_mlp, 2, 2))
    both.apply(model)
    taken = []
    for step in range(2):
        both.before_step(model, step)
        both.before_part(model, step, 0, 1)  # away from the midpoint
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        both.after_step(model, None, step)
        taken.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    networks = dict(both.evaluated(model, Occasion(lambda: (), lambda total: total, last=False)))
    assert list(networks) == ["test", "swa/test", "swa"]
    for tag, states in {"test": taken[1:], "swa/test": taken[1:], "swa": taken}.items():
        expected = _mlp()
        for name, parameter in expected.named_parameters():
            values = [state[end] for state in states for end in (name, f"{name}1")]
            parameter.data = torch.stack(values).mean(0)
        torch.testing.assert_close(networks[tag](x), expected(x), msg=lambda text, tag=tag: f"{tag}: {text}")


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("order", [("whitening", "oialr"), ("oialr", "whitening")], ids=",".join)
def test_a_whitened_layer_does_not_become_low_rank(order, warmup):
    parts = {"whitening": WhiteningMethod(None, 10, 1e-3), "oialr": _oialr(delay=3, full_rank_warmup=warmup)}
    both = Composed(**{name: parts[name] for name in order})
    both.prepare(Setting(_mlp, 1, 1, lambda count: [torch.randn(50, 6, dtype=torch.float64)]))
    model = _mlp()
    if order[0] == "oialr" and not warmup:  # it is low-rank already
        with pytest.raises((TypeError, ValueError), match=r"whitening|0\.weight") as caught:
            both.apply(model)
        assert re.search("expected .*, got .*; give", str(caught.value))
        return
    both.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        both.after_step(model, optimizer, step)
    assert "0" not in low_rank_layers(model)
    assert low_rank_layers(model)
    assert not model[0].weight.requires_grad


def test_measures_of_two_methods_have_tags_of_their_own(tmp_path):
    points = {"method.swa.points": 2, "method.swa.count": 2}
    metrics, _ = _train(tmp_path, "line", "swa", **points)
    for tag in ("pair/0/loss", "swa/pair/0/loss", "pair/0/disagreement", "swa/pair/0/disagreement"):
        assert tag in metrics
