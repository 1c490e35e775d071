"""Subspaces and averages as methods of whole runs: what is trained, what is evaluated, and the way to the table."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from analysis import subspaces as report
from experiments.config import compose_config
from experiments.grid import plan
from experiments.tools import export_point
from experiments.training import assembly
from experiments.training.loop import Trainer
from slurm.command import main
from tests.cases import tiny_config
from tests.same_runs import assert_equal_trees
from tests.test_experiments_loop import SGD, _model_and_batches, _scalars, _train
from tract.methods.base import Occasion, Setting
from tract.methods.snapshots import SnapshotMethod
from tract.methods.subspace import SubspaceMethod
from tract.subspaces import (
    Line,
    apply_subspace,
    plain_at,
    reestimated,
    set_coefficients,
    squared_cosine,
    subspace_layers,
)

RESNET = {"model": "resnet_small", "model__width": 8}
QUICK = {"max_steps": 4, **RESNET}


def subspace(**changes):
    options = {"path": "line", "endpoints": 2, "seed": 0, "layerwise": False, "num_samples": 1, "beta": 1.0}
    options |= {"cosine": "squared", "shared_bias": False, "reestimate": True, "points": 3, "members": 0}
    return SubspaceMethod(**options | changes)


def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def applied(method, seed=0):
    torch.manual_seed(seed)
    model = network()
    method.prepare(Setting(network, 10, 5))
    method.apply(model)
    return model


def points_of(model):
    return [tuple(layer.coefficients.tolist()) for layer in subspace_layers(model)]


# -- training ---------------------------------------------------------------------------------------


def test_one_endpoint_without_regulariser_is_plain_training_byte_for_byte(tmp_path):
    changes = {"ema_decay": 0.9, **QUICK}
    _, plain, state = _train(tmp_path / "plain", method="vanilla", **changes)
    options = {"method__endpoints": 1, "method__beta": 0.0, "method__members": 0, "method__reestimate": False}
    _, one, its = _train(tmp_path / "one", method="simplex", **options, **changes)
    assert one["weights_sha256"] == plain["weights_sha256"]
    assert one["metrics"] == plain["metrics"]
    for key in ("model", "optimizer", "ema"):
        assert_equal_trees(state[key], its[key])


@pytest.mark.parametrize("cosine", ["squared", "absolute"])
def test_a_run_of_a_line_is_algorithm_1_written_out(cosine, tmp_path):
    """Plain networks at the drawn points; the endpoints' gradients by the chain rule, by hand."""
    steps, beta = 3, 0.5
    changes = {"method__beta": beta, "method__cosine": cosine, "method__num_samples": 1, **SGD, "max_steps": steps}
    config, _, state = _train(tmp_path, method="line", **changes)
    first, batches = _model_and_batches(config)
    second = assembly.build_model(config.model["name"], 10, **batches.data.shape, **assembly.options_of(config.model))
    ends = [dict(model.named_parameters()) for model in (first, second)]
    momenta = [{name: torch.zeros_like(p) for name, p in end.items()} for end in ends]
    method, lr = subspace(), config.optim["lr"]
    matrices = [name for name, p in ends[0].items() if p.dim() > 1 and name != "pos_emb"]
    for step, (x, y) in zip(range(steps), batches.train(0), strict=False):
        (alpha,) = Line().draw(method._generator(0, step, 0))
        shares = (1 - alpha, alpha)
        point = copy.deepcopy(first)
        mixed = dict(point.named_parameters())
        with torch.no_grad():
            for name, parameter in mixed.items():
                if _has_endpoints(first, name):
                    parameter.copy_(sum(c * end[name] for c, end in zip(shares, ends, strict=True)))
                else:
                    parameter.copy_(ends[0][name])
        F.cross_entropy(point(x), y).backward()
        v = [torch.cat([end[n].detach().flatten() for n in matrices if _has_endpoints(first, n)]) for end in ends]
        v = [one.requires_grad_() for one in v]
        cosine_ = F.cosine_similarity(v[0], v[1], dim=0)
        (beta * (cosine_**2 if cosine == "squared" else cosine_.abs())).backward()
        rate = lr * 0.5 * (1 + np.cos(np.pi * step / config.max_steps))
        with torch.no_grad():
            for index, (end, momentum) in enumerate(zip(ends, momenta, strict=True)):
                at = 0
                for name in end:
                    gradient = mixed[name].grad.clone()
                    if _has_endpoints(first, name):
                        gradient *= shares[index]
                        if name in matrices:
                            gradient += v[index].grad[at : at + gradient.numel()].view_as(gradient)
                            at += gradient.numel()
                    elif index:
                        continue
                    momentum[name].mul_(config.optim["momentum"]).add_(gradient)
                    end[name].sub_(rate * momentum[name])
    for index, end in enumerate(ends):
        for name, value in end.items():
            key = f"{name}1" if index else name
            if key in state["model"]:
                torch.testing.assert_close(
                    state["model"][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
                )
    assert any(name.endswith("weight1") for name in state["model"])


def _has_endpoints(model, name):
    owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
    return type(owner) in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)


