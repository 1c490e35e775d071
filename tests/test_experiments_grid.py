import math
import re

import pytest
import yaml

from experiments import tuning
from experiments.config import CONF, choices_of, compose_config, parse_overrides, run_name
from experiments.grid import grids, load_grid, plan, points
from experiments.training.loop import total_steps
from experiments.training.schedule import Cosine
from runfolder.errors import UserError

# Seeds, methods and epochs of section 4.1 of arXiv 2410.23970, counted by hand.
PAPER = {
    "figure3": 2 * 4 * 4 * 5,
    "figure3_lr": 4 * 8,
    "figure4": 4 * 4 * 5,
    "figure6": 10 * 5,
    "figure7": 4 * 5,
    "figure8": 2 * 9 * 5,
    "figure9": 4 * (1 + 3 + 3) * 5,
    "figure10": 2 * 4 * 4 * 5,
    "table1": 36 * 3 * 5,
    "table2": 3 * 3 * 4,
    "table2_lr": 3 * 5,
    "table3": 2 * 6,
    "table4": 4 * 2,
    "table5": 2 * 2,
    "quickstart": 2 * 2 * 3,
    # Of the relatives' own papers, see tests/test_proxprop_experiment.py, test_subspace_experiment.py and
    # test_oialr_networks.py.
    "proxprop_mlp": 5 + 1,
    "proxprop_convnet": 3 + 1 + 1,
    "subspaces_cifar10": 3 + 3 * 2,
    "subspaces_cifar10_simplexes": 5 * 2 * 2,
    "subspaces_cifar10_averages": 2 * 2,
    "subspaces_cifar10_noise": 3 * 3 * 2,
    "subspaces_tiny_imagenet": 4 * 3,
    "subspaces_tiny_imagenet_simplexes": 5 * 2 * 2,
    "subspaces_imagenet": 3 * 3,
    "oialr_cifar10_minivit": 3 * 3,
    "oialr_imagenet_vit": 2 * 2 * 3,
    "oialr_imagenet_resnet": 3 * 3,
    "oialr_imagenet_resnet50": 2 * 2 * 3,
    # Of our own comparison, see tests/test_compare.py.
    "compare_resnet_tune": 6 * 4 * 2,
    "compare_resnet": 6 * 2 * 5,
    "compare_vit_tune": 8 * 4 * 2,
    "compare_vit": 8 * 2 * 5,
}


@pytest.fixture(autouse=True)
def _tuned(monkeypatch):
    """Tuning that has been done: without run folders."""
    done = {"metrics": {"val/top1": 1.0, "val/loss": 1.0}, "train_seconds": 1.0, "steps": 10, "epochs": 2}
    monkeypatch.setattr(tuning, "_results", lambda *_: {0.01: [done]})


def _plan(name, **choices):
    return plan(load_grid(name)["experiment"], name, {key.replace("__", "."): v for key, v in choices.items()})


@pytest.mark.parametrize("name", grids())
def test_a_grid_composes_into_distinct_runs_as_many_as_it_says(name):
    configs = _plan(name)
    assert len(configs) == PAPER[name]
    assert len({run_name(config) for config in configs}) == len(configs)
    said = re.search(r"(\d+) runs", (CONF / "grid" / f"{name}.yaml").read_text().splitlines()[0])
    assert said is None or int(said[1]) == len(configs)


@pytest.mark.parametrize("name", grids())
def test_a_grid_file_has_nothing_but_what_is_read(name):
    assert set(load_grid(name)) <= {"experiment", "note", "set", "axes"}


def test_the_order_of_runs_is_that_of_nested_loops_the_last_axis_fastest():
    grid = {"axes": {"a": [1, 2], "arm": [{"b": 3}, {"b": 4, "c": 5}], "seed": [0, 1]}, "set": {"d": 6}}
    expected = [
        {"d": 6, "a": a, **arm, "seed": seed} for a in (1, 2) for arm in ({"b": 3}, {"b": 4, "c": 5}) for seed in (0, 1)
    ]
    assert points(grid, {}) == expected
    assert [run_name(c) for c in _plan("figure6", seed=[0])] == [run_name(c) for c in _plan("figure6", seed=[0])]


