import dataclasses
import fcntl
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from experiments.config import compose_config
from experiments.data.augment import random_box, resized_crop_flip
from experiments.data.batches import Batches, fingerprint
from experiments.data.decode import decode
from experiments.data.imagenet import ImageNet
from experiments.data.images import ImageData, Split
from experiments.data.listing import SUFFIXES
from experiments.data.options import ImageOptions
from experiments.data.shards import SPLITS
from experiments.ranks import Ranks
from experiments.tools import shard_images
from experiments.training.run import run
from runfolder.errors import EXIT_BAD_INPUT, EXIT_BUSY, UserError

SYNSETS = ("n01440764", "n02102040", "n02979186")
TOOL = Path(shard_images.__file__)
OPTIONS = {"classes": 3, "train_images": 12, "test_images": 6, "image_size": 16, "augment": "resized_crop"}
OPTIONS |= {"padding": 0, "flip": True, "mean": [0.5] * 3, "std": [0.2] * 3, "crop_ratio": 0.875}
OPTIONS |= {"reduced_decode": False}
SIZES = ((60, 40), (40, 60), (33, 33), (20, 90))


def _make(base, sizes=SIZES, train=4, val=2):
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in SYNSETS:
            (base / split / name).mkdir(parents=True)
            for i in range(count):
                width, height = sizes[i % len(sizes)]
                pixels = random.integers(256, size=(3, 4, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
                file = f"{name}_{i}.JPEG" if split == "train" else f"ILSVRC2012_val_{SYNSETS.index(name)}{i:07}.JPEG"
                image.save(base / split / name / file, quality=95)
    return base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return _make(tmp_path_factory.mktemp("imagenet"))


def _shard(source, target, *options):
    return shard_images.main([str(source), str(target), "--workers", "0", "--images", "5", *options])


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed")
    assert _shard(folder, target, "--size", "0") == 0
    return target


def _read(root, **changes) -> ImageData:
    return ImageNet(root=str(root), **(OPTIONS | changes)).load()


def _batches(data, **changes):
    options = {"seed": 1, "batch_size": 5, "drop_last": False, "overfit": None, "eval_batch_size": 4, "workers": 0}
    return Batches(data, **(options | changes), ranks=Ranks(), device=torch.device("cpu"))


def _bytes(batches):
    return [(x.numpy().tobytes(), y.tolist()) for x, y in batches]


# -- the layout --------------------------------------------------------------------------------


def test_folders_are_read_in_the_order_of_their_names(folder):
    data = _read(folder)
    assert data.classes == sorted(SYNSETS)
    for split, name in ((data.train, "train"), (data.test, "val")):
        paths = sorted((folder / name).glob("*/*"))
        assert list(split.files) == paths
        assert split.labels.tolist() == [data.classes.index(path.parent.name) for path in paths]
        for index, path in enumerate(paths):
            expected = np.asarray(Image.open(path).convert("RGB"))
            assert torch.equal(split.image(index), torch.from_numpy(expected.copy()).permute(2, 0, 1))


def _flatten(base):
    for path in list((base / "val").glob("*/*")):
        path.rename(base / "val" / path.name)
    for name in SYNSETS:
        (base / "val" / name).rmdir()


def _nest(base):
    (base / "ILSVRC" / "Data" / "CLS-LOC").mkdir(parents=True)
    for name in ("train", "val"):
        (base / name).rename(base / "ILSVRC" / "Data" / "CLS-LOC" / name)


def _empty(base, *splits):
    for path in [path for split in splits for path in (base / split / SYNSETS[1]).iterdir()]:
        path.unlink()


def _drop_class(base):
    _empty(base, "val")
    (base / "val" / SYNSETS[1]).rmdir()


def _truncate(base):
    path = base / "val" / SYNSETS[0] / "ILSVRC2012_val_00000000.JPEG"
    path.write_bytes(path.read_bytes()[:-200])


LAYOUTS = {
    "no folder": (lambda b: None, {"root": "missing"}, "expected train/ and val/.*no such folder.*data.root=DIR"),
    "another name": (lambda b: (b / "val").rename(b / "validation"), {}, "expected train/ and val/.*train, validation"),
    "deeper": (_nest, {}, r"got ILSVRC; give data.root=.*ILSVRC/Data/CLS-LOC\."),
    "flat val": (_flatten, {}, "class folders named like n01440764 in .*val, got ILSVRC2012_val_.*ground_truth"),
    "archives": (lambda b: (b / "train" / "n01440764.tar").touch(), {}, "got n01440764.tar; unpack each archive"),
    "other classes": (lambda b: (b / "train" / "cat").mkdir(), {}, "like n01440764 in .*train, got cat; .*imagefolder"),
    "a class less": (_drop_class, {}, "same class folders .* n02102040 only in train/; complete or remove"),
    "too few classes": (lambda b: None, {"classes": 1000}, "expected 1,000 classes .* got 3; .*data.classes=3"),
    "an empty class": (lambda b: _empty(b, "val"), {}, "images in every class of .*val, got none in n02102040"),
    "too few images": (
        lambda b: (b / "train" / SYNSETS[1] / f"{SYNSETS[1]}_0.JPEG").unlink(),
        {},
        r"expected 12 images in .*train, got 11 \(fewest, 3, in n02102040\); .*data.train_images=11",
    ),
    "other test images": (lambda b: None, {"test_images": 50000}, "expected 50,000 images in .*val, got 6"),
    "a damaged image": (_truncate, {}, "readable image in .*val/n01440764/ILSVRC2012_val_00000000.JPEG, got: "),
    "no whole copy": (lambda b: [_nest(b), (b / "parts").mkdir()], {}, "not whole: run experiments/tools/shard_images"),
    "a bad number": (lambda b: None, {"classes": 0}, "expected data.classes to be at least 1, got 0"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_wrong_layout_is_one_sentence(case, tmp_path):
    change, options, message = LAYOUTS[case]
    change(_make(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        ImageNet(**({"root": str(tmp_path)} | OPTIONS | options)).load()
    assert "\n" not in str(caught.value)


def test_numbers_that_are_null_are_not_checked(folder):
    data = _read(folder, classes=None, train_images=None, test_images=None)
    assert (len(data.train), len(data.test), len(data.classes)) == (12, 6, 3)


def test_the_configuration_expects_imagenets_numbers(folder):
    config = compose_config("cifar_resnet", {"data": "imagenet", "data.root": str(folder)})
    numbers = [config.data[key] for key in ("classes", "train_images", "test_images", "image_size")]
    assert numbers == [1000, 1_281_167, 50_000, 224]


# -- packed images ------------------------------------------------------------------------------


def test_packed_images_are_the_folders_bytes_in_ordinary_archives(folder, packed, tmp_path):
    for archive in packed.glob("*.tar"):
        subprocess.run(["tar", "xf", archive, "-C", tmp_path], check=True)
    found = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.glob("*/*")}
    paths = [path for split in ("train", "val") for path in (folder / split).glob("*/*")]
    assert found == {Path(path.parent.name, path.name): path.read_bytes() for path in paths}
    assert sorted(path.name for path in packed.iterdir()) == [
        "index.npz",
        *(f"train-{n:05}.tar" for n in range(3)),
        *(f"val-{n:05}.tar" for n in range(2)),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_and_packed_images_give_the_same_bytes(folder, packed, workers):
    first, second = _read(folder), _read(packed)
    assert (first.classes, fingerprint(first)) == (second.classes, fingerprint(second))
    here, there = _batches(first), _batches(second, workers=workers)
    for epoch in (0, 1, 0):  # the loader processes stay
        assert _bytes(here.train(epoch)) == _bytes(there.train(epoch))
        assert _bytes(here.test()) == _bytes(there.test())


def test_a_run_ends_with_the_same_weights_from_both(folder, packed, tmp_path):
    digests = set()
    for root in (folder, packed):
        keys = ("classes", "train_images", "test_images", "image_size")
        choices = {"data": "imagenet", "data.root": str(root)} | {f"data.{key}": OPTIONS[key] for key in keys}
        choices |= {"model": "resnet_small", "epochs": 2, "batch_size": 4, "optim.lr": 0.1, "runtime.device": "cpu"}
        choices |= {"runtime.runs": str(tmp_path), "runtime.workers": 1, "runtime.progress": False}
        digests.add(run(compose_config("quickstart", choices))["weights_sha256"])
    assert len(digests) == 1


def test_images_are_made_smaller_never_larger(folder, tmp_path):
    assert _shard(folder, tmp_path, "--size", "32") == 0
    data, small = _read(folder), _read(tmp_path)
    assert fingerprint(data) != fingerprint(small)
    for split, packed in ((data.train, small.train), (data.test, small.test)):
        for index in range(len(split)):
            height, width = split.image(index).shape[1:]
            shorter = min(height, width)
            expected = (height, width) if shorter <= 32 else (round(height * 32 / shorter), round(width * 32 / shorter))
            assert packed.image(index).shape[1:] == expected
            if shorter <= 32:
                assert packed.shards.read(index) == split.files[index].read_bytes()
            else:  # nearly the same picture as torch's own resizing
                resized = v2.functional.resize(
                    split.image(index), list(expected), v2.InterpolationMode.BICUBIC, antialias=True
                )
                assert (packed.image(index).float() - resized.float()).abs().mean() < 6


def _checksums(arguments):
    split, indices = arguments
    return [hash(split.shards.read(index)) for index in indices]


def test_forked_processes_read_at_random_from_the_same_open_files(packed):
    split = _read(packed).train
    expected = [split.shards.read(index) for index in range(12)]  # and all files are open now
    assert len(split.shards._open) == 3
    orders = [np.random.default_rng(n).integers(12, size=2000).tolist() for n in range(2)]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        for order, sums in zip(orders, pool.map(_checksums_of(split), orders), strict=True):
            assert sums == [hash(expected[index]) for index in order]


class _checksums_of:  # noqa: N801
    def __init__(self, split):
        self.split = split

    def __call__(self, order):
        return _checksums((self.split, order))


def test_few_files_are_open_at_a_time(packed, monkeypatch):
    monkeypatch.setattr("experiments.data.shards._OPEN", 2)
    shards = _read(packed).train.shards
    for index in (0, 5, 11, 0, 11, 5):
        assert len(shards.read(index)) > 100
        assert len(shards._open) <= 2


def _cut(target):
    os.truncate(target / "train-00001.tar", 1024)


def _flip(target):
    data = bytearray((target / "val-00000.tar").read_bytes())
    data[600] ^= 1
    (target / "val-00000.tar").write_bytes(data)


DAMAGES = {
    "a cut file": (_cut, r"expected [\d,]+ bytes in .*train-00001.tar, got 1,024; copy that file again"),
    "no file": (lambda t: (t / "train-00001.tar").unlink(), "train-00001.tar, got no such file"),
    "other bytes": (
        _flip,
        r"image that was packed in .*val-00000.tar \(ILSVRC2012_val_00000000.JPEG\), got other bytes",
    ),
    "no index": (lambda t: (t / "index.npz").write_bytes(b"PK"), "expected an index .*index.npz, got: .*make the copy"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_copy_is_one_sentence(case, folder, tmp_path):
    assert _shard(folder, tmp_path, "--size", "0") == 0
    damage, message = DAMAGES[case]
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        _read(tmp_path)
    assert "\n" not in str(caught.value)


# -- the tool ------------------------------------------------------------------------------------


def _contents(target):
    return {path.name: path.read_bytes() for path in target.glob("*.tar")}


@pytest.mark.parametrize("stop", [0, 3, 5, 12, 17])
def test_a_tool_that_ends_in_the_middle_leaves_no_copy_and_goes_on(stop, folder, packed, tmp_path, monkeypatch):
    """It ends as by a kill after so many images: what is half done stays as it lies."""
    real, left = tarfile.TarFile.addfile, iter(range(stop))

    def add(*arguments):
        next(left)  # StopIteration, which nothing there handles
        return real(*arguments)

    monkeypatch.setattr(tarfile.TarFile, "addfile", add)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises((StopIteration, RuntimeError)):
        shard_images.shard(folder, tmp_path, 0, 90, 5, 0)
    monkeypatch.undo()
    assert list(tmp_path.glob("*.tmp"))
    with pytest.raises(UserError, match="not whole: run experiments/tools/shard_images.py again"):
        _read(tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert len(made) == (0 if stop < 5 else 1 if stop < 10 else 3 if stop < 17 else 4)
    assert _shard(folder, tmp_path, "--size", "0") == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made  # whole archives are not made again
    assert _contents(tmp_path) == _contents(packed)
    assert fingerprint(_read(tmp_path)) == fingerprint(_read(packed))
    assert not list(tmp_path.glob("*.tmp"))
    assert not (tmp_path / "parts").exists()


def test_a_killed_process_leaves_no_copy_and_the_next_completes_it(folder, packed, tmp_path):
    command = [sys.executable, str(TOOL), str(folder), str(tmp_path), "--size", "0", "--images", "5", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "train-00000.tar").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.stderr.read()  # ends with the last of its worker processes
    if not (tmp_path / "index.npz").exists():
        with pytest.raises(UserError, match="not whole"):
            _read(tmp_path)
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert _contents(tmp_path) == _contents(packed)


def test_the_tool_knows_torchvisions_kinds_of_images_without_importing_it():
    assert SUFFIXES == IMG_EXTENSIONS
    program = "import sys, experiments.tools.shard_images; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


def test_bad_images_are_all_named_and_once_replaced_the_copy_is_completed(tmp_path, capsys):
    source, target = _make(tmp_path / "source"), tmp_path / "target"
    bad = [source / "train" / SYNSETS[0] / f"{SYNSETS[0]}_{n}.JPEG" for n in (1, 2)]
    good = [path.read_bytes() for path in bad]
    bad[0].write_bytes(b"no image")
    bad[1].write_bytes(good[1][:-100])
    assert _shard(source, target) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert all(str(path) in said for path in bad)
    assert "got 2 that are not" in said
    assert not (target / "index.npz").exists()
    assert len(list(target.glob("*.tar"))) == 4
    for path, content in zip(bad, good, strict=True):
        path.write_bytes(content)
    assert _shard(source, target) == 0
    assert len(_read(target).train) == 12


def test_other_options_or_images_are_not_mixed_into_a_copy(folder, tmp_path, capsys):
    target = tmp_path / "target"
    assert _shard(folder, target) == 0
    assert _shard(folder, target) == 0
    assert "whole already" in capsys.readouterr().out
    assert _shard(folder, target, "--size", "24") == EXIT_BAD_INPUT
    assert "size 256, not 24" in capsys.readouterr().err
    assert _shard(_make(tmp_path / "other", train=3), target) == EXIT_BAD_INPUT
    assert "or another TARGET" in capsys.readouterr().err


def test_a_copy_has_one_maker(folder, tmp_path, capsys):
    (tmp_path / "parts").mkdir()
    with open(tmp_path / "parts" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert _shard(folder, tmp_path) == EXIT_BUSY
    assert capsys.readouterr().err.startswith("busy: another process makes")


SOURCES = {
    "no val": (lambda b: (b / "val").rename(b / "test"), [], "expected a folder val/ with one folder per class"),
    "flat val": (_flatten, [], "expected the same class folders"),
    "a stray file": (lambda b: (b / "val" / "list.txt").touch(), [], "expected only class folders .*list.txt"),
    "an empty class": (lambda b: _empty(b, "train"), [], "expected images in .*train/n02102040, got none"),
    "a bad size": (lambda b: None, ["--size", "-1"], "expected --size from 0 to"),
    "a bad quality": (lambda b: None, ["--quality", "100"], "expected --quality from 1 to 95, got 100"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_the_tool_refuses_in_one_sentence(case, tmp_path, capsys):
    change, options, message = SOURCES[case]
    change(_make(tmp_path / "source"))
    assert _shard(tmp_path / "source", tmp_path / "target", *options) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)


# -- decoding and loading ------------------------------------------------------------------------


def test_resized_crops_are_torchvisions_own(folder):
    image = _read(folder).train.image(0)
    for row in torch.rand(50, 3, dtype=torch.float64):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(row[0].item() * 2**53))
            expected = v2.Compose([v2.RandomResizedCrop(16, antialias=True), v2.RandomHorizontalFlip()])(image)
        assert torch.equal(resized_crop_flip(image, row, 16), expected)


def _photograph(path, width=640, height=480, mode="RGB"):
    pixels = np.random.default_rng(1).integers(256, size=(6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path, "JPEG")
    return path.read_bytes()


@pytest.mark.parametrize(("spare", "power"), [(0.5, 1), (1.9, 1), (2, 2), (3.9, 2), (5, 4), (100, 8)])
def test_reduced_decoding_keeps_what_is_needed(spare, power, tmp_path):
    content = _photograph(tmp_path / "image.jpg")
    exact, reduced = decode(content, "image"), decode(content, "image", lambda h, w: spare)
    assert exact.shape == (3, 480, 640)
    assert reduced.shape == (3, 480 // power, 640 // power)
    resized = v2.functional.resize(exact, list(reduced.shape[1:]), antialias=True)
    assert (reduced.float() - resized.float()).abs().mean() < 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_decodes_to_three_channels(mode, tmp_path):
    content = _photograph(tmp_path / "image.jpg", 50, 40, mode)
    exact, reduced = decode(content, "image"), decode(content, "image", lambda h, w: 1.0)
    assert exact.shape == (3, 40, 50)
    assert torch.equal(exact, reduced)
    assert decode(content, "image", lambda h, w: 2.0).shape == (3, 20, 25)


def test_reduced_decoding_never_enlarges_a_crop(tmp_path):
    _photograph(tmp_path / "image.jpg")
    split = Split(torch.zeros(1).long(), files=[tmp_path / "image.jpg"], reduced_decode=True)
    options = ImageOptions(image_size=48, augment="resized_crop", mean=[0.5] * 3, std=[0.2] * 3)
    data = ImageData(split, split, ["a"], options)
    exact = dataclasses.replace(split, reduced_decode=False)
    batches = [_batches(d, batch_size=1) for d in (data, dataclasses.replace(data, train=exact, test=exact))]
    reduced, whole = ([x for x, _ in b.test()] for b in batches)
    assert (reduced[0] - whole[0]).abs().mean() < 0.1  # the centre is the same picture
    sizes = []
    for row in torch.rand(60, 3, dtype=torch.float64):
        small = split.image(0, lambda h, w, row=row: min(random_box(row, h, w)[0][2:]) / 48)
        sizes.append(small.shape[1])
        assert min(random_box(row, *small.shape[1:])[0][2:]) >= 47  # rounding may cost a pixel
    assert len(Counter(sizes)) >= 3


def test_loader_processes_stay_from_epoch_to_epoch(folder):
    import multiprocessing

    before = {process.pid for process in multiprocessing.active_children()}
    alive = lambda: {process.pid for process in multiprocessing.active_children()} - before  # noqa: E731
    batches = _batches(_read(folder), workers=2)
    list(batches.train(0))
    first = alive()
    assert len(first) == 2
    next(batches.train(1))  # left in the middle
    list(batches.test())
    both = alive()
    assert first < both
    assert len(both) == 4  # two for images that are not augmented
    list(batches.train(2))
    list(batches.test())
    assert alive() == both
    batches.close()
    assert not alive()


def test_a_pass_inside_another_is_refused_not_mixed_up(folder):
    batches = _batches(_read(folder))
    outer = batches.train(0)
    next(outer)
    list(batches.test())  # by other processes
    next(batches.train(1))
    with pytest.raises(RuntimeError, match="one pass over loaded batches at a time"):
        next(outer)


# -- real images -------------------------------------------------------------------------------------


def test_imagenette_is_the_same_packed_and_in_folders(tmp_path):
    archives = {split: Path(os.environ.get("TRACT_DATA", "")) / f"imagenette160-{split}.tar" for split in SPLITS}
    if "TRACT_DATA" not in os.environ or not all(path.is_file() for path in archives.values()):
        pytest.skip("TRACT_DATA does not name a folder with imagenette160-train.tar and imagenette160-val.tar")
    for split, archive in archives.items():
        seen = Counter()
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).parent.name
                if member.isfile() and seen[name] < (20 if split == "train" else 5):
                    seen[name] += 1
                    tar.extract(member, tmp_path / "folder", filter="data")
    numbers = {"classes": 10, "train_images": 200, "test_images": 50, "image_size": 64}
    for size in ("0", "96"):
        assert _shard(tmp_path / "folder", tmp_path / size, "--size", size) == 0
    whole, same, small = (_read(tmp_path / name, **numbers) for name in ("folder", "0", "96"))
    assert fingerprint(whole) == fingerprint(same) != fingerprint(small)
    assert _bytes(_batches(whole).train(3)) == _bytes(_batches(same).train(3))
    assert {min(small.train.image(index).shape[1:]) for index in range(200)} == {96}
