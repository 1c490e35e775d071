"""Labels drawn at random: a function of rate and seed, of the training images alone."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.config import choices_of, compose_config, config_hash, from_tree, to_tree
from experiments.data.batches import Batches, fingerprint
from experiments.data.digits import Digits
from experiments.data.imagefolder import ImageFolder
from experiments.data.imagenet import ImageNet
from experiments.data.label_noise import noisy_labels
from experiments.randomness import stream
from experiments.ranks import Ranks
from runfolder.errors import UserError

DIGITS = {"augment": "none", "mean": [0.5], "std": [0.5], "in_memory": True}
IMAGES = {"augment": "none", "image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}


def _generator(seed=0):
    return np.random.default_rng(seed)


# -- the function ------------------------------------------------------------------------------------


@given(n=st.integers(0, 60), rate=st.floats(0, 1), classes=st.integers(1, 9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_only_the_first_of_the_order_change(n, rate, classes, seed):
    labels = np.arange(n) % classes
    before = labels.copy()
    noisy = noisy_labels(labels, rate, classes, _generator(seed))
    order = _generator(seed).permutation(n)
    kept = order[int(n * rate) :]
    assert np.array_equal(noisy[kept], before[kept])
    assert np.array_equal(labels, before)
    assert not np.shares_memory(noisy, labels)
    assert noisy.dtype == labels.dtype
    assert ((noisy >= 0) & (noisy < classes)).all()


def test_new_labels_are_uniform_whatever_the_old_ones_were():
    """The true class among them: of 10 classes, nine tenths of the labels that are drawn differ."""
    labels = np.full(200_000, 3)
    noisy = noisy_labels(labels, 0.5, 10, _generator())
    assert (noisy != labels).mean() == pytest.approx(0.45, abs=0.005)
    drawn = noisy[_generator().permutation(len(labels))[:100_000]]
    counts = np.bincount(drawn, minlength=10)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 33.7  # chi-square of 9 degrees: 1 in 10,000


def test_the_labels_go_to_the_images_in_the_order_that_was_drawn():
    class Given:
        permutation = staticmethod(lambda n: np.array([4, 0, 3, 1, 2]))
        integers = staticmethod(lambda classes, size: np.array([7, 8, 9, 5, 6])[:size])

    assert noisy_labels(np.array([1, 2, 3, 4, 5]), 0.6, 10, Given()).tolist() == [8, 2, 3, 9, 7]


def test_a_larger_rate_keeps_what_a_smaller_one_changed():
    labels = np.full(1000, -1)
    small, large = (noisy_labels(labels, rate, 10, _generator()) for rate in (0.2, 0.6))
    changed = small != -1
    assert changed.sum() == 200
    assert (large != -1).sum() == 600
    assert np.array_equal(large[changed], small[changed])


# -- as an option ------------------------------------------------------------------------------------


def _digits(**options):
    return Digits(**(DIGITS | options)).load()


def test_training_labels_alone_are_noisy_and_as_the_function_gives_them():
    clean, noisy = _digits(), _digits(label_noise=0.3, label_noise_seed=5)
    expected = noisy_labels(clean.train.labels.numpy(), 0.3, 10, stream(5, "label noise"))
    assert np.array_equal(noisy.train.labels.numpy(), expected)
    assert torch.equal(noisy.test.labels, clean.test.labels)
    assert torch.equal(noisy.train.images, clean.train.images)
    assert not torch.equal(noisy.train.labels, clean.train.labels)


def test_a_data_set_that_is_made_again_of_its_parts_is_the_same():
    noisy = _digits(label_noise=0.3)
    again = dataclasses.replace(noisy, test=noisy.test)
    assert torch.equal(again.train.labels, noisy.train.labels)


def test_the_fingerprint_tells_rates_and_seeds_apart():
    changes = ({}, {"label_noise": 0.2}, {"label_noise": 0.3}, {"label_noise": 0.2, "label_noise_seed": 1})
    assert len({fingerprint(_digits(**change)) for change in changes}) == 4
    assert fingerprint(_digits(label_noise=0.0)) == fingerprint(_digits())


def _write(base, names):
    for split in ("train", "val"):
        for label, name in enumerate(names):
            (base / split / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (8, 8), (label, number, 0)).save(base / split / name / f"{number}.png")
    return str(base)


@pytest.mark.parametrize("kind", ["imagefolder in memory", "imagefolder", "imagenet"])
def test_images_of_folders_stay_what_they_are(kind, tmp_path):
    """The red of a pixel is the class of its folder, which the images are found by."""
    root = _write(tmp_path, ("n00000001", "n00000002", "n00000003"))
    options = IMAGES | {"label_noise": 0.5}
    if kind == "imagenet":
        numbers = {"classes": 3, "train_images": 24, "test_images": 24, "reduced_decode": False}
        data = ImageNet(root=root, **options, **numbers).load()
    else:
        data = ImageFolder(root=root, **options, in_memory=kind.endswith("memory")).load()
    found = [int(data.train.image(index)[0, 0, 0]) for index in range(24)]
    assert found == [label for label in range(3) for _ in range(8)]
    drawn = {"seed": 0, "batch_size": 24, "drop_last": False, "overfit": None, "eval_batch_size": 24, "workers": 0}
    batches = Batches(data, **drawn, ranks=Ranks(), device=torch.device("cpu"))
    ((images, labels),) = batches.train(0)
    reds, greens = (((images[:, channel, 0, 0] * 0.5 + 0.5) * 255).round().long() for channel in (0, 1))
    noisy = noisy_labels(np.repeat(np.arange(3), 8), 0.5, 3, stream(0, "label noise"))
    assert labels.tolist() == noisy[(8 * reds + greens).numpy()].tolist()
    assert (labels != reds).any()
    for images, labels in batches.test():
        assert torch.equal(((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long(), labels)


def test_no_share_of_labels_is_refused():
    with pytest.raises(ValueError, match=r"a rate of wrong labels in \[0, 1\], got 2"):
        noisy_labels(np.zeros(3), 2, 10, _generator())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_noise": 1.5}, "expected data.label_noise to be 0 to 1, got 1.5"),
        ({"label_noise": -0.1}, "expected data.label_noise to be 0 to 1, got -0.1"),
        ({"label_noise": float("nan")}, "expected data.label_noise to be 0 to 1, got nan"),
        ({"label_noise_seed": -1}, "expected data.label_noise_seed to be 0 or more, got -1"),
    ],
)
def test_bad_values_are_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        Digits(**(DIGITS | options))


# -- names of runs -----------------------------------------------------------------------------------

CLASSIFIED = [name for name in choices_of("data") if name != "voc2007"]


@pytest.mark.parametrize("name", CLASSIFIED)
def test_every_data_set_in_classes_takes_it_and_runs_without_it_keep_their_names(name, tmp_path):
    choice = {"data": name} | ({"data.root": str(tmp_path)} if name == "imagefolder" else {})
    choice |= {"data.corruption": "fog", "data.severity": 3} if name == "imagenet_c" else {}
    plain, zero, noisy, other = (
        compose_config("cifar_resnet", choice | change)
        for change in ({}, {"data.label_noise": 0}, {"data.label_noise": 0.2}, {"data.label_noise_seed": 1})
    )
    assert not {"label_noise", "label_noise_seed"} & {*plain.data}  # as in a configuration from before there were these
    assert config_hash(plain) == config_hash(zero)
    assert len({config_hash(config) for config in (plain, noisy, other)}) == 3
    for config in (plain, noisy, other):
        assert from_tree(to_tree(config)) == config
