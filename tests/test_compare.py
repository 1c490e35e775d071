"""The comparison of all methods: what runs share, what tuning decides, what is counted, and the way to the table."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch

from analysis import compare as report
from analysis import report as page
from analysis import tables
from analysis.grouping import method_labels
from analysis.load import load_runs
from experiments import tuning
from experiments.config import compose_config, folder_of, run_name, to_tree
from experiments.grid import load_grid, plan
from experiments.ranks import Ranks
from experiments.training.assembly import build_trainer, load_data
from experiments.training.log import RunLog
from experiments.training.run import run
from experiments.training.stop import StopRequest
from runfolder.errors import UserError
from slurm.command import main
from tests.cases import METHODS, METHODS_AND_MODELS, tiny_config
from tests.test_experiments_loop import _scalars, _train
from tract.oialr.layers import counts

TINY = {"model.width": 8, "epochs": 2, "batch_size": 256, "runtime.progress": False, "runtime.threads": 1}
NETWORK = "resnet_small on digits"
TINY |= {"recipe.rates": [0.003, 0.01], "recipe.tuning_seeds": [100], "recipe.seconds": 0.5}


def trainer_of(config):
    arguments = Ranks(), torch.device("cpu"), StopRequest(None), RunLog(), lambda step, state: None
    return build_trainer(config, load_data(config, Ranks()), *arguments)


# -- what all methods have alike ----------------------------------------------------------------------


@pytest.mark.parametrize(("method", "model"), [pair for pair in METHODS_AND_MODELS if pair[0] != "vanilla"])
def test_all_methods_have_the_same_batches_and_begin_with_the_same_weights(method, model, tmp_path):
    changes = {"model": model, "model__width": 8, "validation_images": 37, "seed": 3}
    plain, other = (trainer_of(tiny_config(tmp_path, method=name, **changes)) for name in ("vanilla", method))
    for epoch in (0, 1):
        batches = zip(plain.batches.train(epoch), other.batches.train(epoch), strict=True)
        assert all(torch.equal(a, b) for one, its in batches for a, b in zip(one, its, strict=True))
    own = list(other.model.state_dict().values())
    missing = {
        name
        for name, tensor in plain.model.state_dict().items()
        if not any(tensor.shape == found.shape and torch.equal(tensor, found) for found in own)
    }
    first = {"emb.weight", "conv1.weight"} & plain.model.state_dict().keys()
    assert missing == (first if method == "whitening" else set())


@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_grids_search_the_rates_that_the_recipe_chooses_from_on_seeds_of_their_own(model):
    recipe = compose_config("compare", {})
    search, final = load_grid(f"compare_{model}_tune"), load_grid(f"compare_{model}")
    tree = tuning.config._compose_groups(tuning.config.CONF, "compare", ()).recipe
    assert search["axes"]["optim.lr"] == list(tree.searched.adam)
    assert search["axes"]["seed"] == list(tree.tuning_seeds)
    assert not set(search["axes"]["seed"]) & set(final["axes"]["seed"])
    assert len(final["axes"]["seed"]) >= 5
    assert search["axes"]["arm"] == final["axes"]["arm"]
    assert recipe.drop_last


# -- what tuning decides ------------------------------------------------------------------------------


def results(**by_rate):
    """{rate: results}: of each seed (top-1, loss) on the images held out, or None."""
    return {
        float(rate): [
            pair
            and {
                "primary_metric": "test/top1",
                "metrics": {"val/top1": pair[0], "val/loss": pair[1], "test/top1": -pair[0]},
            }
            for pair in pairs
        ]
        for rate, pairs in by_rate.items()
    }


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ({"0.1": [(90, 1), (92, 1)], "0.2": [(96, 1), (80, 1)], "0.3": [(90, 0), (91, 0)]}, 0.1),  # mean, not the best
        ({"0.1": [(90, 0.5)], "0.2": [(90, 0.4)], "0.3": [(89, 0.1)]}, 0.2),  # then the loss
        ({"0.3": [(90, 0.5)], "0.1": [(90, 0.5)]}, 0.1),  # then the lower rate
        ({"0.1": [(50, 2), (50, 2)], "0.2": [(99, 0), None]}, 0.1),  # not finite with one seed
    ],
)
def test_the_rate_is_the_one_with_the_best_mean_on_the_images_held_out(found, best):
    assert tuning.best_rate(results(**found)) == best


def test_of_an_error_the_smallest_is_best():
    found = results(**{"0.1": [(9, 1), (8, 1)], "0.2": [(3, 2), (4, 2)]})
    for result in (result for own in found.values() for result in own):
        result["primary_metric"] = "test/error"
        result["metrics"]["val/error"] = result["metrics"].pop("val/top1")
    assert tuning.best_rate(found) == 0.2


def test_no_rate_that_trains_is_one_sentence():
    with pytest.raises(UserError, match="not finite with all of 0.1, 0.2; tune with lower ones"):
        tuning.best_rate(results(**{"0.1": [None], "0.2": [None]}))


def written(folder, scores, seconds_per_step=0.01, **choices):
    """Tuning runs of one arm as their results alone: {rate: (top-1, loss)}, or None where numbers were not finite."""
    for rate, pair in scores.items():
        point = TINY | {"runtime.runs": str(folder), "stage": "tune", "optim.lr": rate, "seed": 100} | choices
        place = folder_of(compose_config("compare", point))
        place.path.mkdir(parents=True)
        if pair is None:
            place.failure.write_text(json.dumps({"kind": "non-finite"}))
            continue
        (own,) = results(**{str(rate): [pair]}).values()
        steps = {"steps": 8, "epochs": 2, "train_seconds": 8 * seconds_per_step}
        place.result.write_text(json.dumps(own[0] | steps))


def final(folder, **choices):
    return compose_config("compare", TINY | {"runtime.runs": str(folder), "stage": "final"} | choices)


def test_a_final_run_takes_over_its_rate_and_its_steps_as_plain_numbers(tmp_path, caplog):
    caplog.set_level("INFO", "experiments.tuning")
    written(tmp_path, {0.003: (90, 1), 0.01: (80, 1)}, seconds_per_step=0.03)
    by_images = final(tmp_path)
    assert (by_images.optim["lr"], by_images.max_steps, by_images.epochs) == (0.003, None, 2)
    assert (by_images.validation_images, by_images.budget_seconds) == (0, None)
    assert "optim.lr=0.003 (of 0.003 90.00, 0.01 80.00; held-out images" in caplog.text
    seconds = {"recipe.budget": "seconds"}
    written(tmp_path, {0.003: (80, 1), 0.01: (90, 1)}, **seconds)
    by_seconds = final(tmp_path, **seconds)
    steps = math.floor(0.5 / 0.03)
    assert (by_seconds.optim["lr"], by_seconds.max_steps, by_seconds.epochs) == (0.01, steps, math.ceil(steps / 4))
    assert (by_seconds.validation_images, by_seconds.budget_seconds) == (0, 0.5)
    for config in (by_images, by_seconds):
        assert "tun" not in json.dumps(to_tree(config) | {"runtime": None})


def test_the_speed_is_that_of_the_fastest_tuning_run_by_images(tmp_path):
    for rate, speed in ((0.003, 0.03), (0.01, 0.02), (0.03, 0.5)):
        written(tmp_path, {rate: (90, 1)}, speed, **{"recipe.rates": [0.003, 0.01, 0.03]})
    point = {"recipe.rates": [0.003, 0.01, 0.03], "recipe.budget": "seconds", "stage": "tune", "optim.lr": 0.01}
    assert final(tmp_path, **point).max_steps == math.floor(0.5 / 0.02)
    with pytest.raises(UserError, match=r"expected recipe.seconds to be enough for a step, got 0.01, .* takes 0.02 s"):
        final(tmp_path, **point | {"recipe.seconds": 0.01})


def test_each_method_network_and_budget_has_a_tuning_of_its_own(tmp_path):
    written(tmp_path, {0.003: (90, 1), 0.01: (80, 1)})
    written(tmp_path, {0.003: None, 0.01: (10, 1)}, method="tract")
    assert [final(tmp_path, method=name).optim["lr"] for name in ("vanilla", "tract")] == [0.003, 0.01]
    for other in ({"model": "vit_small"}, {"method.lambda_": 0.2, "method": "tract"}, {"recipe.budget": "seconds"}):
        with pytest.raises(tuning.UntunedError):
            final(tmp_path, **other)
    assert final(tmp_path, **{"optim.lr": 0.5}).optim["lr"] == 0.5


def test_tuning_that_is_missing_is_named_run_by_run_for_the_whole_plan(tmp_path, capsys):
    written(tmp_path, {0.003: (90, 1), 0.01: (80, 1)})
    words = [f"{key}={value}".replace("'", "").replace(" ", "") for key, value in TINY.items()]
    words += [f"runtime.runs={tmp_path}", "method=vanilla,tract,whitening", "recipe.budget=images"]
    assert main("compare", "", "compare_resnet", ["--dry-run", *words]) == 2
    said = capsys.readouterr().err
    point = TINY | {"runtime.runs": str(tmp_path), "stage": "tune", "seed": 100}
    names = [
        run_name(compose_config("compare", point | {"method": method, "optim.lr": rate}))
        for method in ("tract", "whitening")
        for rate in (0.003, 0.01)
    ]
    assert f"got 4 that are not: {', '.join(names)}; make them first" in said
    assert said.count("\n") == 1
    for method in ("tract", "whitening"):
        written(tmp_path, {0.003: (90, 1), 0.01: (80, 1)}, method=method)
    assert main("compare", "", "compare_resnet", ["--dry-run", *words]) == 0
    shown = capsys.readouterr().out
    assert "15 runs: 15 missing" in shown
    assert "note: without patchnorm and dual_patchnorm, which normalise patches" in shown


def test_a_run_that_failed_otherwise_is_not_finished(tmp_path):
    written(tmp_path, {0.003: (90, 1), 0.01: None})
    assert final(tmp_path).optim["lr"] == 0.003
    (failure,) = tmp_path.rglob("failure.json")
    failure.write_text(json.dumps({"kind": "node"}))
    with pytest.raises(tuning.UntunedError, match="got 1 that are not"):
        final(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe.budget=hours"], "expected recipe.budget to be images or seconds, got 'hours'"),
        (["stage=tune", "data=flowers102", "runtime.gpus=0"], "this recipe has no validation_images for flowers102"),
        (
            ["stage=final", "optim=sgd", "optim.lr=0.1", "recipe.budget=seconds"],
            "this recipe has no recipe.rates for sgd",
        ),
        (["budget_seconds=0"], "expected budget_seconds to be above 0 or null, got 0"),
    ],
)
def test_bad_values_are_one_sentence(words, message, tmp_path, capsys):
    assert main("compare", "", "", [*words, f"runtime.runs={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# -- what is counted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_state_are_those_of_the_network_and_of_the_checkpoint(method, tmp_path):
    config, result, state = _train(tmp_path, method=method, max_steps=3)
    found = {tag: values[-1][1] for tag, values in _scalars(config).items() if tag.startswith("model/")}
    network = tiny_config(tmp_path, method=method)
    plain = sum(tensor.numel() for tensor in trainer_of(tiny_config(tmp_path)).model.parameters())
    trainer = trainer_of(network)
    trainer.method.match(trainer.model, state["model"])
    frozen = set(state["frozen"])
    names = [name for name, _ in trainer.model.named_parameters()]
    trainable = sum(state["model"][name].numel() for name in names if name not in frozen)
    kept = list(state["model"].values())
    kept += [t for own in state["optimizer"]["state"].values() for t in own.values() if isinstance(t, torch.Tensor)]
    assert found["model/parameters_trainable"] == trainable
    expected = plain + {"dual_patchnorm": 2 * 4 + 2 * 16}.get(method, 0)
    if method == "oialr":
        expected = counts(trainer.model)["inference"]
    assert found["model/parameters_inference"] == expected
    assert found["model/state_bytes"] == sum(t.numel() * t.element_size() for t in kept)
    assert 0 < result["train_seconds"] <= result["seconds"]


# -- from run folders to the table --------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two methods by both budgets, two seeds, after their tuning: from the grids, in the order of the docstring."""
    folder = tmp_path_factory.mktemp("runs")
    choices = {key: [value] for key, value in TINY.items() if key not in ("recipe.rates", "recipe.tuning_seeds")}
    choices |= {"runtime.runs": [str(folder)], "method": ["vanilla", "whitening"]}
    lists = {"recipe.rates": [[0.003, 0.01]], "recipe.tuning_seeds": [[100]]}
    search = {"optim.lr": [0.003, 0.01], "seed": [100]}
    for grid, more in (
        ("compare_resnet_tune", search),
        ("compare_resnet_tune", search | {"recipe.budget": ["seconds"]}),
        ("compare_resnet", {"seed": [0, 1]}),
    ):
        for config in plan("compare", grid, choices | lists | more):
            result = run(config)
            if more is search:  # no test depends on a clock: one method is slower than the other
                result["train_seconds"] = result["steps"] * {"vanilla": 0.02, "whitening": 0.05}[config.method["name"]]
                folder_of(config).result.write_text(json.dumps(result))
    return folder


