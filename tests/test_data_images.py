import hashlib
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from experiments.data.batches import Batches, fingerprint
from experiments.data.cifar import Cifar10
from experiments.data.digits import Digits
from experiments.data.imagefolder import ImageFolder
from experiments.ranks import Ranks
from runfolder.errors import UserError

OPTIONS = {"image_size": None, "augment": "crop_flip", "padding": 2, "flip": True, "in_memory": None}
MEASURED = {"mean": None, "std": None}
GIVEN = {"mean": [0.5] * 3, "std": [0.2] * 3}
CIFAR = {"augment": "crop_flip", "padding": 4, "flip": True, "mean": [0.5] * 3, "std": [0.2] * 3, "in_memory": True}


def imagefolder(root, **options):
    return ImageFolder(root=root, **options).load()


def _folder(base, sizes=((8, 8),), test="test", classes=("cat", "dog"), test_classes=None, count=3):
    """Images of random pixels; their sizes (width, height) take turns. Returns {file: pixels}."""
    random, pixels = np.random.default_rng(0), {}
    for split, names in (("train", classes), (test, test_classes or classes)):
        for name in names:
            (base / split / name).mkdir(parents=True)
            for i in range(count):
                width, height = sizes[i % len(sizes)]
                array = random.integers(256, size=(height, width, 3), dtype=np.uint8)
                path = base / split / name / f"{i:04}.png"
                Image.fromarray(array).save(path)
                pixels[path] = array
    return pixels


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_of_images_is_read_as_it_lies(test, tmp_path):
    pixels = _folder(tmp_path, test=test)
    data = imagefolder(str(tmp_path), **OPTIONS, **MEASURED)
    assert (data.options.in_memory, data.options.image_size, data.classes) == (True, 8, ["cat", "dog"])
    for split, name in ((data.train, "train"), (data.test, test)):
        arrays = [pixels[path] for path in sorted(pixels) if path.parts[-3] == name]
        assert torch.equal(split.images, torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))
        assert split.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_measured_mean_and_deviation_are_those_of_the_training_pixels(tmp_path):
    pixels = _folder(tmp_path)
    train = np.stack([pixels[path] for path in pixels if path.parts[-3] == "train"]) / 255
    data = imagefolder(str(tmp_path), **OPTIONS, **MEASURED)
    np.testing.assert_allclose(data.options.mean, train.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.options.std, train.std(axis=(0, 1, 2)), rtol=1e-9)


def test_what_is_given_is_not_measured(tmp_path):
    _folder(tmp_path)
    data = imagefolder(str(tmp_path), **OPTIONS, mean=[0.1, 0.2, 0.3], std=None)
    measured = imagefolder(str(tmp_path), **OPTIONS, **MEASURED)
    assert (data.options.mean, data.options.std) == ([0.1, 0.2, 0.3], measured.options.std)


def test_images_of_several_sizes_are_loaded_one_by_one(tmp_path):
    _folder(tmp_path, sizes=((8, 8), (12, 9)))
    data = imagefolder(str(tmp_path), **(OPTIONS | {"image_size": 6, "in_memory": False}), **GIVEN)
    options = {"seed": 0, "batch_size": 3, "drop_last": False, "overfit": None, "eval_batch_size": 4, "workers": 0}
    batches = Batches(data, **options, ranks=Ranks(), device=torch.device("cpu"))
    assert all(x.shape[1:] == (3, 6, 6) for x, _ in [*batches.train(0), *batches.test()])


def _broken(base):
    _folder(base)
    (base / "train" / "dog" / "0001.png").write_bytes(b"no image")