def test_points_are_functions_of_seed_step_and_sample():
    found = {}
    for key, (seed, step, part, parts) in {
        "here": (0, 3, 0, 2),
        "again": (0, 3, 0, 2),
        "other step": (0, 4, 0, 2),
        "other sample": (0, 3, 1, 2),
        "other seed": (1, 3, 0, 2),
        "first of more micro-batches": (0, 3, 1, 4),
        "last of more micro-batches": (0, 3, 3, 4),
    }.items():
        method = subspace(seed=seed, num_samples=2)
        model = applied(method)
        torch.manual_seed(step)  # no generator of torch takes part
        method.before_part(model, step, part, parts)
        found[key] = points_of(model)
    assert found["here"] == found["again"] == found["first of more micro-batches"]
    assert found["other sample"] == found["last of more micro-batches"]
    different = [found[key][0] for key in ("here", "other step", "other sample", "other seed")]
    assert len(set(different)) == 4
    assert all(len(set(points)) == 1 for points in found.values())


def test_layerwise_gives_every_layer_a_point_of_its_own():
    method = subspace(layerwise=True)
    model = applied(method)
    method.before_part(model, 0, 0, 1)
    assert len(set(points_of(model))) == len(points_of(model)) == 3


@pytest.mark.parametrize(("samples", "micro_batch"), [(3, None), (3, 20), (2, 7), (1, 50)])
def test_several_points_in_a_step_share_the_batch_and_leave_nothing_out(samples, micro_batch, tmp_path, monkeypatch):
    seen = []
    before_part, note = SubspaceMethod.before_part, Trainer._note

    def recording(method, model, step, part, parts):
        before_part(method, model, step, part, parts)
        seen.append([step, points_of(model)[0], None])

    def counting(trainer, total, measures, images):
        seen[-1][2] = images
        note(trainer, total, measures, images)

    monkeypatch.setattr(SubspaceMethod, "before_part", recording)
    monkeypatch.setattr(Trainer, "_note", counting)
    changes = {"max_steps": 2, "batch_size": 100, "micro_batch": micro_batch, "method__num_samples": samples}
    _train(tmp_path, method="line", **changes)
    for step in (0, 1):
        parts = [(point, images) for at, point, images in seen if at == step]
        assert sum(images for _, images in parts) == 100
        assert len({point for point, _ in parts}) == samples
        by_point = {point: sum(i for p, i in parts if p == point) for point, _ in parts}
        assert max(by_point.values()) - min(by_point.values()) <= len(parts) // samples
        assert micro_batch is None or max(images for _, images in parts) <= micro_batch


def test_endpoints_are_drawn_by_the_models_own_initialisation(tmp_path):
    made = []

    def another():
        model = network()
        nn.init.constant_(model[0].weight, 7.0 + len(made))
        made.append(model)
        return model

    method = subspace(path="simplex", endpoints=3)
    model = another()
    method.prepare(Setting(another, 1, 1))
    method.apply(model)
    assert [float(model[0].endpoint("weight", index).detach().mean()) for index in range(3)] == [7.0, 8.0, 9.0]


# -- evaluation -------------------------------------------------------------------------------------


