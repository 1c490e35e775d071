"""ProxProp's experiments: grids, what is held out and evaluated, and the way to plots and table."""

import json

import numpy as np
import pytest
import torch

from analysis import proxprop as report
from experiments.config import compose_config
from experiments.data.batches import Batches
from experiments.data.digits import Digits
from experiments.grid import plan
from experiments.models import build_model
from experiments.ranks import Ranks
from runfolder.folder import RunFolder
from slurm.command import main
from tests.same_runs import points
from tract.methods.proxprop import ProxPropMethod

TOY = ["data=digits", "data.mean=[0.0]", "data.std=[1.0]", "model.widths=[3,4]", "batch_size=200", "runtime.gpus=0"]
QUIET = ["runtime.progress=false", "runtime.threads=1"]


def _runs(grid):
    return plan("proxprop", grid, {})


def test_grids_hold_the_papers_eight_runs():
    """Frerix et al., paper_experiments.sh: (mode, tau, rate, momentum, epochs)."""
    mlp = {
        (c.method["mode"], c.method["tau"], c.optim["lr"], c.optim["momentum"], c.epochs)
        for c in _runs("proxprop_mlp")
        if c.method["name"] == "proxprop"
    }
    assert mlp == {
        ("prox_exact", 0.05, 1.0, 0.95, 50),
        ("prox_cg3", 0.05, 1.0, 0.95, 50),
        ("prox_cg5", 0.05, 1.0, 0.95, 50),
        ("prox_cg10", 0.05, 1.0, 0.95, 50),
        ("gradient", 0.05, 0.05, 0.95, 1000),
    }
    convnet = {
        (c.method["mode"], c.method["tau"], c.optim["name"], c.optim["lr"], c.epochs)
        for c in _runs("proxprop_convnet")
        if c.method["name"] == "proxprop"
    }
    assert convnet == {
        ("gradient", 1.0, "adam", 0.001, 1000),
        ("prox_cg3", 1.0, "adam", 0.001, 50),
        ("prox_cg10", 1.0, "adam", 0.001, 50),
        ("prox_exact", 1.0, "adam", 0.001, 50),  # ours
    }
    for config in (*_runs("proxprop_mlp"), *_runs("proxprop_convnet")):
        assert (config.batch_size, config.validation_images, config.validation_from) == (500, 5000, "last")
        assert config.data["augment"] == "none"
        assert config.optim["weight_decay"] == 0


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("ranks", [1, 3])
def test_images_held_out_are_evaluated_and_never_trained_on(ranks, last):
    data = Digits(augment="none", mean=[0.0], std=[1.0], flip=False, in_memory=True).load()
    total, held = len(data.train), 100
    seen = {"train": [], "val": [], "fit": []}
    for rank in range(ranks):
        batches = Batches(
            data,
            seed=0,
            batch_size=128,
            drop_last=False,
            overfit=None,
            eval_batch_size=77,
            eval_train=True,
            validation=held,
            validation_last=last,
            workers=0,
            ranks=Ranks(rank, ranks) if ranks > 1 else Ranks(),
            device=torch.device("cpu"),
        )
        for part, batch in (
            *(("train", batch) for batch in batches.train(3)),
            *(("val", batch) for batch in batches.test("val")),
            *(("fit", batch) for batch in batches.test("fit")),
        ):
            seen[part] += [image.numpy().tobytes() for image in batch[0]]
    every = [image.numpy().tobytes() for image in (data.train.images.float() / 255)]
    numbers = np.arange(total - held, total) if last else np.arange(held) * total // held
    assert sorted(seen["val"]) == sorted(every[n] for n in numbers)
    assert sorted(seen["fit"]) == sorted(every[n] for n in set(range(total)) - set(numbers.tolist()))
    assert sorted(seen["train"]) == sorted(seen["fit"])


def test_a_part_of_the_training_images_leaves_validation_as_it_is():
    data = Digits(augment="none", mean=[0.0], std=[1.0], flip=False, in_memory=True).load()
    options = {"seed": 0, "batch_size": 50, "drop_last": False, "overfit": None, "eval_batch_size": 77, "workers": 0}
    options |= {"validation": 100, "validation_last": True, "ranks": Ranks(), "device": torch.device("cpu")}
    some, every = (Batches(data, train_images=count, eval_train=True, **options) for count in (200, None))
    assert some.steps_per_epoch == 4
    assert np.array_equal(some.evaluated["val"], every.evaluated["val"])
    assert set(some.evaluated["fit"]) < set(every.evaluated["fit"])
    assert sum(len(labels) for _, labels in some.train(0)) == sum(len(labels) for _, labels in some.plain()) == 200


