"""Images of all kinds of pixels, folders with all kinds of entries, and names of all kinds."""

import io
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, WebPImagePlugin
from torchvision.datasets.folder import default_loader
from torchvision.transforms.functional import pil_to_tensor

from experiments.config import build, compose_config
from experiments.data.decode import decode
from experiments.data.imagefolder import ImageFolder
from experiments.data.listing import images_in, list_images
from experiments.tools import shard_images
from experiments.training.stop import StopRequest, Wish
from runfolder.errors import UserError
from slurm.command import main

GREY = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
WIDE = GREY.astype(np.uint16) * 257


def saved(pixels, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def colours(mode):
    buffer = io.BytesIO()
    Image.fromarray(np.stack([GREY] * 3, axis=-1)).convert(mode).save(buffer, "TIFF")
    return buffer.getvalue()


PICTURE = saved(GREY[:32, :32], "PNG")
DEEP = {
    "8-bit PNG": saved(GREY, "PNG"),
    "16-bit PNG": saved(WIDE, "PNG"),
    "16-bit TIFF": saved(WIDE, "TIFF"),
    "16-bit TIFF, big-endian": saved(WIDE.astype(">u2"), "TIFF"),
    "16-bit PGM": b"P5\n256 64\n65535\n" + WIDE.astype(">u2").tobytes(),
    "10-bit PGM": b"P5\n256 64\n1023\n" + (GREY.astype(np.float64) / 255 * 1023).round().astype(">u2").tobytes(),
    "with alpha": colours("RGBA"),
    "CMYK": colours("CMYK"),
}


@pytest.mark.parametrize("name", DEEP)
def test_grey_is_the_same_grey_whatever_its_bits(name):
    image = decode(DEEP[name], name)
    assert image.dtype == torch.uint8
    assert (image - torch.from_numpy(GREY).int()).abs().max() <= 1


REFUSED = {
    "float TIFF": (saved((GREY / 255).astype(np.float32), "TIFF"), "floating-point"),
    "32-bit TIFF": (saved(GREY.astype(np.int32), "TIFF"), "32-bit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pixels_without_a_known_range_are_refused_by_name(name):
    content, words = REFUSED[name]
    with pytest.raises(UserError, match=rf"in x/{name}, got: .*{words}.* 8 or 16 bits"):
        decode(content, f"x/{name}")


def synsets(base, wrong=()):
    """train/ and val/ with two classes of three images, and other files {name: bytes} in the first class of train/."""
    for split in ("train", "val"):
        for name in ("n00000001", "n00000002"):
            (base / split / name).mkdir(parents=True)
            for number in range(3):
                (base / split / name / f"{number}.png").write_bytes(PICTURE)
    for name, content in dict(wrong).items():
        (base / "train" / "n00000001" / name).write_bytes(content)
    return base


@pytest.mark.parametrize("workers", ["0", "2"])
def test_all_images_that_cannot_be_packed_are_named(tmp_path, monkeypatch, capsys, workers):
    """Also those that fail with a RuntimeError, as a damaged AVIF does."""

    def fails(*_):
        raise RuntimeError("failed to decode")

    wrong = {"float.tiff": REFUSED["float TIFF"][0], "no.png": b"no", "deep.png": DEEP["16-bit PNG"]}
    base = synsets(tmp_path / "in", wrong | {"bad.webp": saved(GREY, "WEBP")})
    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "load", fails)
    assert shard_images.main([str(base), str(tmp_path / "out"), "--workers", workers]) == 2
    error = capsys.readouterr().err
    assert "3 that are not" in error
    for name in ("float.tiff (floating-point", "no.png (something else)", "bad.webp (failed to decode)"):
        assert f"n00000001/{name}" in error
    assert "deep.png" not in error


def imagefolder(root):
    options = {"image_size": None, "augment": "none", "padding": 0, "flip": False, "mean": None, "std": None}
    return ImageFolder(root=str(root), in_memory=None, **options)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_orientation_in_exif_is_ignored_as_torchvision_ignores_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    path.write_bytes(saved(np.stack([GREY] * 3, axis=-1), "JPEG", exif=exif))
    found = decode(path.read_bytes(), str(path))
    assert torch.equal(found, pil_to_tensor(default_loader(str(path))))
    assert found.shape == (3, 64, 256)


# -- folders ------------------------------------------------------------------------------


@pytest.fixture
def tangled(tmp_path):
    """A class with links of all kinds, folders and other files; and images beside the classes."""
    base, far = synsets(tmp_path / "base"), tmp_path / "far"
    far.mkdir()
    (far / "linked.png").write_bytes(PICTURE)
    cat = base / "train" / "n00000001"
    (cat / "more").symlink_to(far)
    (far / "round").symlink_to(cat)
    (cat / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (cat / "one.png").symlink_to(far / "linked.png")
    (cat / "notes.txt").write_text("no image")
    (cat / ".hidden.png").write_bytes(b"")
    (base / "train" / "astray.png").write_bytes(PICTURE)
    return base


def test_links_are_followed_and_what_is_left_out_is_named(tangled):
    images, others = images_in(tangled / "train" / "n00000001", deep=True)
    assert images == ["0.png", "1.png", "2.png", "more/linked.png", "one.png"]
    assert others == ["gone.png (a link to nothing)", "more/round (a link back)", "notes.txt (no image)"]


def test_an_image_folder_names_what_it_leaves_out(tangled, capsys):
    shutil.copytree(tangled / "val", tangled / "test")
    imagefolder(tangled).load()
    said = capsys.readouterr().out
    assert "/train: 4 entries are left out: " in said
    for name in ("astray.png (not in a class)", "n00000001/gone.png (a link to nothing)", "n00000001/notes.txt"):
        assert name in said


def test_flat_folders_name_the_folders_in_them(tangled, capsys):
    listing = list_images(tangled / "train", ["n00000001", "n00000002"])
    assert len(listing) == 4 + 3
    assert "n00000001/more/ (a folder)" in capsys.readouterr().out


def test_a_class_that_is_a_link_to_nothing_is_named(tangled, tmp_path, capsys):
    (tangled / "train" / "astray.png").unlink()
    (tangled / "train" / "n00000003").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"n00000003 \(a link to nothing\)"):
        from_config({"data": "imagenet", "data.root": str(tangled), "data.classes": None}).load()


def from_config(settings):
    small = {"data.train_images": None, "data.test_images": None}
    return build(compose_config("imagenet_resnet", small | settings).data)


@pytest.mark.parametrize("data", ["imagefolder", "imagenet"])
def test_a_folder_that_cannot_be_read_is_one_sentence(tangled, monkeypatch, data):
    (tangled / "train" / "astray.png").unlink()
    scandir = os.scandir

    def refuses(path):
        if str(path).endswith("n00000002"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    settings = {"data.classes": None} if data == "imagenet" else {}
    source = from_config({"data": data, "data.root": str(tangled)} | settings) if settings else imagefolder(tangled)
    with pytest.raises(UserError, match=r"can be read in data\.root=/.*Permission denied \(.*n00000002\)"):
        source.load()


def test_errors_of_a_relative_root_give_the_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"data.root={tmp_path}/data/x, got no such folder"):
        imagefolder("data/x").load()


# -- names --------------------------------------------------------------------------------


def test_names_that_are_not_utf8_train_and_resume(tmp_path):
    """In the data's root and of an image, with an output that takes UTF-8 only, and in the C locale."""
    base = os.fsencode(tmp_path) + b"/bilder\xe9"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = os.path.join(base, split.encode(), name.encode())
            os.makedirs(folder)
            for number in range(4):
                with open(os.path.join(folder, b"%d\xe9.png" % number), "wb") as file:
                    file.write(saved(GREY[:16, :16], "PNG"))
    call = [sys.executable, "experiments/quickstart.py", "data=imagefolder", b'data.root="' + base + b'"']
    call += [f"runtime.runs={tmp_path}/runs", "max_steps=2", "runtime.threads=1", "runtime.progress=false"]
    for environment in ({"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"}, {"LC_ALL": "C"}):
        done = subprocess.run(call, env=os.environ | environment, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode(errors="replace")
    (folder,) = (tmp_path / "runs" / "quickstart").iterdir()
    assert b"udce9" in (folder / "config.yaml").read_bytes().lower()
    assert main("quickstart", "", "quickstart", ["--resume", str(folder)]) == 0


def test_a_run_goes_on_with_the_data_it_began_with_or_says_which_differ(tmp_path, monkeypatch, capsys):
    for place, classes in (("a", ("cat", "dog")), ("b", ("bird", "frog"))):
        for split in ("train", "test"):
            for name in classes:
                (tmp_path / place / "data" / "mine" / split / name).mkdir(parents=True)
                for number in range(8):
                    path = tmp_path / place / "data" / "mine" / split / name / f"{number}.png"
                    path.write_bytes(saved(GREY[:16, :16], "PNG"))
    monkeypatch.chdir(tmp_path / "a")
    settings = ["data=imagefolder", "data.root=data/mine", "batch_size=4", "epochs=2", "runtime.threads=1"]
    with monkeypatch.context() as stopping:
        calls = iter(range(100))
        stopping.setattr(StopRequest, "wish", lambda self: Wish.STOP if next(calls) == 3 else Wish.GO_ON)
        assert main("quickstart", "", "quickstart", [*settings, f"runtime.runs={tmp_path}/runs"]) == 75
    (folder,) = (tmp_path / "runs" / "quickstart").iterdir()
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    monkeypatch.chdir(tmp_path / "b")
    capsys.readouterr()
    assert main("quickstart", "", "quickstart", ["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"got others in data.root={tmp_path}/b/data/mine" in error
    assert len(set(re.findall(r"fingerprint ([0-9a-f]{16})", error))) == 2
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    monkeypatch.chdir(tmp_path / "a")
    assert main("quickstart", "", "quickstart", ["--resume", str(folder)]) == 0


@pytest.mark.slow
def test_a_bad_image_in_a_loader_process_is_one_sentence(tmp_path):
    base = synsets(tmp_path / "in", {"zz.png": b"no image"})
    (base / "val").rename(base / "test")
    call = [sys.executable, "experiments/quickstart.py", "data=imagefolder", f"data.root={base}", "batch_size=7"]
    call += ["data.in_memory=false", "data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]", "data.image_size=32"]
    call += [f"runtime.runs={tmp_path}/runs", "runtime.workers=2", "runtime.threads=1", "runtime.progress=false"]
    for _ in range(3):
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"expected a readable image in {base}/train/n00000001/zz.png" in done.stderr
