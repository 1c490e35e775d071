"""Augmentation against the libraries that define it."""

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from torchvision.transforms import v2

from experiments.data import augment
from experiments.data.augment import (
    IN_BATCHES,
    ONE_BY_ONE,
    _posterize,
    _seeded,
    augment_one,
    crop_flip,
    normalise,
    pipeline,
    rotate,
    turns,
)
from experiments.data.draws import Draws
from experiments.data.options import ImageOptions
from experiments.randomness import epoch_draws


def _images(count, channels=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("padding", "flip"), [(4, True), (1, False), (0, True), (0, False), (3, True)])
def test_crop_and_flip_equal_torchvision_image_by_image(padding, flip):
    images, draws = _images(64), torch.rand(64, 3, dtype=torch.float64)
    draws[0], draws[1] = 0.0, 1 - 2**-53  # the extreme corners
    got = crop_flip(images, draws, padding, flip)
    for image, (row, column, mirror), result in zip(images, draws.tolist(), got, strict=True):
        padded = v2.functional.pad(image, [padding])
        places = 2 * padding + 1
        expected = v2.functional.crop(padded, int(row * places), int(column * places), 8, 8)
        if flip and mirror < 0.5:
            expected = v2.functional.horizontal_flip(expected)
        assert torch.equal(result, expected)


def test_offsets_and_flips_are_uniform_and_independent():
    # One bright column and row mark in an asymmetric image reveal what was done to it.
    n, padding, size = 20_000, 2, 8
    image = torch.zeros(2, size, size, dtype=torch.uint8)
    image[0, 3, :] = 1  # row 3: shows the vertical offset
    image[1, :, 3] = torch.arange(1, size + 1, dtype=torch.uint8).flip(0)
    image[1, :, 4] = 100
    draws = torch.from_numpy(epoch_draws(0, 0, n, 3))
    result = crop_flip(image.expand(n, -1, -1, -1), draws, padding, True)
    rows = 3 + padding - result[:, 0].amax(2).argmax(1)
    bright = (result[:, 1] == 100).any(1).int().argmax(1)
    dim = ((result[:, 1] > 0) & (result[:, 1] < 100)).any(1).int().argmax(1)
    flipped = bright < dim
    columns = torch.where(flipped, size - 1 - bright, bright)
    columns = 4 + padding - columns
    counts = np.zeros((5, 5, 2))
    np.add.at(counts, (rows.numpy(), columns.numpy(), flipped.long().numpy()), 1)
    assert stats.chisquare(counts.ravel()).pvalue > 1e-7


