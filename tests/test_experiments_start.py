"""Beginning with the weights of another run: fine-tuning, transfer, and the order in which a grid is trained."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from experiments.config import compose_config, config_hash, folder_of, prepare_folder, run_name
from experiments.models import build_model
from experiments.training.checkpoint import Keeper
from experiments.training.start import load_start
from runfolder.errors import UserError
from runfolder.folder import RunFolder
from slurm.command import main
from tests.cases import tiny_config

SMALL = {"model.width": 24, "model.depth": 2, "model.heads": 3, "model.patch": 8, "data.image_size": 16}
QUICK = {"batch_size": 8, "max_steps": 2, "precision": "bf16", "eval_batch_size": 8, "runtime.workers": 0}


def words(settings: dict) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture
def images(tmp_path) -> Path:
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("n00000001", "n00000002"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (20, 24, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    return tmp_path / "images"


def test_pre_training_and_fine_tuning_are_one_grid(images, tmp_path, capsys):
    """Given in the wrong order, fine-tuning comes second all the same, and starts from the weights that came out."""
    settings = {"data": "imagefolder", "data.root": images, "data.mean": "[0.5,0.5,0.5]", "data.std": "[0.3,0.3,0.3]"}
    settings |= SMALL | QUICK | {"model": "deit3_small", "method": "tract", "recipe.pretrain_epochs": 400}
    settings |= {"stage": "finetune,pretrain", "runtime.runs": tmp_path / "runs", "runtime.threads": 1}
    assert main("imagenet_deit", "", "table3", ["--local", "jobs=2", *words(settings)]) == 0
    assert "2 of 2 runs finished" in capsys.readouterr().out
    before, after = (next((tmp_path / "runs").glob(f"imagenet_deit/*-{epochs}ep-*")) for epochs in (400, 50))
    ended, began = (json.loads((folder / "provenance.json").read_text())["attempts"][0] for folder in (before, after))
    assert began["started"] >= ended["started"]
    assert f"starts from {before}" in (after / "log.txt").read_text()


# -- names --------------------------------------------------------------------------------


def test_what_a_run_starts_from():
    here = RunFolder(Path("/runs/transfer/mine-s0-01234567"))
    assert here.start(None) is None
    assert here.start("timm:deit3_small_patch16_224.fb_in1k") is None
    assert here.start("weights/a.pth") is None
    assert here.start("other-s0-89abcdef").path == Path("/runs/transfer/other-s0-89abcdef")
    assert here.start("imagenet_deit/x").path == Path("/runs/imagenet_deit/x")
    assert here.start("/elsewhere/x").path == Path("/elsewhere/x")


def test_a_stage_starts_from_the_run_of_the_same_choices():
    choices = {
        "model": "deit3_base",
        "method": "tract",
        "seed": 3,
        "recipe.pretrain_epochs": 800,
        "data.image_size": 64,
    }
    before = compose_config("imagenet_deit", choices)
    after = compose_config("imagenet_deit", choices | {"stage": "finetune"})
    assert after.start_from == run_name(before)
    assert before.start_from is None
    other = compose_config("imagenet_deit", choices | {"stage": "finetune", "method.lambda_": 0.2})
    assert other.start_from != after.start_from
    given = compose_config("imagenet_deit", choices | {"stage": "finetune", "start_from": "a.pth"})
    assert given.start_from == "a.pth"


def test_transfer_starts_from_the_run_of_the_same_method_in_another_experiment():
    choices = {"model": "deit3_small", "method": "tract", "method.lambda_": 0.2, "seed": 1}
    after = compose_config("transfer", choices | {"data": "cifar100", "optim.lr": 0.02})
    source = compose_config("imagenet_deit", choices | {"stage": "finetune", "recipe.pretrain_epochs": 800})
    assert after.start_from == f"imagenet_deit/{run_name(source)}"
    assert (after.epochs, after.data["image_size"], after.optim["lr"]) == (200, 224, 0.02)


# -- weights ------------------------------------------------------------------------------


def network(size=16, classes=5, seed=0, **options):
    torch.manual_seed(seed)
    return build_model("deit3_small", classes, image_size=size, patch=8, width=24, depth=1, heads=3, **options)


def start(tmp_path, model, content, **changes):
    torch.save(content, tmp_path / "weights.pth")
    said = []
    load_start(tiny_config(tmp_path, start_from=str(tmp_path / "weights.pth"), **changes), model, said.append)
    return said


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_weights_come_as_they_are_or_under_a_name(tmp_path, key):
    source, target = network(seed=0), network(seed=1)
    content = source.state_dict() if key is None else {key: source.state_dict()}
    (sentence,) = start(tmp_path, target, content)
    assert "fresh" not in sentence
    assert all(map(torch.equal, source.parameters(), target.parameters()))


def test_another_number_of_classes_keeps_a_fresh_classifier(tmp_path):
    source, target = network(classes=5), network(classes=7, seed=1)
    fresh = target.head.weight.clone()
    (sentence,) = start(tmp_path, target, source.state_dict())
    assert sentence.endswith("; fresh: head.weight, head.bias")
    assert torch.equal(target.head.weight, fresh)
    assert torch.equal(target.patch_embed.proj.weight, source.patch_embed.proj.weight)


def test_another_image_size_interpolates_the_position_embedding(tmp_path):
    source, target = network(size=32), network(size=48)
    start(tmp_path, target, source.state_dict())
    grid = source.pos_embed.detach().reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(6, 6), mode="bicubic", antialias=False)
    torch.testing.assert_close(target.pos_embed.detach(), expected.permute(0, 2, 3, 1).reshape(1, 36, 24))


BAD = {
    "another network's": (
        {"a.weight": torch.zeros(2)},
        "expected weights of vit_small in start_from=.*unknown a.weight",
    ),
    "no weights": ({"model": {"lr": 3}}, "expected {name: tensor}"),
    "a list": ([1, 2], "expected {name: tensor}"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_one_sentence(tmp_path, case):
    content, sentence = BAD[case]
    with pytest.raises(UserError, match=sentence):
        start(tmp_path, build_model("resnet_small", 10), content)


def test_what_is_not_there_or_not_finished_is_one_sentence(tmp_path):
    model = build_model("resnet_small", 10)
    for given, sentence in (
        (str(tmp_path / "no.pth"), "got no such file"),
        ("quickstart/none", "got one that is missing; train it first"),
        ("timm:no_such_network", "expected weights that timm can load"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            load_start(tiny_config(tmp_path, start_from=given), model, print)
    config = tiny_config(tmp_path)
    folder_of(config).path.mkdir(parents=True)
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(UserError, match="expected a checkpoint in start_from=.*text.pt, got: "):
        load_start(tiny_config(tmp_path, start_from=str(tmp_path / "text.pt")), model, print)


def test_a_checkpoint_that_does_not_have_its_checksum_is_refused(tmp_path):
    """Of a run, or given as a file; a flipped byte may be read as other weights."""
    model = build_model("resnet_small", 10)
    config = tiny_config(tmp_path)
    folder = prepare_folder(config)
    path = Keeper(folder.checkpoints, config_hash(config), 1).save(1, {"model": model.state_dict()})
    folder.result.write_text('{"metrics": {}}')
    for given in (str(path), folder.name):
        load_start(tiny_config(tmp_path, start_from=given, seed=1), build_model("resnet_small", 10), print)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x20
    path.write_bytes(content)
    for given in (str(path), folder.name):
        with pytest.raises(UserError, match=f"{path} is damaged: its .* do not have the checksum in its name"):
            load_start(tiny_config(tmp_path, start_from=given, seed=1), build_model("resnet_small", 10), print)
