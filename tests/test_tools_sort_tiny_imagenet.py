"""TinyImageNet's download becomes folders of classes; at every moment each image is there, whole."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.config import build, compose_config
from experiments.tools import sort_tiny_imagenet
from runfolder.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError

TOOL = Path(sort_tiny_imagenet.__file__)
CLASSES = ("n01443537", "n01629819", "n01641577")
VAL = 7  # images, whose classes take turns


def _label(number):
    return CLASSES[number % 3]


def _jpeg(path, random):
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = random.integers(4) == 0  # some of the real ones are
    pixels = random.integers(256, size=(4, 4) if grey else (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(path, quality=90)


@pytest.fixture
def source(tmp_path):
    """The layout of the download."""
    base, random = tmp_path / "tiny-imagenet-200", np.random.default_rng(0)
    for name in CLASSES:
        for number in range(4):
            _jpeg(base / "train" / name / "images" / f"{name}_{number}.JPEG", random)
        (base / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t10\t63\t58\n")
    for number in range(VAL):
        _jpeg(base / "val" / "images" / f"val_{number}.JPEG", random)
    lines = [f"val_{number}.JPEG\t{_label(number)}\t0\t32\t44\t62\n" for number in range(VAL)]
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    for number in range(2):
        _jpeg(base / "test" / "images" / f"test_{number}.JPEG", random)
    (base / "wnids.txt").write_text("\n".join(CLASSES))
    return base


def _images(base):
    """{name: checksum} of all images, wherever they lie; no name is there twice."""
    paths = [path for path in base.rglob("*.JPEG") if path.is_file()]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert len(found) == len(paths)
    return found


def _places(base):
    return {path.relative_to(base): path.stat().st_mtime_ns for path in base.rglob("*")}


def _sorted(base):
    return {path.name: path.parent.name for path in (base / "val").glob("*/*.JPEG")}


def _load(base):
    return build(compose_config("cifar_resnet", {"data": "tiny_imagenet", "data.root": str(base)}).data).load()


EXPECTED = {f"val_{number}.JPEG": _label(number) for number in range(VAL)}


def test_the_sorted_folder_is_the_data_set_of_the_configuration(source, capsys):
    before = _images(source)
    assert sort_tiny_imagenet.main([str(source)]) == 0
    assert f"{VAL} images sorted, 0 were already" in capsys.readouterr().out
    assert _images(source) == before
    assert _sorted(source) == EXPECTED
    data = _load(source)
    assert data.classes == sorted(CLASSES)
    assert (len(data.train), len(data.test), data.shape) == (12, VAL, {"in_channels": 3, "image_size": 64})
    assert data.options.in_memory
    order = sorted(EXPECTED, key=lambda name: (EXPECTED[name], name))
    for index, name in enumerate(order):
        assert data.classes[data.test.labels[index]] == EXPECTED[name]
        pixels = np.asarray(Image.open(source / "val" / EXPECTED[name] / name).convert("RGB"))
        assert np.array_equal(data.test.image(index).permute(1, 2, 0).numpy(), pixels)


def test_done_again_it_changes_nothing(source, capsys):
    assert sort_tiny_imagenet.main([str(source)]) == 0
    before = _places(source)
    assert sort_tiny_imagenet.main([str(source)]) == 0
    assert f"0 images sorted, {VAL} were already" in capsys.readouterr().out
    assert _places(source) == before


@pytest.mark.parametrize("stop", range(VAL + 2))
def test_stopped_anywhere_it_goes_on_and_no_image_is_ever_missing(stop, source, monkeypatch):
    before, real, left = _images(source), os.rename, iter(range(stop))

    def rename(*paths):
        if next(left, None) is None:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "rename", rename)
    assert sort_tiny_imagenet.main([str(source)]) == (0 if stop == VAL + 1 else EXIT_INTERRUPTED)
    assert _images(source) == before
    monkeypatch.setattr(os, "rename", real)
    assert sort_tiny_imagenet.main([str(source)]) == 0
    assert _images(source) == before
    assert _sorted(source) == EXPECTED
    assert len(_load(source).test) == VAL


def test_unsorted_it_is_not_taken_for_a_data_set(source):
    with pytest.raises(UserError, match="same classes for training and testing"):
        _load(source)


def _annotations(change):
    def apply(source):
        path = source / "val" / "val_annotations.txt"
        path.write_text(change(path.read_text()))

    return apply


def _place_twice(source):
    (source / "val" / _label(0)).mkdir()
    (source / "val" / _label(0) / "val_0.JPEG").write_bytes(b"another")


WRONG = {
    "no folder": (
        lambda s: s.rename(s.with_name("other")),
        "expected train/ and val/val_annotations.txt .*no such folder",
    ),
    "a folder inside": (lambda s: (s / "train").rename(s / "training"), "got test, training, val, wnids.txt; give the"),
    "no labels": (
        lambda s: (s / "val" / "val_annotations.txt").unlink(),
        "expected train/ and val/val_annotations.txt",
    ),
    "an image less": (lambda s: (s / "val" / "images" / "val_3.JPEG").unlink(), "got no val_3.JPEG; unpack it again"),
    "an image more": (lambda s: (s / "val" / "images" / "x.JPEG").touch(), "expected a label .* got none for x.JPEG"),
    "an image twice": (_place_twice, "expected each image once, got val_0.JPEG both in"),
    "another class": (_annotations(lambda t: t.replace(CLASSES[1], "n09999999")), "class of train/ in line 2 of"),
    "a label twice": (_annotations(lambda t: t + t.splitlines()[0]), "an image of its own .* line 8 of"),
    "no tabs": (_annotations(lambda t: t.replace("\t", " ")), "class of train/ in line 1 of"),
    "a class less": (_annotations(lambda t: re.sub(rf".*{CLASSES[2]}.*\n", "", t)), "got none of n01641577"),
    "a path": (_annotations(lambda t: t.replace("val_0.JPEG", "../val_0.JPEG")), "an image of its own .* line 1 of"),
    "both": (lambda s: (s / "unlabelled").mkdir(), "expected test/ or unlabelled/ .* got both"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_one_sentence_and_stays_as_it_is(case, source, capsys):
    change, message = WRONG[case]
    change(source)
    before = _places(source.parent)
    assert sort_tiny_imagenet.main([str(source)]) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", said)
    assert re.search(message, said)
    assert _places(source.parent) == before


def test_a_test_folder_in_classes_is_left_alone(source):
    (source / "test" / "images").rename(source / "test" / CLASSES[0])
    assert sort_tiny_imagenet.main([str(source)]) == 0
    assert (source / "test" / CLASSES[0]).is_dir()


def test_it_runs_as_a_script(source):
    done = subprocess.run([sys.executable, TOOL, source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert _sorted(source) == EXPECTED
    done = subprocess.run([sys.executable, TOOL, source / "train"], capture_output=True, text=True)
    assert done.returncode == EXIT_BAD_INPUT
