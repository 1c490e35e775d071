"""Which samples make a batch, and that memory, loader processes and ranks give the same bytes."""

import dataclasses
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data.augment import crop_flip, normalise
from experiments.data.batches import Batches
from experiments.data.images import ImageData, ImageSamples, Split
from experiments.data.options import ImageOptions
from experiments.data.shares import shares
from experiments.randomness import epoch_draws, epoch_order
from experiments.ranks import Ranks
from runfolder.errors import UserError

CPU = torch.device("cpu")


def _images(count, channels=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def _data(train=53, test=23, **changes):
    splits = [Split(torch.arange(n) % 7, _images(n, seed=n)) for n in (train, test)]
    constants = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
    options = ImageOptions(image_size=8, augment="crop_flip", padding=2, flip=True, in_memory=True, **constants)
    return ImageData(*splits, [str(n) for n in range(7)], dataclasses.replace(options, **changes))


def _batches(data, rank=0, size=1, **changes):
    options = {"seed": 3, "batch_size": 16, "drop_last": False, "overfit": None, "eval_batch_size": 5, "workers": 0}
    return Batches(data, **(options | changes), ranks=Ranks(rank, size), device=CPU)


def _normalised(data, images):
    return normalise(images, torch.tensor(data.options.mean), torch.tensor(data.options.std))


def _same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for (x, y), (x2, y2) in zip(first, second, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


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
    assert torch.equal(x, _normalised(data, data.train.images[order]))
    assert torch.equal(y, data.train.labels[order])


def test_an_images_draws_belong_to_the_image_not_to_its_place():
    data = _data()
    order = torch.from_numpy(epoch_order(3, 1, 53))
    draws = torch.from_numpy(epoch_draws(3, 1, 53, 3))
    expected = crop_flip(data.train.images, draws, 2, True)[order]
    x = torch.cat([x for x, _ in _batches(data).train(1)])
    assert torch.equal(x, _normalised(data, expected))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_loader_processes_give_the_same_bytes_as_memory(workers):
    for augment, rotation, repeats in (("crop_flip", 0.0, 1), ("none", 0.0, 1), ("crop_flip", 20.0, 3)):
        memory, loaded = (_data(in_memory=kept, augment=augment, rotation=rotation) for kept in (True, False))
        first = workers  # entered in the middle too
        here = _batches(memory, repeats=repeats).train(1, first)
        _same(here, _batches(loaded, workers=workers, repeats=repeats).train(1, first))
    _same(_batches(memory).test(), _batches(loaded, workers=workers).test())


def test_repeated_augmentation_shows_copies_of_a_third_of_the_images():
    """Far apart in a batch, each copy augmented by draws of its own; another third in the next epoch."""
    for epoch in range(3):
        order = epoch_order(7, epoch, 53, repeats=3)
        assert len(order) == 53
        assert len(set(order.tolist())) == 53, "no sample twice"
        seen = (order % 53).tolist()
        assert len(set(seen)) == 18
        assert seen[::3] == epoch_order(7, epoch, 53)[:18].tolist()
    numbered = dataclasses.replace(_data(train=48), train=Split(torch.arange(48), _images(48)))
    for first, labels in _batches(numbered, repeats=3).train(0):
        places = {image: (labels == image).nonzero().flatten().tolist() for image in set(labels.tolist())}
        copies = [own for own in places.values() if len(own) > 1]
        assert len(copies) >= 4
        assert all(min(b - a for a, b in pairwise(own)) >= 4 for own in copies)
        assert sum(not torch.equal(first[own[0]], first[own[1]]) for own in copies) >= 3
    assert [len(part[1]) for part in _batches(numbered, repeats=3).train(0)] == [16, 16, 16]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("images", "group"), [(64, 8), (61, 8), (30, None), (17, 4), (16, 1)])
def test_images_that_are_mixed_with_each_other_are_on_one_rank(images, group, ranks):
    """Each image has one place; ranks have as many pairs, give or take one, of groups that are the same for all."""
    found, groups = shares(images, ranks, repeats=3, group=group, paired=True), {}
    assert sorted(np.concatenate([share.places for share in found]).tolist()) == list(range(images))
    pairs = [sum(-(-size // 2) for size in share.groups.values()) for share in found]
    assert max(pairs) - min(pairs) <= 1
    for share in found:
        parts = np.split(share.places, np.cumsum(list(share.groups.values()))[:-1])
        for number, part in zip(share.groups, parts, strict=True):
            groups.setdefault(number, set()).update(frozenset(pair) for pair in zip(part, part[::-1], strict=True))
    whole = shares(images, 1, repeats=3, group=group, paired=True)[0]
    for number, part in zip(
        whole.groups, np.split(whole.places, np.cumsum(list(whole.groups.values()))[:-1]), strict=True
    ):
        assert groups[number] == {frozenset(pair) for pair in zip(part, part[::-1], strict=True)}


def test_a_batch_without_a_pair_for_each_rank_is_refused():
    _batches(_data(), 0, 8, mixed=True, drop_last=True)
    with pytest.raises(UserError, match="expected batch_size to have two images, which are mixed, for each of 9 ranks"):
        _batches(_data(), 0, 9, mixed=True, drop_last=True)
    with pytest.raises(UserError, match="for each of 4 ranks in the last batch, got 5; set drop_last=true"):
        _batches(_data(train=53), 0, 4, mixed=True)


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


class _Noted(ImageSamples):
    """The same batches; a file has a byte for each one that was made of an epoch."""

    folder: Path

    def __getitem__(self, request):
        batch = super().__getitem__(request)
        with open(self.folder / str(request[1]), "ab", buffering=0) as file:
            file.write(b".")
        return batch


def test_the_next_epoch_is_begun_before_the_last_batch_is_taken(tmp_path):
    """And no more than two batches a process are made ahead; evaluation between the epochs changes nothing."""

    def made(epoch):
        path = tmp_path / str(epoch)
        return path.stat().st_size if path.exists() else 0

    def wait(epoch, count):
        end = time.monotonic() + 60
        while made(epoch) < count:
            assert time.monotonic() < end, f"{made(epoch)} batches of epoch {epoch}, not {count}"
            time.sleep(0.01)

    data = _data(train=160, in_memory=False)
    batches, alone = _batches(data, workers=2), _batches(data)
    batches._samples = _Noted(data, 3, 1, CPU)
    batches._samples.folder = tmp_path
    for epoch, first in ((0, 7), (1, 0), (2, 0)):
        taken = []
        for number, batch in zip(range(first, 10), batches.train(epoch, first, end=3), strict=True):
            taken.append(batch)
            if epoch < 2 and number == 8:
                wait(epoch + 1, 3)
        _same(taken, alone.train(epoch, first))
        if epoch < 2:
            wait(epoch + 1, 4)
            _same(batches.test(), alone.test())
            assert made(epoch + 1) == 4
    assert (made(0), made(1), made(2), made(3)) == (3, 10, 10, 0)
    _same(batches.train(3), alone.train(3))  # asked for after all
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_used_again_once_nobody_has_a_batch(workers):
    """Not even a part of it; and all batches are contiguous, whoever collates them."""
    batches, alone = _batches(_data(160, in_memory=False), workers=workers), _batches(_data(160))
    expected = [x.clone() for x, _ in alone.train(0)]
    held, places = [], []
    for number, (x, _) in enumerate(batches.train(0)):
        assert x.is_contiguous()
        places.append(x.data_ptr())
        if number < 2:
            held.append(x[1:])
    assert len(set(places)) == 4  # two are held, and while one is in use the next is made
    assert len(set(places[2:]) - set(places[:2])) == 2
    for part, whole in zip(held, expected, strict=False):
        assert torch.equal(part, whole[1:])
    _same(batches.train(1), alone.train(1))
    batches.close()


@pytest.mark.parametrize("kept", [True, False])
def test_an_epoch_does_not_depend_on_the_epochs_before_it(kept):
    data = _data(in_memory=kept, rotation=20.0)
    batches = _batches(data)
    for epoch in (0, 3, 0, 1):
        _same(batches.train(epoch), _batches(data).train(epoch))


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
    whole = _normalised(data, data.test.images)
    assert sorted(row.numpy().tobytes() for row in x) == sorted(row.numpy().tobytes() for row in whole)
    labels = torch.cat([y for part in parts for _, y in part])
    assert torch.equal(labels.sort().values, data.test.labels.sort().values)


@pytest.mark.parametrize(("tested", "expected"), [(1, 1), (6, 6), (23, 23), (99, 23), (None, 23)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_part_of_the_test_images_is_spread_evenly(tested, expected, ranks):
    """Images of a folder stand class by class."""
    data = _data(test=23)
    data.test.labels[:] = torch.arange(23)
    parts = [list(_batches(data, rank, ranks, eval_images=tested).test()) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    found = sorted(label for part in parts for _, y in part for label in y.tolist())
    assert len(set(found)) == len(found) == expected
    assert all(abs(label - k * 23 / expected) <= 1 for k, label in enumerate(found))


def test_a_last_batch_smaller_than_the_ranks_is_refused():
    with pytest.raises(Exception, match="drop_last=true"):
        _batches(_data(train=50), 0, 4)


ABANDONED = """
import torch
from tests.test_data_batches import _batches, _data
loader = _batches(_data(in_memory=False), workers=1).train(0)
next(loader)
print("loading", flush=True)
"""


@pytest.mark.slow
def test_a_trainer_that_ends_in_the_middle_does_not_wait_for_its_loader_processes_and_says_nothing_of_them():
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for _ in range(3):  # torch's handler of ended processes comes in time most times
        call = [sys.executable, "-W", "ignore", "-c", ABANDONED]
        done = subprocess.run(call, capture_output=True, env=environment, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"loading\n", b"")
