"""The grids of figures 7, 8 and 9, the script that starts them, and that their runs can be continued."""

import dataclasses

import pytest
import torch

from experiments import ablations
from experiments.config import run_name
from experiments.data.augment import normalise
from experiments.grid import load_grid, plan
from experiments.training.loop import Trainer
from experiments.training.run import run
from runfolder.errors import UserError
from tests.cases import tiny_config
from tests.same_runs import assert_same


def _plan(name, **choices):
    return plan(load_grid(name)["experiment"], name, {key.replace("__", "."): v for key, v in choices.items()})


def _names(configs):
    return {run_name(config) for config in configs}


def test_figure_7_differs_in_the_method_alone_and_shares_runs_with_figures_4_and_6():
    configs = _plan("figure7", seed=[0])
    assert {config.epochs for config in configs} == {200}
    assert [config.method["name"] for config in configs] == ["vanilla", "patchnorm", "dual_patchnorm", "tract"]
    shared = {name for name in _names(configs) if "patchnorm" not in name}
    assert len(shared) == 2
    assert shared <= _names(_plan("figure4", seed=[0], epochs=[200]))
    assert shared <= _names(_plan("figure6", seed=[0]))


def test_figure_8_gives_the_network_numbers_from_0_to_1_and_from_0_to_255():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    lambdas = {}
    for config in _plan("figure8", seed=[0]):
        mean, std = torch.tensor(config.data["mean"]), torch.tensor(config.data["std"])
        inputs = normalise(pixels, mean, std)
        top = round(float(inputs.max()))
        torch.testing.assert_close(inputs, pixels.float() / 255 * top, rtol=1e-6, atol=0)
        lambdas.setdefault(top, []).append(config.method.get("lambda_"))
    published = [None, *(0.00625 * 2**k for k in range(8))]
    assert lambdas == {1: published, 255: published}


def test_inputs_can_be_chosen_and_what_the_grid_fixes_is_named():
    assert len(_plan("figure8", data__std=[[1.0, 1.0, 1.0]], seed=[0])) == 9
    with pytest.raises(UserError, match=r"has data.mean=\[0.5, 0.5, 0.5\]; it has \[0.0, 0.0, 0.0\]"):
        _plan("figure8", data__mean=[[0.5, 0.5, 0.5]])


def test_figure_9_differs_from_figure_3_in_the_optimizer_alone():
    configs = _plan("figure9", seed=[0])
    mixed = [config for config in configs if config.optim["name"] == "sgd_adam"]
    assert len(mixed) == 4 * 3
    assert _names(configs) - _names(mixed) == _names(_plan("figure3", optim=["adam"], seed=[0]))
    twins = {(c.epochs, c.method["lambda_"]): c for c in configs if c not in mixed and "lambda_" in c.method}
    for config in mixed:
        twin = twins[config.epochs, config.method["lambda_"]]
        assert (config.optim["lr"], config.optim["first_lr"]) == (twin.optim["lr"], 0.08)
        assert dataclasses.replace(config, optim=twin.optim) == twin


# -- the script -----------------------------------------------------------------------------------------

RUNS = {"figure6": 10, "figure7": 4, "figure8": 18, "figure9": 28}  # of each seed


@pytest.mark.parametrize("grid", [None, *RUNS])
def test_the_script_plans_every_grid(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ablations.main(["--dry-run", "seed=0", *([f"grid={grid}"] if grid else [])]) == 0
    out, count = capsys.readouterr().out, RUNS[grid or "figure7"]
    assert f"{count} runs: {count} missing" in out
    assert f"runs/{load_grid(grid or 'figure7')['experiment']}/" in out
    assert f"{5 * count} runs" in ablations.__doc__
    assert not list(tmp_path.iterdir())


def test_a_wrong_grid_or_word_is_one_sentence(capsys):
    assert ablations.main(["--dry-run", "grid=figure77"]) == 2
    assert "unknown grid 'figure77'; nearest: " in capsys.readouterr().err
    assert ablations.main(["grid=figure9"]) == 2
    assert "add --local" in capsys.readouterr().err


# -- continuing -------------------------------------------------------------------------------------------

STOPPED = {
    "patchnorm": {"method": "patchnorm"},
    "dual_patchnorm": {"method": "dual_patchnorm"},
    "sgd_adam, fp16, accumulation": {
        "method": "tract", "optim": "sgd_adam", "precision": "fp16", "micro_batch": 50, "clip_grad_norm": 0.5,
    },
}  # fmt: skip


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("case", STOPPED)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(case, tmp_path, monkeypatch, capsys):
    after_step, lives = Trainer.after_step, [2, 7, 99]

    def mortal(trainer, at_end):
        if trainer.progress.step == lives[0]:
            raise _KilledError
        after_step(trainer, at_end)

    options = STOPPED[case] | {"max_steps": 10, "runtime__checkpoint_steps": 4, "runtime__log_every": 3}
    run(tiny_config(tmp_path / "undisturbed", **options))
    monkeypatch.setattr(Trainer, "after_step", mortal)
    stopped = tiny_config(tmp_path / "stopped", **options)
    for _ in range(2):
        with pytest.raises(_KilledError):
            run(stopped)
        lives.pop(0)
    assert run(stopped)["attempts"] == 3
    assert_same(tmp_path / "stopped", tmp_path / "undisturbed", capsys)
