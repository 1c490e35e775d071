"""DeiT-III's pre-training and transfer: what its code feeds to a network, beside what ours does.

The numbers of the original are in deit.json, with how they were made.
"""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from experiments.config import build, compose_config
from experiments.data.images import ImageData, Split
from experiments.data.options import ImageOptions
from experiments.randomness import epoch_order
from experiments.ranks import Ranks
from experiments.tasks import mixing
from experiments.tasks.classification import Classification
from experiments.training.assembly import build_batches
from experiments.training.start import load_start

ORIGINAL = json.loads(Path(__file__).with_name("deit.json").read_text())
CPU = torch.device("cpu")


def numbered(images, size=1, classes=None):
    """A data set whose labels are the numbers of its images, or these modulo ``classes``."""
    pixels, labels = torch.zeros(images, 3, size, size, dtype=torch.uint8), torch.arange(images) % (classes or images)
    options = ImageOptions(image_size=size, augment="none", mean=[0.5] * 3, std=[0.5] * 3, in_memory=True)
    return ImageData(Split(labels, pixels), Split(labels[:1], pixels[:1]), ["c"] * (classes or images), options)


@cache
def recipe(batch_size, group, seed=0):
    """That of pre-training, but for these sizes."""
    return compose_config("imagenet_deit", {"batch_size": batch_size, "mix_group": group, "seed": seed})


def batches_of(data, config, rank=0, ranks=1):
    """A rank's, as a run has them."""
    return build_batches(config, data, Ranks(rank, ranks), CPU)


def groups_of(batches, epoch):
    """Step by step, {group: numbers of its images} of a rank's share."""
    groups = batches.shares(batches.batch_size)[batches.ranks.rank].groups
    for _, labels in batches.train(epoch):
        yield dict(zip(groups, labels.split(list(groups.values())), strict=True))


@pytest.mark.parametrize("layout", ORIGINAL["repeated_augmentation"]["layouts"], ids=lambda lay: f"{lay['gpus']} GPUs")
def test_a_group_is_what_a_gpu_of_the_original_gets(layout):
    """Image for image and in its order, where the two permutations of the data set are taken away."""
    images, gpus, per_gpu = layout["images"], layout["gpus"], layout["per_gpu"]
    place = np.argsort(epoch_order(3, 5, images))
    for ranks in (1, 2, gpus):
        parts = [batches_of(numbered(images), recipe(gpus * per_gpu, per_gpu, 3), rank, ranks) for rank in range(ranks)]
        assert parts[0].steps_per_epoch == layout["steps"]
        for step, shares in enumerate(zip(*(groups_of(part, 5) for part in parts), strict=True)):
            found = {group: place[labels].tolist() for share in shares for group, labels in share.items()}
            expected = layout["batches"].get(str(step))
            assert expected is None or [found[group] for group in range(gpus)] == expected


@pytest.fixture(scope="module")
def data():
    return numbered(131_072)


@pytest.mark.parametrize("figures", ORIGINAL["repeated_augmentation"]["figures"], ids=lambda f: f"{f['gpus']} GPUs")
def test_as_many_different_images_and_classes_as_in_the_original(data, figures):
    gpus, size = figures["gpus"], figures["gpus"] * figures["per_gpu"]
    parts = [batches_of(data, recipe(size, 256), rank, gpus) for rank in range(gpus)]
    assert parts[0].steps_per_epoch == figures["steps"]
    same, positives = [], []
    for shares in zip(*(groups_of(part, 0) for part in parts), strict=True):
        of_ranks = [torch.cat(list(share.values())) for share in shares]
        low, high = figures["distinct_of_a_gpu"]
        assert all(low <= len(own.unique()) <= high for own in of_ranks)
        low, high = figures["distinct_of_a_step"]
        assert low <= len(torch.cat(of_ranks).unique()) <= high
        for own in (part for share in shares for part in share.values()):
            same.append((own == own.flip(0)).double().mean().item())
            positives.append(1 + (own % 1000 != own.flip(0) % 1000).double().mean().item())
    assert np.mean(same) <= figures["share_mixed_with_a_copy_of_itself"]
    assert np.mean(positives) == pytest.approx(figures["positive_classes"], abs=1e-3)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 16, 32])