CHOICES = {
    "an axis is replaced": ({"seed": [7]}, 32, lambda c: c.seed == 7),
    "an arm is filtered": ({"method": ["tract"], "seed": [0]}, 24, lambda c: c.method["name"] == "tract"),
    "an arm by its value": (
        {"method.lambda_": [0.05, 0.2], "seed": [0]},
        16,
        lambda c: c.method.get("lambda_") in (0.05, 0.2),
    ),
    "a new axis": (
        {"model": ["resnet18", "resnet34"], "seed": [0]},
        64,
        lambda c: c.model["name"].startswith("resnet"),
    ),
    "a value for all": ({"optim.weight_decay": [0.5], "seed": [0]}, 32, lambda c: c.optim["weight_decay"] == 0.5),
    "several": ({"optim": ["adam"], "epochs": [50], "method": ["vanilla"]}, 5, lambda c: c.epochs == 50),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choices_select_from_the_grid(case):
    choices, count, law = CHOICES[case]
    configs = plan("cifar_resnet", "figure3", choices)
    assert len(configs) == count
    assert all(map(law, configs))


@pytest.mark.parametrize(
    ("name", "choices", "part"),
    [
        ("figure3", {"method.lambda_": [0.3]}, "it has 0.05, 0.1, 0.2"),
        ("figure3", {"method": ["vanilla"], "method.lambda_": [0.1]}, "no run of the grid"),
        ("figure6", {"epochs": [100]}, "no run of the grid has epochs=100; it has 200"),
        ("figure10", {"data": ["cifar10"]}, "it has cifar100"),
        ("figure9", {"optim": ["sgd"]}, "it has adam, sgd_adam"),
        ("figure3", {"seed": [1, 1]}, "twice"),
        ("figure3", {"model": ["vgg"]}, "unknown choice model=vgg"),
    ],
)
def test_nothing_left_or_repeated_is_an_error(name, choices, part):
    with pytest.raises(UserError, match=re.escape(part)):
        plan("cifar_resnet" if name != "figure6" else "cifar_vit", name, choices)


def test_a_grid_belongs_to_its_script():
    with pytest.raises(UserError, match="belongs to cifar_vit"):
        plan("quickstart", "figure4", {})


# -- the arithmetic of the recipes ---------------------------------------------------------------

CIFAR_STEPS = 50_000 // 128  # with drop_last


@pytest.mark.parametrize("grid", ["figure3", "figure4"])
def test_the_papers_runs_have_its_steps_and_learning_rates(grid):
    for config in _plan(grid, seed=[0]):
        assert (config.batch_size, config.drop_last, config.data["name"]) == (128, True, "cifar10")
        steps = total_steps(config, CIFAR_STEPS)
        assert steps == 390 * config.epochs
        assert config.epochs != 100 or steps == 39_000
        schedule, rate = Cosine(config.schedule["warmup_epochs"], config.schedule["final"]), config.optim["lr"]
        quarters = {0: 1, steps // 4: (1 + math.sqrt(0.5)) / 2, steps // 2: 1 / 2, steps: 0}
        found = [rate * schedule.factor(step, CIFAR_STEPS, steps) for step in quarters]
        assert found == pytest.approx([rate * share for share in quarters.values()], rel=1e-9, abs=1e-15), run_name(
            config
        )


def test_the_recipes_of_the_paper():
    resnet, vit = compose_config("cifar_resnet", {}), compose_config("cifar_vit", {})
    assert (resnet.label_smoothing, vit.label_smoothing) == (0.0, 0.1)
    assert (resnet.optim["momentum"], resnet.optim["weight_decay"], resnet.optim["nesterov"]) == (0.9, 0.0, False)
    assert (vit.optim["name"], vit.optim["weight_decay"]) == ("adam", 0.0)
    assert (resnet.model["maxpool"], resnet.model["kaiming"]) == (True, True)
    for config in (resnet, vit):
        assert config.schedule == {
            "name": "cosine",
            "_target_": "experiments.training.schedule.Cosine",
            "warmup_epochs": 0.0,
            "final": 0.0,
        }
        assert (config.data["padding"], config.data["flip"], config.data["augment"]) == (4, True, "crop_flip")
        # The standard deviation of the authors' own script.
        assert config.data["std"] == [0.2023, 0.1994, 0.2010]


def test_every_experiment_of_a_grid_has_its_file():
    experiments = {yaml.safe_load((CONF / "grid" / f"{name}.yaml").read_text())["experiment"] for name in grids()}
    assert all((CONF / f"{name}.yaml").is_file() for name in experiments)
    assert "vanilla" in choices_of("method")


def test_several_methods_at_once_are_one_value_of_the_axis():
    choices = parse_overrides(["method=vanilla,[tract,patchnorm]", "model=vit_small", "seed=0,1"])
    configs = plan("quickstart", "quickstart", choices)
    assert [(c.method["name"], c.seed) for c in configs] == [
        (name, seed) for name in ("vanilla", "tract+patchnorm") for seed in (0, 1)
    ]