def test_more_held_out_than_there_are_is_one_sentence(tmp_path, capsys):
    words = [*TOY, *QUIET, f"runtime.runs={tmp_path}", "validation_images=5000"]
    assert main("proxprop", "", "", words) == 2
    assert "validation_images below 1437, the training images, got 5000" in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for choices in (["method.mode=prox_cg3"], ["method.mode=prox_cg3", "seed=1"], ["method=vanilla"]):
        assert main("proxprop", "", "", [*TOY, *QUIET, "epochs=2", f"runtime.runs={folder}", *choices]) == 0
    return folder


def test_every_part_is_evaluated_from_before_the_first_step_on(runs):
    for path in (runs / "proxprop").iterdir():
        found = points(RunFolder(path))
        for tag in ("val/loss", "val/top1", "fit/loss", "fit/top1", "test/loss", "test/top1"):
            assert [epoch for epoch, _ in found[tag]] == [0, 1, 2]
        assert found["fit/loss"][0][1] == pytest.approx(np.log(10), rel=0.05)
        result = json.loads((path / "result.json").read_text())
        assert result["primary_metric"] == "test/top1"
        assert result["metrics"]["val/top1"] == pytest.approx(found["val/top1"][-1][1])


def test_table_and_plots_come_from_the_run_folders(runs, tmp_path, capsys):
    assert report.main(["--runs", str(runs), "--out", str(tmp_path), "--no-cache"]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = {line.split(" | ")[1]: line.split(" | ") for line in out[2:]}
    assert set(rows) == {"cg3, τ=1", "back-propagation"}
    ours = [
        json.loads((path / "result.json").read_text())["metrics"]["val/top1"]
        for path in (runs / "proxprop").iterdir()
        if "-vanilla-" not in path.name
    ]
    assert rows["cg3, τ=1"][2] == "2"
    assert rows["cg3, τ=1"][5] == f"{np.mean(ours):.2f} ± {np.std(ours, ddof=1):.2f}"
    name = "proxprop_convnet_adam_digits_200"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png", f"{name}.pdf"}


def test_the_papers_seven_plots():
    assert sum(map(len, report.PLOTS.values())) == 7


def test_a_second_run_of_one_label_and_seed_is_named_and_left_out(runs, tmp_path, capsys):
    assert main("proxprop", "", "", [*TOY, *QUIET, "epochs=1", f"runtime.runs={runs}", "method=vanilla"]) == 0
    capsys.readouterr()
    assert report.main(["--runs", str(runs), "--out", str(tmp_path), "--strict", "--no-cache"]) == 1
    assert "left out, as" in capsys.readouterr().err


def test_steps_of_single_layers():
    model = build_model("proxprop_mlp", 10, hidden=[8, 6, 4])
    method = ProxPropMethod({"layers.0": 0.05, "layers.2": 2.0}, "prox_cg2", None, "standard", "global")
    assert method.apply(model).count("ProxPropLinear") == 2
    assert [getattr(layer, "tau", None) for layer in model.layers] == [0.05, None, 2.0]
    config = compose_config("proxprop", {"model": "proxprop_convnet", "method.tau": {"layers.0": 0.5}})
    assert config.method["tau"] == {"layers.0": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.tau=0"], "tau > 0 and finite, got 0"),
        (["method.mode=prox_cg0"], "prox_cgN with N >= 1, got 'prox_cg0'"),
        (["method.layers=[nothing]"], "expected the name of a layer of ProxPropConvNet, got 'nothing'"),
        (["method.tau={layers.0:1.0}", "method.layers=[layers.0]"], "layers=null where tau names them"),
        (["validation_images=-1"], "validation_images to be 0 or more, got -1"),
    ],
)
def test_bad_values_are_one_sentence(changes, message, tmp_path, capsys):
    assert main("proxprop", "", "", [*TOY, *QUIET, f"runtime.runs={tmp_path}", *changes]) == 2
    assert message in capsys.readouterr().err
