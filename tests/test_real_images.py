"""Every family of experiments, for a few steps, on real images.

TRACT_DATA names a folder with cifar10-jpeg.tar.gz (train/CLASS/*.jpg, test/CLASS/*.jpg) and
imagenette160-train.tar and imagenette160-val.tar (train/CLASS/*.JPEG, val/CLASS/*.JPEG).
"""

import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from analysis import tables
from experiments.data.augment import center_crop
from slurm.command import main
from tests.voc_folder import write_voc

pytestmark = pytest.mark.skipif(
    "TRACT_DATA" not in os.environ, reason="TRACT_DATA does not name a folder of real images; see this file's docstring"
)


def extract(archive: str, to: Path, per_class: int) -> None:
    """The first few images of each class."""
    seen = Counter()
    with tarfile.open(Path(os.environ["TRACT_DATA"]) / archive) as tar:
        for member in tar:
            folder = str(Path(member.name).parent)
            if member.isfile() and seen[folder] < per_class:
                seen[folder] += 1
                tar.extract(member, to, filter="data")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cifar10-jpeg")
    extract("cifar10-jpeg.tar.gz", root, per_class=8)
    return root


@pytest.fixture(scope="module")
def imagenette(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("imagenette")
    extract("imagenette160-train.tar", root, per_class=6)
    extract("imagenette160-val.tar", root, per_class=3)
    return root


def train(experiment: str, runs: Path, *choices: str) -> dict:
    arguments = [*choices, f"runtime.runs={runs}", "data=imagefolder", "runtime.progress=false"]
    assert main(experiment, "", "", arguments) == 0
    (result,) = runs.rglob("result.json")
    return json.loads(result.read_text())


@pytest.mark.parametrize("method", ["vanilla", "tract"])
@pytest.mark.parametrize("experiment", ["cifar_resnet", "cifar_vit"])
def test_cifar_networks_train_on_real_images(cifar, tmp_path, experiment, method):
    result = train(experiment, tmp_path, f"data.root={cifar}", f"method={method}", "batch_size=16", "max_steps=4")
    assert result["steps"] == 4
    assert 0 <= result["metrics"]["test/top1"] <= 100
    assert result["metrics"]["test/loss"] < 20


@pytest.mark.parametrize("mode", ["prox_exact", "prox_cg3"])
@pytest.mark.parametrize(
    ("network", "rate"),
    [(["model=proxprop_convnet"], []), (["model=proxprop_mlp", "model.hidden=[40,20]"], ["optim=nesterov"])],
)
def test_proximal_steps_train_on_real_images(cifar, tmp_path, network, rate, mode):
    small = ["batch_size=20", "validation_images=16", "epochs=3"]
    result = train("proxprop", tmp_path, f"data.root={cifar}", f"method.mode={mode}", *network, *rate, *small)
    assert result["steps"] == 12  # 64 images
    assert set(result["metrics"]) >= {"test/top1", "val/loss", "fit/loss"}
    assert result["metrics"]["fit/loss"] < 2.4


@pytest.mark.parametrize(
    "choices",
    [
        ["method=line", "method.points=3"],
        ["method=curve", "method.layerwise=true", "method.points=3"],
        ["method=simplex", "method.endpoints=4", "method.members=2", "data.label_noise=0.5"],
        ["method=swa", "method.count=2", "method.points=0", "data.corruption=jpeg_compression", "data.severity=3"],
    ],
    ids=" ".join,
)
def test_subspaces_train_on_real_images(cifar, tmp_path, choices):
    small = ["model.depth=8", "model.width=8", "batch_size=20", "epochs=2", "schedule.warmup_epochs=1"]
    result = train("subspaces", tmp_path, f"data.root={cifar}", *small, *choices)
    assert result["steps"] == 8
    assert {"test/top1", "test/ece"} <= set(result["metrics"])
    assert 1 < result["metrics"]["test/loss"] < 10


def test_files_give_the_same_weights_as_memory(cifar, tmp_path):
    """Decoded once and augmented in batches, or decoded and augmented one by one in loader processes."""
    constants = ["data.mean=[0.49,0.48,0.45]", "data.std=[0.2,0.2,0.2]"]
    choices = [f"data.root={cifar}", "model=vit_small", "max_steps=4", "batch_size=40", *constants]
    digests = set()
    for keep in ("true", "false"):
        result = train("cifar_vit", tmp_path / keep, f"data.in_memory={keep}", *choices)
        digests.add(result["weights_sha256"])
    assert len(digests) == 1


def test_photographs_of_many_sizes_train(imagenette, tmp_path):
    choices = ["data.image_size=64", "data.augment=resized_crop", "batch_size=20", "max_steps=3", "method=tract"]
    constants = ["data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]"]
    result = train("cifar_resnet", tmp_path, f"data.root={imagenette}", *choices, *constants)
    assert result["steps"] == 3


@pytest.mark.parametrize(("interpolation", "most", "levels"), [("bicubic", 0.003, 2), ("bilinear", 0.001, 1)])
def test_test_images_are_resized_as_pillow_does_to_a_few_levels(imagenette, interpolation, most, levels):
    """To 109 pixels and back to the centre 96; docs/reproducing.md has the shares."""
    files = sorted((imagenette / "val").rglob("*.JPEG")) + sorted((imagenette / "train").rglob("*.JPEG"))
    differences = []
    for file in files:
        image = Image.open(file).convert("RGB")
        mode = v2.InterpolationMode(interpolation)
        expected = v2.functional.center_crop(v2.functional.resize(image, [109], interpolation=mode), [96, 96])
        found = center_crop(v2.functional.pil_to_tensor(image), 96, 0.875, interpolation)
        differences.append((v2.functional.pil_to_tensor(expected).int() - found.int()).abs().flatten())
    differences = torch.cat(differences)
    share = (differences > 0).float().mean().item()
    print(f"{interpolation}: {share:.5f} of the values of {len(files)} images, by up to {differences.max()}")
    assert 0 < share < most
    assert differences.max() <= levels


def run_and_tabulate(experiment: str, runs: Path, capsys, *choices: str) -> str:
    """Train one run, and give the table that its folder makes."""
    assert main(experiment, "", "", [*choices, f"runtime.runs={runs}", "runtime.progress=false"]) == 0
    capsys.readouterr()
    assert tables.main(["--runs", str(runs), "--experiment", experiment]) == 0
    return capsys.readouterr().out


QUICK = ["max_steps=2", "runtime.workers=0", "runtime.gpus=0", "eval_batch_size=30", "precision=fp32"]
NETTE = ["data.classes=10", "data.train_images=60", "data.test_images=30", "data.image_size=64", "batch_size=10"]
TOY_VIT = ["model=deit3_small", "model.width=48", "model.depth=2", "model.heads=3"]


def test_networks_of_the_zoo_train_on_real_images(cifar, tmp_path, capsys):
    choices = ["model=shufflenetv2", "method=tract", f"data.root={cifar}", "data=imagefolder", "batch_size=16", *QUICK]
    assert "(1)" in run_and_tabulate("cifar100_zoo", tmp_path, capsys, *choices)


def test_imagenet_resnets_train_on_imagenette(imagenette, tmp_path, capsys):
    choices = ["model=imagenet_resnet18", "method=tract", f"data.root={imagenette}", *NETTE, *QUICK]
    assert "(1)" in run_and_tabulate("imagenet_resnet", tmp_path, capsys, *choices)


def test_detectors_train_on_real_things_in_made_up_scenes(imagenette, tmp_path, capsys):
    """Photographs of two classes, pasted where their boxes say."""
    classes = sorted(path.name for path in (imagenette / "train").iterdir())[:2]

    def photograph(label, height, width, draw):
        files = sorted((imagenette / "train" / classes[label]).iterdir())
        with Image.open(files[draw.integers(len(files))]) as image:
            return np.array(image.convert("RGB").resize((width, height)))

    root = write_voc(tmp_path, 6, 4, photograph, tuple(classes))
    sizes = ["model.width=8", "model.hidden=32", "model.min_size=96", "model.max_size=160", "start_from=null"]
    words = [f"data.root={root}", "method=tract", "max_steps=3", "runtime.workers=0", *sizes]
    table = run_and_tabulate("detection_voc", tmp_path, capsys, *words)
    assert "(1)" in table
    assert "test/map" in table


def test_pre_training_fine_tuning_and_transfer_on_real_images(imagenette, cifar, tmp_path, capsys):
    """Each starts from the run before it; other classes and another image size come last."""
    choices = [*TOY_VIT, "method=tract", *QUICK]
    pretrain = [*choices, "recipe.pretrain_epochs=400", f"data.root={imagenette}", *NETTE]
    assert main("imagenet_deit", "", "", [*pretrain, f"runtime.runs={tmp_path}", "runtime.progress=false"]) == 0
    table = run_and_tabulate("imagenet_deit", tmp_path, capsys, *pretrain, "stage=finetune")
    assert len(re.findall(r"\(1\) *\|", table)) == 2  # a row for each stage
    (tuned,) = (tmp_path / "imagenet_deit").glob("*-50ep-*")
    assert "starts from" in (tuned / "log.txt").read_text()
    small = [f"data.root={cifar}", "data=imagefolder", "data.image_size=32", "batch_size=16"]
    table = run_and_tabulate("transfer", tmp_path, capsys, *choices, *small, f"start_from=imagenet_deit/{tuned.name}")
    assert "(1)" in table
