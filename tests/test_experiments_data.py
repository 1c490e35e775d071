import dataclasses
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from torchvision.transforms import v2

from experiments.training.augment import ONE_BY_ONE, augment_one, crop_flip, normalise, pipeline, rotate
from experiments.training.data import Batches
from experiments.training.datasets import ImageData, Split
from experiments.training.parallel import Ranks
from experiments.training.randomness import epoch_draws, epoch_order, seed_torch, stream

CPU = torch.device("cpu")


def _images(count, channels=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def _data(train=53, test=23, **changes):
    splits = [Split(torch.arange(n) % 7, _images(n, seed=n)) for n in (train, test)]
    data = ImageData(
        *splits, [str(n) for n in range(7)], 3, 8, [0.5, 0.4, 0.3], [0.2, 0.3, 0.25], "crop_flip", 2, True, True
    )
    return dataclasses.replace(data, **changes)


def _batches(data, rank=0, size=1, **changes):
    options = {"seed": 3, "batch_size": 16, "drop_last": False, "overfit": None, "eval_batch_size": 5, "workers": 0}
    return Batches(data, **(options | changes), ranks=Ranks(rank, size), device=CPU)


def _same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for (x, y), (x2, y2) in zip(first, second, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


# -- randomness --------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2, 1437])
def test_an_order_is_a_permutation(images):
    assert sorted(epoch_order(5, 2, images)) == list(range(images))


def test_orders_of_different_epochs_and_seeds_are_unrelated():
    n = 2000
    orders = [epoch_order(seed, epoch, n) for seed, epoch in product(range(3), range(4))]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Fixed points of a random permutation are Poisson(1): more than 10 have probability 1e-8.
            assert (first == second).sum() <= 10
            # Rank correlation of independent orders has deviation n^-1/2.
            assert abs(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]) < 6 / n**0.5


def test_every_position_of_an_order_is_equally_likely():
    places = np.array([np.argsort(epoch_order(seed, 0, 10)) for seed in range(2000)])
    for image in range(10):
        assert stats.chisquare(np.bincount(places[:, image], minlength=10)).pvalue > 1e-7


def test_streams_of_different_purposes_and_places_are_independent():
    keys = [(0, "order", 1), (0, "augment", 1), (1, "order", 1), (0, "order", 2), (1, "order", 0)]
    draws = np.array([stream(*key).random(20_000) for key in keys])
    for row in draws:
        assert stats.kstest(row, "uniform").pvalue > 1e-7
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 6 / 20_000**0.5
    assert np.array_equal(stream(*keys[0]).random(5), stream(*keys[0]).random(5))


def test_seeding_torch_makes_its_draws_a_function_of_the_place():
    def draw(*place):
        seed_torch(4, "step", *place)
        return torch.rand(4)

    first = draw(7, 0)
    torch.rand(100)
    assert torch.equal(draw(7, 0), first)
    assert not torch.equal(draw(7, 1), first)
    assert not torch.equal(draw(8, 0), first)


# -- augmentation --------------------------------------------------------------------------------


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
    rotated = rotate(images, draws, 15.0)
    differ = 0
    for image, draw, ours in zip(images, draws, rotated, strict=True):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).rotate((2 * draw.item() - 1) * 15.0)
        differ += (torch.from_numpy(np.array(theirs)).permute(2, 0, 1) != ours).any(0).sum().item()
    assert differ <= 64 * 32 * 32 / 1000  # Pillow computes with 16 binary places
    assert torch.equal(rotate(images, torch.full((64,), 0.5, dtype=torch.float64), 15.0), images)
    quarter = rotate(images, torch.full((64,), 1.0, dtype=torch.float64), 90.0)
    assert torch.equal(quarter, torch.rot90(images, 1, (2, 3)))


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("train", [48, 52, 53, 60])
def test_the_ranks_shares_make_up_the_global_batch(train, ranks, drop_last):
    data = _data(train=train)
    whole = _batches(data, drop_last=drop_last)
    parts = [_batches(data, rank, ranks, drop_last=drop_last) for rank in range(ranks)]
    assert whole.steps_per_epoch == (train // 16 if drop_last else -(-train // 16))
    together = [
        tuple(torch.cat(part) for part in zip(*shares, strict=True))
        for shares in zip(*(part.train(1) for part in parts), strict=True)
    ]
    _same(together, whole.train(1))
    assert [len(y) for _, y in together] == [whole.global_count(step) for step in range(whole.steps_per_epoch)]


def test_an_epoch_visits_each_image_once_as_drawn():
    data = _data(augment="none")
    x = torch.cat([x for x, _ in _batches(data).train(2)])
    y = torch.cat([y for _, y in _batches(data).train(2)])
    order = torch.from_numpy(epoch_order(3, 2, 53))
    assert torch.equal(x, normalise(data.train.images[order], torch.tensor(data.mean), torch.tensor(data.std)))
    assert torch.equal(y, data.train.labels[order])


def test_an_images_draws_belong_to_the_image_not_to_its_place():
    data = _data()
    order = torch.from_numpy(epoch_order(3, 1, 53))
    draws = torch.from_numpy(epoch_draws(3, 1, 53, 3))
    expected = crop_flip(data.train.images, draws, 2, True)[order]
    x = torch.cat([x for x, _ in _batches(data).train(1)])
    assert torch.equal(x, normalise(expected, torch.tensor(data.mean), torch.tensor(data.std)))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_loader_processes_give_the_same_bytes_as_memory(workers):
    for augment, rotation, repeats in (("crop_flip", 0.0, 1), ("none", 0.0, 1), ("crop_flip", 20.0, 3)):
        memory, loaded = (_data(in_memory=kept, augment=augment, rotation=rotation) for kept in (True, False))
        first = workers  # entered in the middle too
        here = _batches(memory, repeats=repeats).train(1, first)
        _same(here, _batches(loaded, workers=workers, repeats=repeats).train(1, first))
    _same(_batches(memory).test(), _batches(loaded, workers=workers).test())


def test_repeated_augmentation_shows_copies_of_a_third_of_the_images():
    """Beside each other, each copy augmented by draws of its own; another third in the next epoch."""
    for epoch in range(3):
        order = epoch_order(7, epoch, 53, repeats=3)
        assert len(order) == 53
        assert len(set(order.tolist())) == 53, "no sample twice"
        seen = (order % 53).tolist()
        assert [len(set(seen[k : k + 3])) for k in range(0, 51, 3)] == [1] * 17
        assert len(set(seen)) == 18
        assert seen[::3] == epoch_order(7, epoch, 53)[:18].tolist()
    data = _data(train=48)
    ((first, labels), *_) = _batches(data, repeats=3).train(0)
    assert torch.equal(labels[0:15:3], labels[1:15:3])
    assert sum(not torch.equal(first[k], first[k + 1]) for k in range(0, 15, 3)) >= 3
    assert [len(part[1]) for part in _batches(data, repeats=3).train(0)] == [16, 16, 16]


def test_resized_crops_do_not_depend_on_loader_processes():
    data = _data(in_memory=False, augment="resized_crop")
    before = torch.get_rng_state()
    here = list(_batches(data).train(0))
    assert torch.equal(torch.get_rng_state(), before)
    _same(here, _batches(data, workers=2).train(0))
    assert not torch.equal(here[0][0], next(iter(_batches(data).train(1)))[0])


@pytest.mark.parametrize("kept", [True, False])
def test_an_epoch_entered_in_the_middle_goes_on_as_the_whole_one(kept):
    batches = _batches(_data(in_memory=kept))
    whole = list(batches.train(4))
    for first in range(batches.steps_per_epoch + 1):
        _same(batches.train(4, first), whole[first:])


@pytest.mark.parametrize("kept", [True, False])
def test_overfitting_repeats_the_first_batches_unaugmented(kept):
    data = _data(in_memory=kept)
    batches = _batches(data, overfit=2)
    assert batches.steps_per_epoch == 2
    _same(batches.train(0), batches.train(9))
    _same(batches.train(0), list(_batches(_data(augment="none")).train(0))[:2])


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("test", "ranks"), [(23, 1), (23, 2), (23, 3), (23, 4), (20, 4), (2, 4), (1, 3), (5, 1)])
def test_evaluation_covers_each_image_once_in_as_many_batches_on_every_rank(test, ranks, kept):
    data = _data(test=test, in_memory=kept)
    parts = [list(_batches(data, rank, ranks).test()) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert max(len(y) for part in parts for _, y in part) <= 5
    x = torch.cat([x for part in parts for x, _ in part])
    whole = normalise(data.test.images, torch.tensor(data.mean), torch.tensor(data.std))
    assert sorted(row.numpy().tobytes() for row in x) == sorted(row.numpy().tobytes() for row in whole)
    labels = torch.cat([y for part in parts for _, y in part])
    assert torch.equal(labels.sort().values, data.test.labels.sort().values)


def test_a_last_batch_smaller_than_the_ranks_is_refused():
    with pytest.raises(Exception, match="drop_last=true"):
        _batches(_data(train=50), 0, 4)


ABANDONED = """
import torch
from tests.test_experiments_data import _batches, _data
loader = _batches(_data(in_memory=False), workers=1).train(0)
next(loader)
print("loading", flush=True)
"""


def test_a_trainer_that_ends_in_the_middle_does_not_wait_for_its_loader_processes():
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", ABANDONED], capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"loading\n"), done.stderr.decode()
