import json
import re

import pytest
import torch

from experiments import runtime
from experiments.config import options_of
from experiments.models import build_model
from experiments.runtime import SETTINGS, Sizes, Timing, main, measure, row
from experiments.training.loop import Trainer
from tract import TrActLayer

SMALL = ["quickstart", "model=vit_small", "model.width=8", "model.depth=1", "model.heads=2", "batch_size=4"]
SIZES = Sizes(blocks=3, steps=2, warmup=1, batches=2)
CHANGES = {"model": "vit_small", "model.width": 8, "model.depth": 1, "model.heads": 2, "batch_size": 4}


def test_blocks_of_the_loops_own_steps_take_turns_after_the_warm_up(monkeypatch):
    step, steps, clock = Trainer.step, [], iter(range(1000))

    def noted(trainer, batch, count):
        steps.append("tract" if any(isinstance(m, TrActLayer) for m in trainer.model.modules()) else "vanilla")
        assert (*map(len, batch), count) == (4, 4, 4)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        step(trainer, batch, count)
        assert not all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))

    monkeypatch.setattr(Trainer, "step", noted)
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(clock) ** 2)
    timing, config = measure(SETTINGS["quickstart"], CHANGES, SIZES)
    assert steps == ["vanilla", "tract"] + 3 * (2 * ["vanilla"] + 2 * ["tract"])
    assert config.method["name"] == "vanilla"
    # The clock is asked at 0, 1, 4, 9, ...: differences 1, 5 (warm-up), 9, 13, 17, ..., for two steps each.
    assert timing == Timing([9 / 2, 17 / 2, 25 / 2], [13 / 2, 21 / 2, 29 / 2])


def test_the_ratio_is_that_of_medians_and_its_quartiles_those_of_neighbours():
    timing = Timing([1.0, 2.0, 4.0], [2.0, 3.0, 4.0])
    assert timing.ratio() == 1.5
    assert timing.ratio_quartiles() == (1.25, 1.75)  # of 1, 1.5 and 2
    config = runtime.compose_config("cifar_vit", {})
    assert row("cifar_vit", timing, config) == (
        "| cifar_vit | 128 | 2000.00 [1500.00, 3000.00] | 3000.00 [2500.00, 3500.00] | 1.500 [1.250, 1.750] | 1.097 |"
    )


def test_the_table_and_the_file_say_how_it_was_measured(tmp_path, capsys):
    out = tmp_path / "new" / "runtime.json"
    words = [*SMALL, "runtime.threads=1", "--blocks", "3", "--steps", "2", "--warmup", "1", "--batches", "2"]
    assert main([*words, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\| quickstart \| 4 \| \d+\.\d\d \[.*\] \| .* \| \d\.\d{3} \[.*\] \| – \|", text)
    for part in ("3 blocks of 2 steps", f"torch {torch.__version__.split('+')[0]}", "1 CPU threads", "fp32"):
        assert part in text
    content = json.loads(out.read_text())
    measured = content["settings"]["quickstart"]
    assert [len(measured[method]) for method in ("vanilla", "tract")] == [3, 3]
    assert measured["ratio"] == Timing(measured["vanilla"], measured["tract"]).ratio()
    assert measured["config"]["batch_size"] == 4
    assert content["sizes"] == {"blocks": 3, "steps": 2, "warmup": 1, "batches": 2}
    assert {"torch", "python"} <= content["packages"].keys()
    assert {"device", "threads"} <= content["hardware"].keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_network_for_its_images(name):
    setting = SETTINGS[name]
    config = runtime.compose_config(setting.experiment, setting.changes | {"method": "tract"})
    sizes = {"in_channels": setting.channels, "image_size": setting.image_size}
    with torch.device("meta"):
        model = build_model(config.model["name"], setting.classes, **sizes, **options_of(config.model))
        scores = model(torch.empty(2, setting.channels, setting.image_size, setting.image_size))
    assert scores.shape == (2, setting.classes)
    assert config.batch_size == (256 if setting.classes == 1000 else 64 if name == "quickstart" else 128)


BAD = [
    (["cifar_resnt"], "unknown setting 'cifar_resnt'; nearest: cifar_resnet"),
    (["quickstart", "method=tract"], "method is fixed by what is measured"),
    (["quickstart", "data=cifar10"], "data is fixed by what is measured"),
    (["deit_small", "stage=finetune"], "stage is fixed by what is measured"),
    (["quickstart", "epoch=3"], "unknown key epoch"),
    (["quickstart", "seed=0,1"], "seed has 2 values"),
    (["--blocks", "1"], "expected --blocks to be at least 2, got 1"),
    (["--steps", "0"], "expected --steps to be at least 1, got 0"),
]


@pytest.mark.parametrize(("words", "part"), BAD)
def test_bad_input_is_one_sentence(words, part, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err