def occasion(images, last=True):
    return Occasion(lambda: images, lambda total: total, last)


def test_what_is_evaluated_are_plain_networks_at_points_with_statistics_of_their_own():
    method = subspace()
    model = applied(method)
    images, x = [torch.randn(20, 1, 8, 8), torch.randn(12, 1, 8, 8)], torch.randn(5, 1, 8, 8)
    for batch in images:  # training statistics, which must not matter
        model(3 + batch)
    before = copy.deepcopy(model.state_dict())
    model.eval()
    found = dict(method.evaluated(model, occasion(images)))
    assert list(found) == ["test", "path/0", "path/0.5", "path/1", "pair/0"]
    points = {alpha: reestimated(plain_at(model, alpha), images).eval()(x) for alpha in (0.0, 0.5, 1.0)}
    for name, expected in {
        "test": points[0.5],
        "path/0": points[0.0],
        "path/1": points[1.0],
        "pair/0": (points[0.0] + points[1.0]) / 2,
    }.items():
        torch.testing.assert_close(found[name](x), expected)
    assert_equal_trees(model.state_dict(), before)
    assert [name for name, _ in method.evaluated(model, occasion(images, last=False))] == ["test"]


def test_mixed_statistics_are_an_option():
    method = subspace(reestimate=False)
    model = applied(method)
    model(torch.randn(20, 1, 8, 8))
    (_, midpoint), *_ = method.evaluated(model.eval(), occasion([]))
    x = torch.randn(5, 1, 8, 8)
    set_coefficients(model, (0.5, 0.5))
    torch.testing.assert_close(midpoint(x), model(x))


def test_simplexes_are_evaluated_at_corners_random_points_and_these_together():
    method = subspace(path="simplex", endpoints=3, members=2)
    model = applied(method).eval()
    images, x = [torch.randn(20, 1, 8, 8)], torch.randn(5, 1, 8, 8)
    found = dict(method.evaluated(model, occasion(images)))
    assert list(found) == ["test", "corner/0", "corner/1", "corner/2", "member/0", "member/1", "ensemble"]
    torch.testing.assert_close(found["ensemble"](x), (found["member/0"](x) + found["member/1"](x)) / 2)
    torch.testing.assert_close(found["corner/2"](x), reestimated(plain_at(model, 0.0, 1.0), images)(x))
    (name, measure), *rest = method.measured(model, occasion(images))
    numbers = measure(x, torch.zeros(5, dtype=torch.int64))
    p, q = (found[f"member/{index}"](x).softmax(1) for index in range(2))
    assert (name, rest) == ("ensemble", [])
    assert numbers["total_variation"].mean().item() == pytest.approx(0.5 * (p - q).abs().sum(1).mean().item(), rel=1e-5)
    assert numbers["disagreement"].mean().item() == pytest.approx((p.argmax(1) != q.argmax(1)).double().mean().item())


def test_a_moving_average_is_evaluated_at_its_midpoint(tmp_path):
    config, result, state = _train(tmp_path, method="line", ema_decay=0.5, method__points=0, **QUICK)
    model, batches = _model_and_batches(config)
    other = assembly.build_model(config.model["name"], 10, **batches.data.shape, **assembly.options_of(config.model))
    apply_subspace(model, Line(), [other])
    averaged = {name.removeprefix("module."): tensor for name, tensor in state["ema"].items() if name != "n_averaged"}
    averaged = {name: tensor for name, tensor in averaged.items() if not name.endswith("coefficients")}
    model.load_state_dict(averaged)
    midpoint = reestimated(plain_at(model.eval(), 0.5), [x for x, _ in batches.plain()])
    with torch.no_grad():
        hits = [(midpoint(x).argmax(1) == y).double().mean() * len(y) for x, y in batches.test()]
    assert result["metrics"]["ema/top1"] == pytest.approx(100 * float(sum(hits)) / 360)