def _results(runs):
    """[(configuration, result, final scalars)] of every run."""
    found = []
    for own in load_runs(runs, "compare")["compare"]:
        assert own.usable, own.problems
        found.append((own.config, own.result, {tag: own.final_value(tag) for tag in own.events.series}))
    return found


def test_the_table_has_what_the_folders_say(runs, tmp_path, capsys):
    assert report.main(["--runs", str(runs), "--out", str(tmp_path), "--no-cache", "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    lines = {(line["budget"], line["method"]): line for line in content["lines"]}
    assert list(lines) == [(b, m) for b in ("0.5 s", "2 epochs") for m in ("vanilla", "whitening")]
    every = _results(runs)
    for (budget, method), line in lines.items():
        of_budget = [r for r in every if ("budget_seconds" in r[0]) == (budget == "0.5 s")]
        of_arm = [r for r in of_budget if r[0]["method"]["name"] == method]
        own = [r for r in of_arm if "validation_images" not in r[0]]
        tuned = [r for r in of_arm if "validation_images" in r[0]]
        top1 = [result["metrics"]["test/top1"] for _, result, _ in own]
        assert (line["n"], line["seeds"]) == (2, [0, 1])
        assert (line["mean"], line["std"]) == pytest.approx((np.mean(top1), np.std(top1, ddof=1)), abs=1e-5)  # float32
        held = {c["optim"]["lr"]: (r["metrics"]["val/top1"], -r["metrics"]["val/loss"]) for c, r, _ in tuned}
        assert line["rates"] == [max(held, key=held.get)]
        assert {c["optim"]["lr"] for c, _, _ in own} == set(line["rates"])
        assert line["tuning_runs"] == len(tuned) == 2
        assert line["tuning_seconds"] == pytest.approx(sum(r["seconds"] for _, r, _ in tuned))
        assert line["steps"] == sorted({r["steps"] for _, r, _ in own})
        assert line["images"] == own[0][1]["steps"] * 256
        seconds = [scalars["time/train_seconds"] for _, _, scalars in own]
        assert line["seconds_mean"] == pytest.approx(np.mean(seconds))
        assert line["per_step_mean"] == pytest.approx(np.mean(seconds) / own[0][1]["steps"])
        for name, tag in (("trainable", "parameters_trainable"), ("inference", "parameters_inference")):
            assert line[name] == own[0][2][f"model/{tag}"]
    for budget in ("0.5 s", "2 epochs"):
        plain, other = (lines[budget, method] for method in ("vanilla", "whitening"))
        assert plain["difference_mean"] is None
        differences = np.subtract(other["values"], plain["values"])
        assert other["difference_mean"] == pytest.approx(differences.mean())
        assert plain["extra_bytes"] == 0
        # no moments for 8 * 9 frozen numbers, nor for their number of steps
        assert other["extra_bytes"] == -(2 * 4 * 72 + 4)
    assert any("lowest or highest tried" in sentence for sentence in content["named"])
    assert any("without patchnorm and dual_patchnorm" in sentence for sentence in content["named"])
    assert not any("several times" in sentence for sentence in content["named"])  # as tuning runs would be


def test_a_budget_in_seconds_is_as_many_steps_as_the_tuning_by_images_says(runs):
    every = _results(runs)
    for method in ("vanilla", "whitening"):
        own = [(c, r) for c, r, _ in every if c["method"]["name"] == method]
        tuned = [r for c, r in own if "validation_images" in c and c["max_steps"] is None]
        speeds = [r["train_seconds"] / r["steps"] for r in tuned]
        steps = {r["steps"] for c, r in own if "budget_seconds" in c}
        assert steps == {math.floor(0.5 / min(speeds))}


@pytest.mark.parametrize("form", ["md", "latex", "csv"])
def test_every_format_has_every_line(form, runs, tmp_path, capsys):
    assert report.main(["--runs", str(runs), "--out", str(tmp_path), "--no-cache", "--format", form]) == 0
    said = capsys.readouterr()
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(said.out)))
        assert [(row["method"], row["n"]) for row in rows] == 2 * [("vanilla", "2"), ("whitening", "2")]
        assert "lowest or highest tried" in said.err
    else:
        lines = [line.replace("\\", "") for line in said.out.splitlines() if line[:1] in "|r"]
        assert sum("resnet_small on digits" in line and "whitening" in line for line in lines) == 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".pdf"}


