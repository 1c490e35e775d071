"""The paper's two CIFAR networks, and large photographs, through the code path for real images.

TRACT_DATA names a folder with cifar10-jpeg.tar.gz (train/CLASS/*.jpg, test/CLASS/*.jpg) and
imagenette160-train.tar and imagenette160-val.tar (train/CLASS/*.JPEG, val/CLASS/*.JPEG).
"""

import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from experiments import cli

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
    assert cli.main(experiment, "", "", arguments) == 0
    (result,) = runs.rglob("result.json")
    return json.loads(result.read_text())


@pytest.mark.parametrize("method", ["vanilla", "tract"])
@pytest.mark.parametrize("experiment", ["cifar_resnet", "cifar_vit"])
def test_cifar_networks_train_on_real_images(cifar, tmp_path, experiment, method):
    result = train(experiment, tmp_path, f"data.root={cifar}", f"method={method}", "batch_size=16", "max_steps=4")
    assert result["steps"] == 4
    assert 0 <= result["metrics"]["test/top1"] <= 100
    assert result["metrics"]["test/loss"] < 20


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