def test_calibration_error_is_that_of_the_definition(tmp_path):
    config, result, state = _train(tmp_path, method="vanilla", **QUICK)
    model, batches = _model_and_batches(config)
    model.load_state_dict(state["model"])
    with torch.no_grad():
        scores = torch.cat([model.eval()(x) for x, _ in batches.test()]).double().softmax(1).numpy()
    labels = np.concatenate([y for _, y in batches.test()])
    total = 0.0
    for low in range(20):
        inside = [n for n in range(len(labels)) if min(int(20 * scores[n].max()), 19) == low]
        total += abs(sum((scores[n].argmax() == labels[n]) - scores[n].max() for n in inside))
    assert result["metrics"]["test/ece"] == pytest.approx(100 * total / len(labels), rel=1e-5)


def test_a_moving_average_has_networks_of_its_own():
    method = subspace()
    model = applied(method).eval()
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.zero_()
    images, x, labels = [torch.randn(20, 1, 8, 8)], torch.randn(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64)
    list(method.evaluated(model, occasion(images)))
    ((_, alone),) = method.measured(model, occasion(images))
    expected = alone(x, labels)["total_variation"]
    for each in (model, average):
        list(method.evaluated(each, occasion(images)))
    ((_, measure),) = method.measured(model, occasion(images))
    assert torch.equal(measure(x, labels)["total_variation"], expected)
    assert expected[0] > 0


# -- averages of one training -----------------------------------------------------------------------


def snapshots(**changes):
    options = {"seed": 0, "count": 3, "start": 0.5, "epochs": None, "samples": 2, "t": 0.5, "points": 3}
    return SnapshotMethod(**options | changes)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, [7, 8, 10]),
        ({"start": 0.0, "count": 5}, [2, 4, 6, 8, 10]),
        ({"epochs": [1, 2]}, [5, 10]),
        ({"count": 50}, [5, 6, 7, 8, 9, 10]),
    ],
)
def test_snapshots_are_taken_after_their_steps(changes, steps):
    method = snapshots(**changes)
    method.prepare(Setting(network, 10, 5))
    model = network()
    method.apply(model)
    optimizer, weights = torch.optim.SGD(method.param_groups(model), lr=0.1), {}
    for step in range(10):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        method.after_step(model, optimizer, step)
        weights[step + 1] = model[0].weight.detach().clone()
    found = dict(method.evaluated(model.eval(), occasion([torch.randn(20, 1, 8, 8)])))
    expected = torch.stack([weights[step] for step in steps]).mean(0)
    torch.testing.assert_close(found["swa"][0].weight, expected)
    torch.testing.assert_close(found["test"][0].weight, weights[10])
    ends = [found["path/0"][0].weight, found["path/1"][0].weight]
    assert all(torch.equal(a, b) for a, b in zip(ends, (weights[steps[0]], weights[steps[-1]]), strict=True))
    assert {"swag", "swag/0", "snapshots", "random/global", "random/layer", "random/weight", "weighted/0"} <= set(found)


def test_a_moving_average_has_the_models_own_snapshots(tmp_path):
    options = {"method__start": 0.0, "method__count": 2, "method__points": 0, "ema_decay": 0.9}
    _, result, state = _train(tmp_path, method="swa", **options, **QUICK)
    assert torch.equal(state["ema"]["module.snapshots"], state["model"]["snapshots"])
    assert int(state["ema"]["module.snapshots_taken"]) == 2
    assert result["metrics"]["ema/swa/loss"] == pytest.approx(result["metrics"]["swa/loss"], rel=1e-5)


def test_snapshots_of_another_number_are_not_begun_from(tmp_path, capsys):
    words = ["data=digits", "model=resnet_small", "method=swa", "method.points=0", "epochs=1", *QUIET]
    assert main("quickstart", "", "", [*words, "method.count=2", f"runtime.runs={tmp_path}"]) == 0
    (path,) = (tmp_path / "quickstart").iterdir()
    start = [f"start_from={path}", "eval_start=true", "max_steps=0", f"runtime.runs={tmp_path / 'more'}"]
    assert main("quickstart", "", "", [*words, "method.count=3", *start]) == 2
    assert "other shapes of snapshots" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"epochs": [3]}, {"epochs": [2, 1]}, {"epochs": []}])
def test_snapshots_that_the_run_does_not_have_are_refused(changes):
    with pytest.raises(ValueError, match="expected snapshots after different steps from 1 to 10"):
        snapshots(**changes).prepare(Setting(network, 10, 5))