def test_the_plot_ends_where_the_runs_do(runs):
    comparison = report.compare(load_runs(runs, "compare")["compare"])
    ((_, figure),) = report.draw(comparison).items()
    seconds, images = figure.axes
    for axes, budget in ((seconds, "0.5 s"), (images, "2 epochs")):
        lines = {line.method: line for line in comparison.lines if line.budget == budget}
        for drawn in axes.lines:
            line = lines[drawn.get_label().split(" ")[0]]
            end = line.seconds.mean if axes is seconds else line.images
            assert drawn.get_xdata()[-1] == pytest.approx(end, rel=1e-6)
            assert drawn.get_ydata()[-1] == pytest.approx(line.cell.summary.mean)
        assert len(axes.lines) == 2


def test_the_report_and_the_general_table_know_the_comparison(runs, tmp_path, capsys):
    assert page.main(["--runs", str(runs), "--out", str(tmp_path / "page.html"), "--no-cache"]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "Comparison of all methods" in text
    assert "extra state" in text
    capsys.readouterr()
    assert tables.main(["--runs", str(runs), "--experiment", "compare", "--no-cache"]) == 0
    said = capsys.readouterr().out
    assert "2 epochs" in said
    assert "validation_images" not in said
    assert "(2)" in said
    assert "missing" not in said


def test_runs_of_several_tunings_in_one_cell_are_named(runs, tmp_path):
    config = compose_config("compare", TINY | {"runtime.runs": str(tmp_path), "optim.lr": 0.02, "seed": 2})
    run(config)
    found = load_runs(runs, "compare")["compare"] + load_runs(tmp_path, "compare")["compare"]
    named = report.compare(found).named
    assert any(f"vanilla, {NETWORK}, 2 epochs: runs of several rates" in sentence for sentence in named)


def test_a_method_that_a_network_goes_without_is_not_missing_there(runs, tmp_path):
    run(compose_config("compare", TINY | {"runtime.runs": str(tmp_path), "model": "vit_small", "method": "patchnorm"}))
    found = load_runs(runs, "compare")["compare"] + load_runs(tmp_path, "compare")["compare"]
    assert not any(sentence.startswith("missing: patchnorm") for sentence in report.compare(found).named)


def test_the_seed_of_a_method_makes_no_label_of_its_own():
    assert method_labels([{"name": "line", "seed": seed} for seed in (0, 1)]) == ["line", "line"]
