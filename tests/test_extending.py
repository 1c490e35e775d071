"""What a newcomer adds: an optimizer or a data set is one YAML file, a kind of data one module and one YAML file."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.config import CONF, compose_config
from runfolder.errors import UserError
from slurm.command import main
from tests.voc_folder import write_voc

FAMILIES = sorted(path.stem for path in CONF.glob("*.yaml"))
RMSPROP = "name: rmsprop\n_target_: torch.optim.RMSprop\nlr: 0.01\nweight_decay: 0.0\n"


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A copy of ``conf/`` to add files to, in a folder whose modules can be imported."""
    monkeypatch.setattr("experiments.config.CONF", shutil.copytree(CONF, tmp_path / "conf"))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("stripes", "formulas"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "conf"


def train(experiment, folder, *words):
    """The content of a run's ``result.json``."""
    common = [f"runtime.runs={folder}/runs", "runtime.progress=false", "runtime.threads=1"]
    assert main(experiment, "", "", [*words, *common]) == 0
    (path,) = (folder / "runs").rglob("result.json")
    return json.loads(path.read_text())


def write_images(folder):
    """Eight pictures of 16x16 pixels in two classes, for training and testing each."""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = draw.integers(256, size=(16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


# -- an optimizer -------------------------------------------------------------------------------------

TINY_DEIT = ["model=deit3_small", "model.width=24", "model.depth=1", "model.heads=3", "model.patch=8"]
TINY_VIT = ["model=vit_small", "model.width=8", "model.depth=1", "model.heads=2"]
TINY_DETECTOR = ["model.width=8", "model.hidden=16", "model.min_size=64", "model.max_size=96"]
MODELS = {"imagenet_deit": TINY_DEIT, "transfer": TINY_DEIT, "detection_voc": TINY_DETECTOR}
MODELS |= {"cifar_resnet": ["model=resnet18"]}  # whose own keys the recipe sets
MODELS |= {"proxprop": [*TINY_VIT, "validation_images=2"]}


@pytest.mark.parametrize(("family", "stage"), [*((f, {}) for f in FAMILIES), ("imagenet_deit", {"stage": "finetune"})])
def test_a_recipe_says_that_it_has_no_rate_for_a_new_optimizer(family, stage, conf):
    (conf / "optim" / "rmsprop.yaml").write_text(RMSPROP)
    with pytest.raises(UserError, match=r"no optim.lr for rmsprop, only for .*; give optim.lr=VALUE.$") as caught:
        compose_config(family, stage | {"optim": "rmsprop"})
    assert "\n" not in str(caught.value)
    assert compose_config(family, stage | {"optim": "rmsprop", "optim.lr": 0.02}).optim["lr"] == 0.02
    assert compose_config(family, stage).optim["lr"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_optimizer_trains_in_every_family_with_a_given_rate(family, conf, tmp_path, capsys):
    (conf / "optim" / "rmsprop.yaml").write_text(RMSPROP)
    words = [
        "optim=rmsprop",
        "max_steps=1",
        "epochs=1",
        "batch_size=4",
        "precision=fp32",
        *MODELS.get(family, TINY_VIT),
    ]
    if family == "detection_voc":
        words += [f"data.root={write_voc(tmp_path, train=4, test=2)}"]
    else:
        words += ["data=imagefolder", f"data.root={write_images(tmp_path / 'images')}", "data.image_size=16"]
        words += ["data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]"]
    words += ["start_from=null"]
    assert main(family, "", "", [*words, f"runtime.runs={tmp_path}/runs"]) == 2
    assert "no optim.lr for rmsprop" in capsys.readouterr().err
    assert train(family, tmp_path, *words, "optim.lr=0.001")["steps"] == 1


def test_an_optimizer_without_weight_decay_trains_where_the_recipe_has_none(conf, tmp_path):
    (conf / "optim" / "rprop.yaml").write_text("name: rprop\n_target_: torch.optim.Rprop\nlr: 0.01\n")
    choice = {"optim": "rprop", "optim.lr": 0.01}
    with pytest.raises(UserError) as caught:
        compose_config("cifar100_zoo", choice)
    assert str(caught.value) == (
        "rprop takes no weight_decay, and this recipe gives it 0.0005; optim.weight_decay=0 trains without."
    )
    assert "weight_decay" not in compose_config("cifar100_zoo", choice | {"optim.weight_decay": 0}).optim
    words = ["data=digits", *TINY_VIT, *(f"{key}={value}" for key, value in choice.items()), "max_steps=1"]
    assert train("cifar_vit", tmp_path, *words, "decay_matrices_only=true")["steps"] == 1


# -- a data set ---------------------------------------------------------------------------------------

BIRDS = """
name: birds
_target_: experiments.data.imagefolder.ImageFolder
root: ???
augment: crop_flip
padding: 1
mean: null
std: null
"""
STRIPES = """
from dataclasses import dataclass

import torch

from experiments.data.base import Source
from experiments.data.images import ImageData, Split
from experiments.data.options import ImageOptions


@dataclass(frozen=True, kw_only=True)
class Stripes(ImageOptions, Source):
    count: int

    def load(self):
        labels = torch.arange(self.count) % 2
        image = torch.zeros(8, 8, dtype=torch.uint8)
        image[::2] = 255
        images = torch.stack([image if label else image.T for label in labels])[:, None]
        split = Split(labels, images)
        return ImageData(split, split, ["lying", "standing"], self)
"""
OF_STRIPES = """
name: stripes
_target_: stripes.Stripes
count: 64
augment: none
mean: null
std: null
in_memory: true
"""
QUICK = [*TINY_VIT, "max_steps=3", "batch_size=4"]


def test_a_data_set_of_a_known_format_is_one_file(conf, tmp_path):
    (conf / "data" / "birds.yaml").write_text(BIRDS)
    root = write_images(tmp_path / "images")
    assert train("quickstart", tmp_path, "data=birds", f"data.root={root}", *QUICK)["steps"] == 3


def test_a_data_set_of_a_new_format_is_one_file_and_its_loader(conf, tmp_path, capsys):
    (conf / "data" / "stripes.yaml").write_text(OF_STRIPES)
    (tmp_path / "stripes.py").write_text(STRIPES)
    result = train("quickstart", tmp_path, "data=stripes", *TINY_VIT, "epochs=6", "batch_size=8", "optim.lr=0.01")
    assert result["metrics"]["test/top1"] == 100
    capsys.readouterr()
    for word, sentence in (
        ("data.conut=3", "unknown key data.conut; nearest: data.count"),
        ("data.count=many", "expected data.count to be a whole number, got 'many'"),
        ("data.augment=blur", "expected data.augment to be one of crop_flip, "),
        ("data.mean=[0.5,0.5]", "expected data.mean and data.std with 1 numbers"),
    ):
        assert main("quickstart", "", "", ["data=stripes", word, f"runtime.runs={tmp_path}/other"]) == 2
        assert sentence in capsys.readouterr().err


def test_a_key_that_the_source_does_not_take_is_one_sentence(conf):
    (conf / "data" / "birds.yaml").write_text(f"{BIRDS}wings: 2\n")
    with pytest.raises(UserError, match="unknown key data.wings; nearest: "):
        compose_config("quickstart", {"data": "birds", "data.root": "x"})


# -- a kind of data -----------------------------------------------------------------------------------

FORMULAS = """
from dataclasses import dataclass

import torch

from experiments.data.base import Data, Samples, Source
from experiments.tasks.classification import Classification


class ByLoss(Classification):
    primary_metric = "test/loss"


@dataclass(frozen=True)
class Part:
    count: int

    def __len__(self):
        return self.count

    def identity(self):
        yield b"formulas"


@dataclass(frozen=True)
class FormulaData(Data):
    train: Part
    test: Part
    classes: list
    task = ByLoss

    @property
    def shape(self):
        return {"in_channels": 2, "image_size": 8}

    def samples(self, seed, repeats, device):
        return FormulaSamples()


class FormulaSamples(Samples):
    def __getitem__(self, request):
        _, _, samples = request
        labels = torch.tensor(samples) % 3
        return labels[:, None, None, None] * torch.ones(2, 8, 8) - 1, labels

    def ready(self, batch, device):
        images, labels = batch
        return images.to(device), labels.to(device)

    def nothing(self, device):
        return torch.empty(0, 2, 8, 8, device=device), torch.empty(0, dtype=torch.int64, device=device)


@dataclass(frozen=True, kw_only=True)
class Formulas(Source):
    count: int

    def load(self):
        return FormulaData(Part(self.count), Part(9), ["a", "b", "c"])
"""
OF_FORMULAS = "name: formulas\n_target_: formulas.Formulas\ncount: 30\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_kind_of_data_is_one_module_and_one_file(workers, conf, tmp_path, capsys):
    (conf / "data" / "formulas.yaml").write_text(OF_FORMULAS)
    (tmp_path / "formulas.py").write_text(FORMULAS)
    result = train("quickstart", tmp_path, "data=formulas", *QUICK, f"runtime.workers={workers}")
    assert result["steps"] == 3
    assert 0 < result["metrics"]["test/loss"] < 5
    assert "finished: test/loss " in capsys.readouterr().out
    (weights,) = (tmp_path / "runs").rglob("checkpoints/*.pt")
    assert torch.load(weights, weights_only=True)["progress"]["step"] == 3