# -- from run folders to the table ------------------------------------------------------------------

TOY = ["data=digits", "model.depth=8", "model.width=8", "epochs=1", "schedule.warmup_epochs=0", "runtime.gpus=0"]
QUIET = ["runtime.progress=false", "runtime.threads=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for choices in (
        ["method=vanilla"],
        ["method=vanilla", "seed=1"],
        ["method=line", "method.points=3"],
        ["method=line", "method.points=3", "seed=1"],
        ["method=simplex", "method.endpoints=2", "method.members=2"],
        ["method=swa", "method.count=2", "method.points=0", "schedule.policy=swa_constant_lr"],
    ):
        assert main("subspaces", "", "", [*TOY, *QUIET, f"runtime.runs={folder}", *choices]) == 0
    return folder


def _result(runs, words):
    (path,) = [path for path in (runs / "subspaces").iterdir() if words in path.name]
    return path, json.loads((path / "result.json").read_text())["metrics"]


def test_table_has_each_method_and_ensembles_of_runs(runs, tmp_path, capsys):
    assert report.main(["--runs", str(runs), "--out", str(tmp_path), "--no-cache"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {(line[0], line[1]): line for line in lines}
    own = [_result(runs, f"-vanilla-s{seed}")[1]["test/top1"] for seed in (0, 1)]
    assert rows["standard training", "result"][2:4] == ["2", f"{np.mean(own):.2f} ± {np.std(own, ddof=1):.2f}"]
    files = [np.load(_result(runs, f"-vanilla-s{seed}")[0] / "outputs.npz") for seed in (0, 1)]
    hits = sum(file["scores"] for file in files).argmax(1) == files[0]["labels"]
    assert rows["standard training", "2 runs together"][3] == f"{100 * hits.mean():.2f}"
    assert own[0] == pytest.approx(100 * (files[0]["scores"].argmax(1) == files[0]["labels"]).mean())
    pairs = [_result(runs, f"-line1-s{seed}")[1]["pair/0/total_variation"] for seed in (0, 1)]
    assert rows["line", "both ends together"][5] == f"{np.mean(pairs):.4f} ± {np.std(pairs, ddof=1):.4f}"
    assert ("simplex of 2", "random points together") in rows
    assert ("swa, swa_constant_lr", "mean of snapshots (SWA)") in rows
    names = {path.name for path in tmp_path.iterdir()}
    assert {name.split("_")[0] for name in names} == {"figure4", "figure5"}


def test_a_run_without_a_step_evaluates_what_it_starts_from(runs, tmp_path, capsys):
    path, before = _result(runs, "-line1-s0")
    words = [*TOY, *QUIET, "method=line", "method.points=3", f"start_from={path}", "eval_start=true", "max_steps=0"]
    for corruption in ([], ["data.corruption=gaussian_noise", "data.severity=5"]):
        assert main("subspaces", "", "", [*words, f"runtime.runs={tmp_path}", *corruption]) == 0
    found = [
        json.loads(file.read_text()) for file in sorted(tmp_path.rglob("result.json"), key=lambda f: f.stat().st_mtime)
    ]
    again, corrupted = (result["metrics"] for result in found)
    assert {result["steps"] for result in found} == {0}
    for tag, value in before.items():
        if not tag.startswith(("time/", "memory/")):
            assert again[tag] == pytest.approx(value, abs=1e-4), tag
    assert corrupted["test/loss"] != again["test/loss"]
    capsys.readouterr()
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "figures"), "--no-cache"]) == 0
    assert "corruption gaussian_noise, severity 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("grid", "count"),
    [
        ("subspaces_cifar10", 9),
        ("subspaces_cifar10_simplexes", 20),
        ("subspaces_cifar10_averages", 4),
        ("subspaces_cifar10_noise", 18),
        ("subspaces_tiny_imagenet", 12),
        ("subspaces_tiny_imagenet_simplexes", 20),
        ("subspaces_imagenet", 9),
    ],
)
def test_grids_have_the_originals_numbers(grid, count):
    """(epochs, batch, weight decay) of apple/learning-subspaces' experiment_configs."""
    configs = plan("subspaces", grid, {})
    assert len(configs) == count
    large = grid.endswith("imagenet") and "tiny" not in grid
    numbers = {(c.epochs, c.batch_size, c.optim["weight_decay"]) for c in configs}
    assert numbers == ({(200, 256, 5e-5)} if large else {(160, 128, 1e-4)})
    assert {(c.optim["lr"], c.optim["momentum"], c.schedule["warmup_epochs"]) for c in configs} == {(0.1, 0.9, 5)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.beta=-1.0"], "beta to be 0 or more and finite, got -1"),
        (["method.num_samples=0"], "num_samples to be at least 1, got 0"),
        (["method.points=1"], "points to be 0 or at least 2"),
        (["method.cosine=round"], "cosine to be squared or absolute, got 'round'"),
        (["method.endpoints=3"], "expected 2 endpoints for a line, got 3"),
        (["method=simplex", "method.endpoints=0"], "a simplex of 1 endpoint or more, got 0"),
        (["method=swa", "method.start=1.0"], "expected count of 1 or more"),
        (["max_steps=0"], "max_steps to be at least 1 or null, got 0"),
    ],
)
def test_bad_values_are_one_sentence(changes, message, tmp_path, capsys):
    assert main("subspaces", "", "", [*TOY, *QUIET, f"runtime.runs={tmp_path}", *changes]) == 2
    assert message in capsys.readouterr().err


