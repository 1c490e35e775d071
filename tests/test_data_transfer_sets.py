"""The data sets of table 4: read as they are published, or a sentence on how to get them."""

import re

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import flowers102 as torchvision_flowers

from experiments.config import build, compose_config
from experiments.data.batches import Batches
from experiments.ranks import Ranks
from runfolder.errors import UserError


def config_of(name, root, **changes):
    choices = {"data": name, "runtime.data_dir": str(root), "data.image_size": 32, "start_from": "a.pth"}
    return compose_config("transfer", choices | changes)


def data_of(name, root):
    return build(config_of(name, root).data).load()


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(path)


def test_flowers_train_on_train_and_val(tmp_path, monkeypatch):
    """The published lists count from 1; two pictures each for training, validation and testing."""
    monkeypatch.setattr(torchvision_flowers, "check_integrity", lambda *_: True)
    folder = tmp_path / "flowers-102"
    for number in range(1, 7):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", number)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 4, 5, 102]])})
    scipy.io.savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    data = data_of("flowers102", tmp_path)
    assert data.train.labels.tolist() == [0, 1, 2, 3]
    assert data.test.labels.tolist() == [4, 101]
    assert len(data.classes) == 102
    options = {"seed": 0, "batch_size": 2, "drop_last": True, "overfit": None, "eval_batch_size": 2, "workers": 0}
    batches = Batches(data, **options, ranks=Ranks(), device=torch.device("cpu"))
    assert [images.shape for images, _ in batches.train(0)] == [(2, 3, 32, 32)] * 2
    assert [images.shape for images, _ in batches.test()] == [(2, 3, 32, 32)]


def test_flowers_without_a_network_say_what_to_put_where(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision_flowers, "download_and_extract_archive", no_network)
    with pytest.raises(UserError, match=re.escape("got: no network; put 102flowers.tgz (unpacked)")) as error:
        data_of("flowers102", tmp_path)
    assert f"{tmp_path}/flowers-102" in str(error.value)


def test_cars_are_read_as_they_are_published(tmp_path):
    folder = tmp_path / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array([["Volvo 240", "Audi 100"]], dtype=object)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    kind = [("class", "O"), ("fname", "O")]
    for part, place, numbers in (
        ("train", "devkit/cars_train_annos.mat", (2, 1, 1)),
        ("test", "cars_test_annos_withlabels.mat", (2, 1)),
    ):
        rows = np.array([[(number, f"{index:05d}.jpg") for index, number in enumerate(numbers)]], dtype=kind)
        scipy.io.savemat(folder / place, {"annotations": rows})
        for index in range(len(numbers)):
            picture(folder / f"cars_{part}" / f"{index:05d}.jpg", index)
    data = data_of("stanford_cars", tmp_path)
    assert data.classes == ["Volvo 240", "Audi 100"]
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([1, 0, 0], [1, 0])
    assert data.train.image(0).shape == (3, 40, 50)


def test_missing_cars_say_what_to_put_where(tmp_path):
    with pytest.raises(UserError, match="cannot be downloaded any more from its authors: put cars_train/"):
        data_of("stanford_cars", tmp_path)


def test_cifar_is_enlarged_for_networks_of_imagenet():
    config = compose_config("transfer", {"data": "cifar10", "start_from": "a.pth"})
    assert (config.data["image_size"], config.data["in_memory"], config.data["augment"]) == (224, None, "rand_augment")
    assert (config.epochs, config.batch_size) == (200, 768)
    for name, epochs in (("cifar100", 200), ("flowers102", 5000), ("stanford_cars", 1000)):
        assert compose_config("transfer", {"data": name, "start_from": "a.pth"}).epochs == epochs
