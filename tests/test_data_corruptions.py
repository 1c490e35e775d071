"""Corrupted test images: what each kind does, that it grows with its severity, and that nothing else decides it."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from experiments.config import choices_of, compose_config, config_hash, from_tree, to_tree
from experiments.data import corruptions
from experiments.data.augment import normalise
from experiments.data.batches import Batches, fingerprint
from experiments.data.corruptions import CORRUPTIONS, corrupted
from experiments.data.digits import Digits
from experiments.data.imagefolder import ImageFolder
from experiments.data.imagenet import ImageNet, ImageNetC
from experiments.randomness import stream
from experiments.ranks import Ranks
from experiments.tools import shard_images
from runfolder.errors import UserError

DIGITS = {"augment": "none", "mean": [0.5], "std": [0.5], "in_memory": True}
DRAWN = [name for name in CORRUPTIONS if name.endswith("noise") or name in ("motion_blur", "haze")]


def _images(count=24, size=32, channels=3):
    """Smooth pictures with edges, some bright and some dark."""
    random, found = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(256, size=(6, 6, 3), dtype=np.uint8))
        pixels = np.array(coarse.resize((size, size), Image.Resampling.BICUBIC))
        top, left = random.integers(size // 2, size=2)
        pixels[top : top + size // 3, left : left + size // 3] = random.integers(256, size=3)
        found.append(pixels)
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)[:, :channels].contiguous()


def _change(before, after):
    return (before.int() - after.int()).abs().float().mean().item()


# -- laws of all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_change_grows_with_the_severity(name):
    images = _images()
    changes = [_change(images, corrupted(images, range(24), name, severity, 0)) for severity in range(6)]
    assert changes[0] == 0
    assert all(less < more for less, more in zip(changes, changes[1:], strict=False)), changes
    assert changes[5] < 100  # something is left of the picture


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_depends_on_its_number_not_on_its_batch(name):
    images, numbers = _images(6), [7, 0, 3, 10_000, 3, 8]
    whole = corrupted(images, numbers, name, 3, 1)
    for order, cuts in ((range(6), [1, 4]), ([4, 1, 5, 0, 3, 2], [2]), ([5, 4, 3, 2, 1, 0], [1, 2, 3, 4, 5])):
        parts = np.split(np.array(order), cuts)
        found = torch.cat([corrupted(images[part], [numbers[n] for n in part], name, 3, 1) for part in parts])
        assert torch.equal(found, whole[list(order)])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_drawn_follows_from_number_and_seed(name):
    images = _images(1).repeat(3, 1, 1, 1)
    first = corrupted(images, [0, 1, 0], name, 5, 0)
    other = corrupted(images, [0, 1, 0], name, 5, 1)
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[0], first[1]) == torch.equal(first, other) == (name not in DRAWN)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64), (3, 20, 31)])
def test_sizes_and_grey_images_are_kept(name, shape):
    images = _images(2, max(shape), shape[0])[..., : shape[1], : shape[2]]
    before = images.clone()
    found = corrupted(images, [0, 1], name, 2, 0)
    assert (found.shape, found.dtype) == (images.shape, torch.uint8)
    assert torch.equal(images, before)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("value", [0, 255])
def test_flat_images_stay_in_range(name, value):
    images = torch.full((2, 3, 32, 32), value, dtype=torch.uint8)
    found = corrupted(images, [0, 1], name, 5, 0)
    if name in ("gaussian_blur", "motion_blur", "pixelate", "jpeg_compression", "contrast"):
        assert (found.int() - images.int()).abs().max() <= 1  # which have nothing to lose but JPEG's rounding
    assert _change(images, found) < 90


# -- one by one ----------------------------------------------------------------------------------------


def _one(name, severity, image, number=4, seed=2):
    return corrupted(image[None], [number], name, severity, seed)[0]


def _degree(name, severity):
    return CORRUPTIONS[name][1][severity - 1]


def test_noise_has_the_moments_of_its_distribution():
    grey = torch.full((1, 3, 200, 200), 128, dtype=torch.uint8)
    x = 128 / 255
    for severity in range(1, 6):
        gaussian, shot, impulse = (
            corrupted(grey, [0], f"{kind}_noise", severity, 0).double() / 255
            for kind in ("gaussian", "shot", "impulse")
        )
        assert gaussian.mean().item() == pytest.approx(x, abs=0.002)
        assert gaussian.std().item() == pytest.approx(_degree("gaussian_noise", severity), rel=0.02)
        assert shot.mean().item() == pytest.approx(x, abs=0.002)
        assert shot.var().item() == pytest.approx(x / _degree("shot_noise", severity), rel=0.03)
        share = _degree("impulse_noise", severity)
        for value in (0.0, 1.0):
            assert (impulse == value).double().mean().item() == pytest.approx(share / 2, rel=0.15)
        assert ((impulse == 0) | (impulse == 1) | (impulse == x)).all()


def test_a_gaussian_blur_spreads_a_point_by_its_deviation():
    point = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    point[..., 16, 16] = 255
    for severity in range(2, 6):  # the first is narrower than a pixel
        weights = corrupted(point, [0], "gaussian_blur", severity, 0)[0, 0].double()
        square = ((torch.arange(33) - 16) ** 2).double()
        assert weights.sum().item() == pytest.approx(255, abs=8)  # each pixel is rounded
        spread = ((weights.sum(0) * square).sum() / weights.sum()).item() ** 0.5
        assert spread == pytest.approx(_degree("gaussian_blur", severity), rel=0.2)


@pytest.mark.parametrize("severity", range(1, 6))
def test_a_motion_blur_is_a_mean_of_moved_images(severity):
    """By moving the image itself, pixels in between by interpolation."""
    image, deviation = _images(1)[0], _degree("motion_blur", severity)
    angle = np.deg2rad(stream(2, "corruption motion_blur", 4).uniform(-45, 45))
    steps = np.arange(-int(np.ceil(2 * deviation)), int(np.ceil(2 * deviation)) + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    moved = [
        ndimage.shift(image.numpy() / 255, (0, -k * np.sin(angle), -k * np.cos(angle)), order=1, mode="nearest")
        for k in steps
    ]
    expected = sum(w * m for w, m in zip(weights, moved, strict=True)) / weights.sum() * 255
    assert np.abs(_one("motion_blur", severity, image).numpy() - expected).max() < 0.51


def test_a_brighter_image_has_so_much_more_and_a_duller_one_less_contrast():
    image = _images(1)[0]
    x = image.double() / 255
    mean = x.mean((1, 2), keepdim=True)
    for severity in range(1, 6):
        brighter = (x + _degree("brightness", severity)).clamp(0, 1) * 255
        duller = (mean + (x - mean) * _degree("contrast", severity)) * 255
        for name, expected in (("brightness", brighter), ("contrast", duller)):
            assert (_one(name, severity, image).double() - expected).abs().max() < 0.51


def test_pixels_become_larger_ones():
    image = _images(1, 20)[0]
    found = _one("pixelate", 4, image)  # 15 pixels in each direction
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = picture.resize((15, 15), Image.Resampling.BOX).resize((20, 20), Image.Resampling.BOX)
    assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_compressed_image_is_what_a_jpeg_file_gives(channels, tmp_path):
    image = _images(1, channels=channels)[0]
    picture = Image.fromarray(image[0].numpy() if channels == 1 else image.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "image.jpg", quality=58)
    with Image.open(tmp_path / "image.jpg") as file:
        expected = torch.from_numpy(np.array(file))
    found = _one("jpeg_compression", 3, image)
    assert torch.equal(found, expected[None] if channels == 1 else expected.permute(2, 0, 1))


def test_haze_lies_between_an_image_and_clouds_as_bright_as_its_brightest_pixel():
    image = _images(1)[0] // 2
    x, brightest = image.double() / 255, image.max().item() / 255
    found = [_one("haze", severity, image).double() / 255 for severity in (1, 5)]
    clouds = []
    for y, severity in zip(found, (1, 5), strict=True):
        weight = _degree("haze", severity) / (brightest + _degree("haze", severity))
        clouds.append((y - (1 - weight) * x) / (weight * brightest))
    assert (clouds[0] - clouds[1]).abs().max() < 0.06  # the same ones, and in all channels
    assert (clouds[1] - clouds[1][:1]).abs().max() < 0.02
    assert clouds[1].min().item() == pytest.approx(0, abs=0.02)
    assert clouds[1].max().item() == pytest.approx(1, abs=0.02)
    assert clouds[1][0].diff(dim=1).abs().mean() < 0.5 * clouds[1].std()  # 1.1 for pixels on their own


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("gausian_noise", 1, "unknown choice data.corruption=gausian_noise; nearest: gaussian_noise"),
        ("haze", 6, "expected data.severity to be 0 to 5 with data.corruption=haze, got 6"),
        ("haze", -1, "got -1"),
        ("haze", None, "got None"),
    ],
)
def test_unknown_ones_are_one_sentence(name, severity, message):
    for refused in (
        lambda: corrupted(_images(1), [0], name, severity, 0),
        lambda: Digits(**DIGITS, corruption=name, severity=severity),
    ):
        with pytest.raises(UserError, match=message):
            refused()


def test_a_number_for_each_image_is_needed():
    with pytest.raises(ValueError, match="zip"):
        corrupted(_images(2), [0], "contrast", 1, 0)


# -- as an option --------------------------------------------------------------------------------------


def _batches(data, **changes):
    options = {"seed": 1, "batch_size": 6, "drop_last": False, "overfit": None, "eval_batch_size": 100, "workers": 0}
    return Batches(data, **(options | {"ranks": Ranks()} | changes), device=torch.device("cpu"))


def _tested(batches):
    return torch.cat([images for images, _ in batches.test()])


@pytest.mark.parametrize("in_memory", [True, False])
def test_test_images_alone_are_corrupted_and_as_the_function_gives_them(in_memory):
    options = DIGITS | {"in_memory": in_memory, "image_size": 8}
    clean, foggy = (Digits(**options, **more).load() for more in ({}, {"corruption": "haze", "severity": 3}))
    expected = corrupted(clean.test.images, range(360), "haze", 3, 0)
    half = torch.tensor([0.5])
    assert torch.equal(_tested(_batches(foggy)), normalise(expected, half, half))
    for epoch, overfit in ((0, None), (1, None), (0, 2)):
        trained = [list(_batches(data, overfit=overfit).train(epoch)) for data in (clean, foggy)]
        assert all(torch.equal(a[0], b[0]) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_ranks_and_processes_do_not_matter(in_memory):
    options = DIGITS | {"in_memory": in_memory, "image_size": 8, "corruption": "gaussian_noise", "severity": 5}
    data = Digits(**options).load()
    whole = _tested(_batches(data))
    assert torch.equal(_tested(_batches(data, eval_batch_size=7)), whole)
    for rank in (0, 1):
        assert torch.equal(_tested(_batches(data, ranks=Ranks(rank, 2))), whole[rank::2])
    assert torch.equal(_tested(_batches(data, eval_images=36)), whole[::10])
    assert torch.equal(_tested(_batches(data, seed=9)), whole)
    if not in_memory:
        assert torch.equal(_tested(_batches(data, workers=2)), whole)


def test_severity_0_changes_nothing():
    data = Digits(**DIGITS, corruption="haze", severity=0).load()
    assert torch.equal(_tested(_batches(data)), _tested(_batches(Digits(**DIGITS).load())))


def test_a_severity_without_a_corruption_is_refused():
    with pytest.raises(UserError, match=r"expected data.corruption=NAME with data.severity=3, got null"):
        Digits(**DIGITS, severity=3)


def _write(base, part, names, size=(40, 30), shift=0):
    for label, name in enumerate(names):
        (base / part / name).mkdir(parents=True)
        for number in range(3):
            image = _images(1, 40)[0].roll(7 * number + label + shift, 2)[:, : size[1], : size[0]]
            file = base / part / name / f"ILSVRC2012_val_{label}{number:07}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)


NAMES = ("n00000001", "n00000002")
FOLDER = {"augment": "resized_crop", "image_size": 16, "mean": [0.0] * 3, "std": [1.0] * 3, "crop_ratio": 0.8}
NUMBERS = {"classes": 2, "train_images": 6, "test_images": 6, "reduced_decode": False}


@pytest.mark.parametrize("kind", [ImageFolder, ImageNet])
def test_images_of_folders_are_corrupted_as_the_network_sees_them(kind, tmp_path):
    for part in ("train", "val"):
        _write(tmp_path, part, NAMES)
    options = FOLDER | {"root": str(tmp_path)} | (NUMBERS if kind is ImageNet else {"in_memory": False})
    clean = (_tested(_batches(kind(**options).load())) * 255).round().to(torch.uint8)
    noisy = _tested(_batches(kind(**options, corruption="shot_noise", severity=4).load(), eval_batch_size=4))
    assert torch.equal((noisy * 255).round().to(torch.uint8), corrupted(clean, range(6), "shot_noise", 4, 0))


# -- ImageNet-C ----------------------------------------------------------------------------------------


@pytest.fixture
def imagenet_c(tmp_path):
    for shift, part in enumerate(("train", "gaussian_noise/1", "gaussian_noise/3", "fog/3")):
        _write(tmp_path, part, NAMES, (16, 16) if shift else (40, 30), shift)
    return tmp_path


def _read(root, **changes):
    options = FOLDER | NUMBERS | {"root": str(root), "corruption": "gaussian_noise", "severity": 3}
    return ImageNetC(**(options | changes)).load()


def _files(folder):
    paths = sorted(folder.glob("*/*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])


@pytest.mark.parametrize("packed", [False, True])
def test_the_folder_of_a_corruption_is_tested_as_it_is(packed, imagenet_c):
    """Also beside a sharded copy of ImageNet."""
    if packed:
        _write(imagenet_c / "whole", "val", NAMES)
        (imagenet_c / "train").rename(imagenet_c / "whole" / "train")
        assert shard_images.main([str(imagenet_c / "whole"), str(imagenet_c), "--size", "0", "--workers", "0"]) == 0
    for corruption, severity in (("gaussian_noise", 1), ("gaussian_noise", 3), ("fog", 3)):
        data = _read(imagenet_c, corruption=corruption, severity=severity)
        expected = _files(imagenet_c / corruption / str(severity))
        assert torch.equal((_tested(_batches(data)) * 255).round().to(torch.uint8), expected)
        assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.classes == list(NAMES)
        train = imagenet_c / "whole" / "train" if packed else imagenet_c / "train"
        assert torch.equal(torch.stack([data.train.image(n) for n in range(6)]), _files(train))


def test_the_fingerprint_tells_its_folders_apart(imagenet_c):
    choices = (("gaussian_noise", 1), ("gaussian_noise", 3), ("fog", 3))
    found = {fingerprint(_read(imagenet_c, corruption=name, severity=severity)) for name, severity in choices}
    assert len(found) == 3


def _drop_class(base):
    (base / "gaussian_noise" / "3" / NAMES[1]).rename(base / "away")


FOLDERS = {
    "no such corruption": (
        lambda b: None,
        {"corruption": "snow"},
        "expected train/ and snow/3/ .* got fog, gaussian_noise",
    ),
    "no such severity": (lambda b: None, {"severity": 2}, "expected train/ and gaussian_noise/2/ with one folder"),
    "no corruption": (
        lambda b: None,
        {"corruption": None},
        "data.corruption=NAME and data.severity=NUMBER .* got None",
    ),
    "no severity": (lambda b: None, {"severity": None}, "data.corruption=NAME and data.severity=NUMBER .* and None"),
    "no train": (lambda b: (b / "train").rename(b / "x"), {}, "expected train/ and gaussian_noise/3/ .* got fog"),
    "a class less": (_drop_class, {}, "same class folders in train/ and gaussian_noise/3/ .* n00000002 only in train/"),
    "too few": (
        lambda b: next((b / "gaussian_noise" / "3" / NAMES[0]).iterdir()).unlink(),
        {},
        "expected 6 images in .*gaussian_noise/3, got 5",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_wrong_folder_is_one_sentence(case, imagenet_c):
    change, options, message = FOLDERS[case]
    change(imagenet_c)
    with pytest.raises(UserError, match=message) as caught:
        _read(imagenet_c, **options)
    assert "\n" not in str(caught.value)


# -- names of runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in choices_of("data") if name not in ("voc2007", "imagenet_c")])
def test_every_data_set_in_classes_takes_it_and_runs_without_it_keep_their_names(name, tmp_path):
    choice = {"data": name} | ({"data.root": str(tmp_path)} if name == "imagefolder" else {})
    changes = ({}, {"data.corruption": "haze", "data.severity": 1}, {"data.corruption": "haze", "data.severity": 2})
    configs = [compose_config("cifar_resnet", choice | change) for change in changes]
    assert not {"corruption", "severity"} & {*configs[0].data}
    assert len({config_hash(config) for config in configs}) == 3
    assert all(from_tree(to_tree(config)) == config for config in configs)


def test_imagenet_c_says_its_folder_in_the_configuration():
    with pytest.raises(UserError, match="expected a value for data.corruption"):
        compose_config("cifar_resnet", {"data": "imagenet_c"})
    choices = {"data": "imagenet_c", "data.corruption": "fog", "data.severity": 3}
    assert compose_config("cifar_resnet", choices).data["corruption"] == "fog"


# -- real images ---------------------------------------------------------------------------------------


def test_real_images_change_more_with_every_severity():
    archive = Path(os.environ.get("TRACT_DATA", "")) / "cifar10-jpeg.tar.gz"
    if "TRACT_DATA" not in os.environ or not archive.is_file():
        pytest.skip("TRACT_DATA does not name a folder with cifar10-jpeg.tar.gz")
    with tarfile.open(archive) as tar:
        files = (tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg"))
        pixels = [np.array(Image.open(io.BytesIO(content))) for content, _ in zip(files, range(100), strict=False)]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    for name in CORRUPTIONS:
        changes = [_change(images, corrupted(images, range(100), name, severity, 0)) for severity in range(6)]
        assert changes == sorted(set(changes)), (name, changes)


def test_the_table_has_five_degrees_of_each():
    assert {len(degrees) for _, degrees in CORRUPTIONS.values()} == {corruptions.SEVERITIES}