def test_the_regulariser_has_a_gradient_at_the_start_only_if_absolute():
    config = compose_config("subspaces", {"method": "line"})
    assert config.method["cosine"] == "squared"
    lengths = {}
    for name in ("squared", "absolute"):
        method = subspace(cosine=name)
        model = applied(method)
        method.before_step(model, 0)
        method.penalty(model).backward()
        lengths[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    cosine = squared_cosine(model, 0, 1).sqrt().item()
    assert lengths["squared"] == pytest.approx(2 * cosine * lengths["absolute"], rel=1e-5)


def test_curves_of_every_evaluation_are_logged(tmp_path):
    config = tiny_config(tmp_path, method="line", method__points=3, **RESNET)
    _train(tmp_path, method="line", method__points=3, **RESNET)
    found = _scalars(config)
    assert [epoch for epoch, _ in found["subspace/squared_cosine"]] == [1, 2]
    assert [epoch for epoch, _ in found["path/0.5/top1"]] == [2]
    assert found["path/0.5/top1"][-1][1] == found["test/top1"][-1][1]


# -- export -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--alpha", "0"], ["--alpha", "1"], []])
def test_an_exported_point_is_a_plain_network_that_does_as_well(runs, tmp_path, words):
    path, metrics = _result(runs, "-line1-s0")
    tag = {0: "test", 1: f"path/{words[-1]}"}[len(words) // 2] if words else "test"
    assert export_point.main([str(path), *words, "--out", str(tmp_path / "point.pt")]) == 0
    start = ["method=vanilla", f"start_from={tmp_path / 'point.pt'}", "eval_start=true", "max_steps=0"]
    assert main("subspaces", "", "", [*TOY, *QUIET, *start, f"runtime.runs={tmp_path}"]) == 0
    (file,) = tmp_path.rglob("result.json")
    assert json.loads(file.read_text())["metrics"]["test/loss"] == pytest.approx(metrics[f"{tag}/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-vanilla-s0"], "expected a run with method=line, curve or simplex, got vanilla"),
        (["-line1-s0", "--alpha", "0.1", "0.2"], "--alpha: expected 1 numbers for a point of Line(), got 2"),
        (["-line1-s0", "--out", "/proc/no/file.pt"], "expected --out to be a place to write to"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(runs, tmp_path, words, message, capsys):
    path, _ = _result(runs, words[0])
    assert export_point.main([str(path), "--out", str(tmp_path / "x.pt"), *words[1:]]) == 2
    assert message in capsys.readouterr().err
    assert export_point.main([str(tmp_path / "none"), "--out", str(tmp_path / "x.pt")]) == 2
    assert not (tmp_path / "x.pt").exists()