def test_normalise_equals_torchvision():
    images, mean, std = _images(5), [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    expected = v2.Normalize(mean, std)(v2.functional.to_dtype(images, torch.float32, scale=True))
    torch.testing.assert_close(normalise(images, torch.tensor(mean), torch.tensor(std)), expected)


@pytest.mark.parametrize("numbers", [1, 2 * 3 * 8 * 8, 10**9])
def test_normalising_part_by_part_is_normalising_all(numbers, monkeypatch):
    images, mean, std = _images(5), torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    expected = (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
    monkeypatch.setattr(augment, "_IN_CACHE", numbers)
    into = torch.full(images.shape, torch.nan)
    assert normalise(images, mean, std, into) is into
    assert torch.equal(into, expected)
    assert torch.equal(normalise(images, mean, std), expected)
    assert normalise(images[:0], mean, std).shape == (0, *images.shape[1:])


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_pipelines_of_single_images_depend_on_the_seed_alone(kind):
    """And leave the generators of torch, numpy and Python as they were."""
    image = _images(1, size=40)[0]
    seeds = torch.rand(60, dtype=torch.float64).tolist()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    results = [augment_one(image, seed, kind, 12, "bicubic") for seed in seeds]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert all(result.shape == (3, 12, 12) and result.dtype == torch.uint8 for result in results)
    again = [augment_one(image, seed, kind, 12, "bicubic") for seed in seeds]
    assert all(map(torch.equal, results, again))
    assert len({result.numpy().tobytes() for result in results}) > 50


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("rotation", "count"), [(0.0, 3000), (15.0, 100)])
@pytest.mark.parametrize("kind", IN_BATCHES + ONE_BY_ONE)
def test_every_augmentation_bears_thousands_of_images(kind, rotation, count):
    """RandAugment's rarest change befalls one image in 700."""
    images = _images(50, size=32)
    options = ImageOptions(image_size=32, augment=kind, padding=4, rotation=rotation, mean=None, std=None)
    draws, samples = Draws(options, 1, 0, count, torch.device("cpu")), torch.arange(count)
    if kind in IN_BATCHES:
        results = draws.augmented(images[samples % 50], samples)
    else:
        results = torch.stack(
            [draws.augmented_one(lambda spare=None, s=s: images[s % 50], s) for s in samples.tolist()]
        )
    assert (results.dtype, results.shape) == (torch.uint8, (count, 3, 32, 32))


@pytest.mark.filterwarnings("error")
def test_rand_augment_has_every_change_at_every_level():
    """Its last level of posterize keeps no bit: black (Pillow 11 and 12), which Pillow 13 refuses to make."""
    changes, image = pipeline("rand_augment", 32, "bicubic").transforms[2].transforms[0].ops, _images(1, size=32)[0]
    before = Image.fromarray(image.permute(1, 2, 0).numpy())
    assert len(changes) == 15
    for change in map(copy.copy, changes):
        change.prob, change.magnitude_std = 1.0, 0.0
        for level in range(11):
            change.magnitude = level
            after = change(before)
            assert (after.mode, after.size) == ("RGB", (32, 32)), (change.name, level)
            if change.name == "PosterizeIncreasing":
                bits = 4 - int(level * 0.4)
                expected = image.int() // 2 ** (8 - bits) * 2 ** (8 - bits)
                assert np.array_equal(np.array(after), expected.permute(1, 2, 0)), level


# Policy, least area, mean and std: OIALR's utils/datasets.py @ e9e885d.
IMAGENET, CIFAR10 = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
ERASING = {
    "rand_augment_erase": ("rand-m15-mstd0.5-inc1", 0.08, *IMAGENET),
    "rand_augment_erase_small": ("rand-m9-mstd0.5-inc1", 0.8, *CIFAR10),
}


@pytest.mark.parametrize("kind", ERASING)
def test_erasing_is_timms_of_normalised_images_as_far_as_pixels_go(kind):
    """The same seeds through timm's whole pipeline: the same pixels, but black and white for what lies beyond."""
    from timm.data import create_transform

    policy, area, mean, std = ERASING[kind]
    changes = create_transform(
        24, is_training=True, auto_augment=policy, mean=mean, std=std, scale=[area, 1.0], interpolation="random",
        re_prob=0.25, re_mode="pixel",
    )  # fmt: skip
    for change in changes.transforms[2].ops:
        if change.name == "PosterizeIncreasing":
            change.aug_fn = _posterize
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    beyond = 0
    for seed in torch.rand(80, dtype=torch.float64).tolist():
        image = _images(1, size=32)[0]
        with _seeded(int(seed * 2**53)):
            theirs = 255 * (changes(Image.fromarray(image.permute(1, 2, 0).numpy())) * std + mean)
        assert torch.equal(augment_one(image, seed, kind, 24, "bilinear"), theirs.round().clamp(0, 255).byte())
        beyond += ((theirs < -1) | (theirs > 256)).any().item()
    assert 8 < beyond < 36, "a quarter is erased"


def test_three_augment_makes_exactly_one_of_three_changes():
    """Of a smooth colour image: grey, or inverted above 128, or blurred; a third each; jitter taken away."""
    transforms = pipeline("three_augment", 16, "bicubic").transforms
    secondary = transforms[2].transforms[0]  # without the colour jitter
    assert [type(t).__name__ for t in transforms[2].transforms[1:]] == ["ColorJitter"]
    levels = np.arange(0, 256, 16)
    ramp = np.stack(np.broadcast_arrays(levels[:, None], 255 - levels, 90), 2).astype("uint8")
    image, kinds = Image.fromarray(ramp), Counter()
    solarised = np.array(ImageOps.solarize(image, 128))
    for seed in range(300):
        random.seed(seed)
        np.random.seed(seed)
        result = np.array(secondary(image)).astype(int)
        if (result.max(2) == result.min(2)).all():
            kinds["grey"] += 1
        elif np.array_equal(result, solarised):
            kinds["solarised"] += 1
        else:
            kinds["blurred"] += 1
            assert abs(result.mean() - ramp.mean()) < 3
    assert all(60 < kinds[kind] < 140 for kind in ("grey", "solarised", "blurred")), kinds


def test_rotation_looks_up_the_pixels_that_pillow_does():
    images, draws = _images(64, size=32), torch.rand(64, dtype=torch.float64)
    rotated = rotate(images, turns(draws, 15.0))
    differ = 0
    for image, draw, ours in zip(images, draws, rotated, strict=True):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).rotate((2 * draw.item() - 1) * 15.0)
        differ += (torch.from_numpy(np.array(theirs)).permute(2, 0, 1) != ours).any(0).sum().item()
    assert differ <= 64 * 32 * 32 / 1000  # Pillow computes with 16 binary places
    assert torch.equal(rotate(images, turns(torch.full((64,), 0.5, dtype=torch.float64), 15.0)), images)
    quarter = rotate(images, turns(torch.full((64,), 1.0, dtype=torch.float64), 90.0))
    assert torch.equal(quarter, torch.rot90(images, 1, (2, 3)))