@pytest.mark.parametrize(("size", "group"), [(512, 64), (384, 256), (96, None), (90, 32)])
def test_what_is_mixed_does_not_depend_on_the_ranks(ranks, size, group):
    """Images and targets of the whole batch, through batches and task; every group has a draw of its own."""
    data = numbered(1536, size=8)
    data.train.images.copy_(torch.arange(1536 * 3 * 64).view(1536, 3, 8, 8) % 251)

    def mixed(ranks):
        found = {}
        for rank in range(ranks):
            part = batches_of(data, recipe(size, group), rank, ranks)
            share = part.shares(size)[rank]
            images, targets = Classification(recipe(size, group), 1536).prepared(
                next(part.train(0, 2)), 7, share.groups
            )
            assert len(images) == sum(share.groups.values()) > 0
            found |= {int(place): pair for place, *pair in zip(share.places, images, targets, strict=True)}
        assert sorted(found) == list(range(size)), "each image on one rank"
        return [torch.stack(part) for part in zip(*(found[place] for place in range(size)), strict=True)]

    images, targets = mixed(ranks)
    alone = mixed(1)
    assert torch.equal(images, alone[0])
    assert torch.equal(targets, alone[1])
    shares = targets.amax(1)[(targets > 0).sum(1) == 2].unique()
    assert len(shares) <= -(-size // (group or size))
    assert (targets.sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("case", ORIGINAL["mixing"]["cases"], ids=lambda case: f"{case['kind']} {case['beta']:.3f}")
def test_mixing_equals_timms_for_the_same_draws(case, monkeypatch):
    centre = iter(case["centre"])
    drawn = SimpleNamespace(
        random=lambda: case["switch"], beta=lambda a, b: case["beta"], integers=lambda size: next(centre)
    )
    monkeypatch.setattr(mixing, "stream", lambda *place: drawn)
    images = torch.arange(8 * 3 * 12 * 20, dtype=torch.float64).view(8, 3, 12, 20) / 1000
    before, weights = images.clone(), torch.arange(1, images.numel() + 1).view_as(images)
    mixed, targets = mixing.Mixing(0.8, 1.0, 8, seed=0)(images, torch.arange(8), 0, {0: 8})
    assert ((mixed * weights).sum() / weights.sum()).item() == pytest.approx(case["mean"], rel=1e-12)
    assert int((mixed != before).sum()) == case["changed"]
    expected = case["own_share"] * torch.eye(8) + (1 - case["own_share"]) * torch.eye(8).flip(0)
    torch.testing.assert_close(targets, expected.double())
    assert next(centre, None) is None


def test_a_position_embedding_is_interpolated_as_for_fine_tuning(tmp_path):
    """From 192 to 224 pixels, through the file of a checkpoint."""
    choices = {"model": "deit3_small", "stage": "finetune", "start_from": str(tmp_path / "a.pth")}
    config = compose_config("imagenet_deit", choices)
    before, after = (torch.nn.Module() for _ in range(2))
    before.pos_embed = torch.nn.Parameter(torch.sin(torch.arange(144 * 3, dtype=torch.float64) * 1.7).view(1, 144, 3))
    after.pos_embed = torch.nn.Parameter(torch.zeros(1, 196, 3, dtype=torch.float64))
    torch.save({"model": before.state_dict()}, tmp_path / "a.pth")
    load_start(config, after, lambda said: None)
    entries = ORIGINAL["position_embedding"]["entries"]
    found = after.pos_embed.detach().flatten()
    assert {i: found[int(i)].item() for i in entries} == pytest.approx(entries, abs=1e-6)


@pytest.mark.parametrize(("data", "epochs"), [("cifar10", 200), ("stanford_cars", 1000), ("flowers102", 5000)])
def test_rates_of_transfer(data, epochs):
    config = compose_config("transfer", {"data": data, "start_from": "a.pth"})
    assert config.epochs == epochs
    schedule = build(config.schedule)
    found = {
        epoch: config.optim["lr"] * schedule.factor(int(epoch) * 65 + 30, 65, 65 * epochs)
        for epoch in ORIGINAL["transfer_rates"]["rates"][str(epochs)]
    }
    assert found == pytest.approx(ORIGINAL["transfer_rates"]["rates"][str(epochs)], rel=1e-9)


@pytest.mark.parametrize(("size", "ratio", "interpolation"), [(224, 0.875, 3), (224, 1.0, 3), (160, 0.875, 2)])
def test_test_images_are_resized_and_cut_as_by_pillow(size, ratio, interpolation):
    """What DeiT's transform does (its modes: 2 bilinear, 3 bicubic); of noise, few pixels differ by a level or two."""
    names = {2: "bilinear", 3: "bicubic"}
    pixels = torch.randint(256, (4, 300, 250, 3), dtype=torch.uint8).permute(0, 3, 1, 2)  # as files are decoded
    options = ImageOptions(
        image_size=size,
        augment="none",
        crop_ratio=ratio,
        interpolation=names[interpolation],
        mean=[0.0] * 3,
        std=[1 / 255] * 3,
        in_memory=False,
    )
    split = Split(torch.arange(4), pixels)
    ((found, _),) = batches_of(ImageData(split, split, ["c"] * 4, options), recipe(4, 2)).test()
    original = transforms.Compose(
        [
            transforms.Resize(int(size / ratio), transforms.InterpolationMode(names[interpolation])),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
        ]
    )
    expected = [original(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels]
    differences = (found.round() - torch.stack(expected)).abs()
    assert differences.max() <= 2
    assert (differences > 0).double().mean() < 0.01