FOLDERS = {
    "different sizes": (lambda base: _folder(base, sizes=((8, 8), (9, 9))), {}, "one size.*0001.png.*in_memory=false"),
    "another size than asked": (_folder, {"image_size": 6, "in_memory": True}, "6x6.*in_memory=false"),
    "not square in memory": (lambda b: _folder(b, sizes=((8, 6),)), {"in_memory": True}, "8x8.*in_memory=false"),
    "not in memory, nothing to measure": (_folder, {"in_memory": False}, "data.mean and data.std"),
    "a broken image": (_broken, {}, r"readable image in .*train/dog/0001\.png"),
    "different classes": (lambda b: _folder(b, test_classes=("cat", "fox")), {}, "same classes.*dog, fox"),
    "an empty class": (lambda b: [_folder(b), (b / "train" / "emu").mkdir()], {}, "expected images in .*emu"),
    "no classes": (lambda b: [(b / n).mkdir() for n in ("train", "test")], {}, "folders of classes"),
    "no test images": (lambda b: _folder(b, test="other"), {}, "expected test/ or val/.*got other, train"),
    "no folder": (lambda b: None, {"root": "missing"}, "no such folder"),
    "crops of a batch in memory": (_folder, {"augment": "resized_crop", "in_memory": True}, "in_memory=false"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_bad_folder_is_one_sentence(case, tmp_path):
    make, changes, message = FOLDERS[case]
    make(tmp_path)
    options = {"root": str(tmp_path)} | OPTIONS | MEASURED | changes
    with pytest.raises(UserError, match=message) as caught:
        imagefolder(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_by_the_loader_too(workers, tmp_path):
    _broken(tmp_path)
    data = imagefolder(str(tmp_path), **(OPTIONS | {"in_memory": False}), **GIVEN)
    options = {"seed": 0, "batch_size": 6, "drop_last": False, "overfit": None, "eval_batch_size": 4}
    batches = Batches(data, **options, workers=workers, ranks=Ranks(), device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"readable image in .*train/dog/0001\.png") as caught:
        list(batches.train(0))
    assert "\n" not in str(caught.value)


def test_digits_are_those_of_scikit_learn_in_its_stratified_split():
    """A fifth of each class is for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.round(bunch.images * 255 / 16).astype(np.uint8)[:, None]
    parts = train_test_split(pixels, bunch.target, test_size=360, random_state=0, stratify=bunch.target)
    data = Digits(augment="none", mean=None, std=None, in_memory=True).load()
    ours = (data.train.images, data.test.images, data.train.labels, data.test.labels)
    assert all(np.array_equal(mine, its) for mine, its in zip(ours, parts, strict=True))
    shares = torch.bincount(data.test.labels).numpy() / np.bincount(bunch.target)
    assert (np.abs(shares - 360 / 1797) < 0.005).all()


def test_the_fingerprint_tells_data_sets_apart(tmp_path):
    for name, count in (("a", 3), ("b", 4)):
        _folder(tmp_path / name, count=count)
    read = lambda name, **changes: fingerprint(imagefolder(str(tmp_path / name), **(OPTIONS | changes), **GIVEN))  # noqa: E731
    assert read("a") == read("a")
    assert len({read("a"), read("b"), read("a", in_memory=False)}) == 3


# -- CIFAR through torchvision ----------------------------------------------------------------------


def _miniature(root, monkeypatch):
    """An archive in CIFAR-10's own format with five and two images per file; returns all pixels."""
    random, folder = np.random.default_rng(0), root / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    files = {name: 5 for name, _ in CIFAR10.train_list} | {name: 2 for name, _ in CIFAR10.test_list}
    contents = {
        n: {"data": random.integers(256, size=(c, 3072), dtype=np.uint8), "labels": list(range(c))}
        for n, c in files.items()
    }
    pixels = {name: entry["data"] for name, entry in contents.items()}
    contents[CIFAR10.meta["filename"]] = {"label_names": [f"class {n}" for n in range(10)]}
    sums = {}
    for name, entry in contents.items():
        (folder / name).write_bytes(pickle.dumps(entry))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive:
        archive.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((root / CIFAR10.filename).read_bytes()).hexdigest())
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, name, [[file, sums[file]] for file, _ in getattr(CIFAR10, name)])
    meta = CIFAR10.meta | {"md5": sums[CIFAR10.meta["filename"]]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return pixels


def test_cifar_is_read_from_its_archive(tmp_path, monkeypatch):
    pixels = _miniature(tmp_path, monkeypatch)
    data = Cifar10(root=str(tmp_path), **CIFAR).load()
    for split, names in ((data.train, CIFAR10.train_list), (data.test, CIFAR10.test_list)):
        rows = np.concatenate([pixels[name] for name, _ in names])
        assert torch.equal(split.images, torch.from_numpy(rows).reshape(-1, 3, 32, 32))
    assert data.train.labels.tolist() == list(range(5)) * 5
    assert data.classes == [f"class {n}" for n in range(10)]


def test_a_damaged_archive_without_a_network_is_one_sentence(tmp_path, monkeypatch):
    _miniature(tmp_path, monkeypatch)
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "nowhere.tar.gz").as_uri())
    archive = tmp_path / CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(UserError, match="a way to download it.*data=imagefolder") as caught:
        Cifar10(root=str(tmp_path), **CIFAR).load()
    assert "\n" not in str(caught.value)


# -- real images -------------------------------------------------------------------------------------


def test_real_images_decode_as_pillow_decodes_them(tmp_path):
    where = os.environ.get("TRACT_DATA")
    archive = Path(where or "") / "cifar10-jpeg.tar.gz"
    if not where or not archive.is_file():
        pytest.skip("TRACT_DATA does not name a folder with cifar10-jpeg.tar.gz")
    with tarfile.open(archive) as tar:  # only its first entries: reading all of it takes seconds
        names = []
        for member in tar:
            if member.isfile():
                tar.extract(member, tmp_path / "all", filter="data")
                names.append(member.name)
            if len(names) == 4:
                break
    for split in ("train", "test"):
        (tmp_path / "few" / split / "one").mkdir(parents=True)
        for i, name in enumerate(names):
            os.link(tmp_path / "all" / name, tmp_path / "few" / split / "one" / f"{i}.jpg")
    data = imagefolder(str(tmp_path / "few"), **OPTIONS, **MEASURED)
    expected = np.stack([np.asarray(Image.open(tmp_path / "all" / name).convert("RGB")) for name in names])
    difference = data.train.images.int() - torch.from_numpy(expected).permute(0, 3, 1, 2).int()
    assert data.train.images.shape == (4, 3, 32, 32)
    assert difference.abs().max() <= 2  # two builds of the same decoder round differently


def test_images_in_subfolders_count_hidden_ones_do_not_and_others_are_named(tmp_path, capsys):
    _folder(tmp_path)
    cats = tmp_path / "train" / "cat"
    (cats / "more").mkdir()
    (cats / "0000.png").rename(cats / "more" / "0000.PNG")
    (cats / "._0001.png").write_bytes(b"no image")
    (cats / "notes.txt").write_text("no image")
    (cats / "folder.png").mkdir()
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    data = imagefolder(str(tmp_path), **OPTIONS, **MEASURED)
    assert data.classes == ["cat", "dog"]
    assert len(data.train) == 6
    assert "1 entries are left out: cat/notes.txt (no image)" in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, -3])
def test_an_impossible_image_size_is_one_sentence(size, tmp_path):
    _folder(tmp_path)
    with pytest.raises(UserError, match="expected data.image_size to be at least 1"):
        imagefolder(str(tmp_path), **(OPTIONS | {"image_size": size}), **GIVEN)
