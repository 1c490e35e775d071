"""The benchmarks of layers, steps and checkpoints run, and say of every bar whether it holds."""

import json

import pytest
import torch

from benchmarks import checkpoints, layer, step
from benchmarks.interleaved import compared, peak_bytes, take_turns


def test_the_layer_benchmark_measures_every_case_that_is_asked_for(tmp_path, capsys):
    out = tmp_path / "layers.json"
    names = ["ViT tokens", "audio, Conv1d k10 s5"]
    given = ["--cases", *names, "--turns", "2", "--scale", "0.05", "--json", str(out)]
    assert layer.main(given) == 0
    table = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [ratio["case"] for ratio in found["ratios"] if ratio["against"] == "plain"] == names
    assert all(f"| {name} |" in table for name in names)
    assert all(ratio["ratio"] > 0 and ratio["n"] == 2 for ratio in found["ratios"])
    assert all(errors["moment"] < 1e-6 for errors in found["errors"].values())


def test_the_step_benchmark_measures_a_recipes_step(tmp_path, capsys):
    out = tmp_path / "steps.json"
    assert step.main(["--settings", "cifar_resnet", "--steps", "2", "--batch-size", "2", "--json", str(out)]) == 0
    (ratio,) = json.loads(out.read_text())["ratios"]
    assert ratio["case"] == "cifar_resnet"
    assert "of 1 bars hold" in capsys.readouterr().out


def test_the_peak_is_what_is_held_at_one_time():
    def run():
        for _ in range(3):
            torch.empty(2**20, dtype=torch.uint8)
        both = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**21, dtype=torch.uint8)
        del both

    assert peak_bytes(run, torch.device("cpu")) == 3 * 2**20


def test_a_ratio_is_of_medians_and_its_quartiles_are_of_turns():
    ratio = compared("case", {"ours": [2.0, 3.0, 9.0], "plain": [1.0, 2.0, 3.0]}, "ours", "plain", 1.4)
    assert ratio.ratio == 1.5
    assert (ratio.low, ratio.high) == (1.5, 3.0)
    assert ratio.holds is False


@pytest.mark.parametrize("turns", [1, 4])
def test_contenders_take_turns_in_alternating_order_after_one_uncounted_turn(turns):
    order = []
    seconds = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, turns, torch.device("cpu"))
    assert "".join(order) == "abbaabbaab"[: 2 * (turns + 1)]
    assert {name: len(each) for name, each in seconds.items()} == {"a": turns, "b": turns}


def test_the_checkpoint_benchmark_writes_what_a_run_writes(tmp_path, capsys):
    assert checkpoints.main(["--settings", "quickstart", "--repeat", "1", "--folder", str(tmp_path)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| quickstart")]
    assert row.split("|")[-2].strip().endswith("%")
    assert not list(tmp_path.iterdir())
