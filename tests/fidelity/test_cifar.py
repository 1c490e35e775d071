"""The CIFAR recipes beside ViT-CIFAR's code and the constants of the authors' script.

The numbers of ViT-CIFAR are in vit_cifar.json, with how they were made.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.config import build, compose_config
from experiments.data.auto_augment import _PAIRS, changed
from experiments.data.images import ImageData, Split
from experiments.data.options import ImageOptions
from experiments.grid import plan
from experiments.ranks import Ranks
from experiments.tasks.losses import cross_entropy
from experiments.training.assembly import build_batches
from runfolder.errors import UserError

ORIGINAL = json.loads(Path(__file__).with_name("vit_cifar.json").read_text())
SOURCES = ("resnet_script", "vit_cifar")


def batches(config, images):
    """The batches of a run on images (n, 3, 32, 32)."""
    keys = ("image_size", "augment", "padding", "flip", "mean", "std")
    in_memory = config.data["augment"] in ("crop_flip", "none")
    options = ImageOptions(**{key: config.data[key] for key in keys}, in_memory=in_memory)
    split = Split(torch.arange(len(images)) % 10, images)
    data = ImageData(split, split, [str(n) for n in range(10)], options)
    return build_batches(config, data, Ranks(), torch.device("cpu"))


def recipe(source, **changes):
    return compose_config("cifar_vit", {"recipe.source": source, "runtime.workers": 0} | changes)


@pytest.mark.parametrize(("source", "steps", "last"), [("resnet_script", 390, 128), ("vit_cifar", 391, 80)])
def test_steps_of_an_epoch(source, steps, last):
    found = batches(recipe(source), torch.zeros(50_000, 3, 32, 32, dtype=torch.uint8))
    assert (found.steps_per_epoch, found.global_count(steps - 1)) == (steps, last)


@pytest.mark.parametrize(
    ("source", "std"), [("resnet_script", [0.2023, 0.1994, 0.2010]), ("vit_cifar", [0.2470, 0.2435, 0.2616])]
)
def test_inputs_are_divided_by_the_sources_deviations(source, std):
    images = torch.randint(256, (128, 3, 32, 32), dtype=torch.uint8)
    found = torch.cat([batch for batch, _ in batches(recipe(source), images).test()])
    mean = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
    torch.testing.assert_close(found, (images / 255 - mean) / torch.tensor(std)[:, None, None])


@pytest.mark.parametrize("epochs", [100, 200, 400])
def test_rates_of_vit_cifar(epochs):
    """Torch's cosine, which goes on from the rate before, is (pi / epochs)^2 / 4 above its closed form."""
    config = recipe("vit_cifar", epochs=epochs)
    schedule, expected = build(config.schedule), ORIGINAL["rates"]["rates"][str(epochs)]
    found = {e: config.optim["lr"] * schedule.factor(391 * int(e) + 200, 391, 391 * epochs) for e in expected}
    assert found == pytest.approx(expected, rel=1.01 * (np.pi / epochs) ** 2 / 4)


def test_the_rest_of_vit_cifar():
    config = recipe("vit_cifar")
    assert (config.precision, config.optim["weight_decay"], config.data["augment"]) == ("fp16", 5e-5, "auto_augment")
    scores, labels = torch.sin(torch.arange(80, dtype=torch.float64) * 1.3).view(8, 10), torch.arange(8)
    loss = cross_entropy(scores, labels, config.label_smoothing).item() / 8
    assert loss == pytest.approx(ORIGINAL["smoothing"]["loss"], rel=1e-12)


def picture():
    y, x, c = np.mgrid[0:32, 0:32, 0:3]
    return Image.fromarray((127.5 + 127.4 * np.sin(0.37 * x + 0.23 * y + 1.9 * c + 0.02 * x * y)).astype(np.uint8))


@pytest.mark.parametrize(("sign", "key"), [(-1, "minus"), (1, "plus")])
def test_auto_augment_changes_images_as_vit_cifar_does(sign, key):
    weights = np.arange(1, 32 * 32 * 3 + 1).reshape(32, 32, 3)
    found = []
    for pair in _PAIRS:
        image, means = picture(), []
        for name, _, level in pair:
            image = changed(image, name, level, sign)
            means.append(float((np.asarray(image) * weights).sum() / weights.sum()))
        found.append(means)
    assert len(found) == 25
    np.testing.assert_allclose(found, ORIGINAL["auto_augment"][key], atol=1e-5)


def test_auto_augment_follows_crop_and_flip_in_the_batches():
    """Of grey images only AutoAugment's grey borders and levels are left, and the crop's black ones."""
    config = recipe("vit_cifar", batch_size=64)
    state = random.getstate()
    ((images, _), *_) = batches(config, torch.full((64, 3, 32, 32), 200, dtype=torch.uint8)).train(0)
    assert random.getstate() == state
    assert len({image.numpy().tobytes() for image in images}) > 50


def test_figure_10_is_standardised_as_figure_3():
    """With CIFAR-100's own deviations X^T X would be 1.65 to 1.89 times smaller."""
    runs = plan("cifar_resnet", "figure10", {"seed": [0]})
    constants = {(config.data["name"], *config.data["mean"], *config.data["std"]) for config in runs}
    assert constants == {("cifar100", 0.4914, 0.4822, 0.4465, 0.2023, 0.1994, 0.2010)}
    own = compose_config("cifar_resnet", {"data": "cifar100"}).data["std"]
    ratios = (np.array(own) / np.array([0.2023, 0.1994, 0.2010])) ** 2
    assert (ratios.min().round(2), ratios.max().round(2)) == (1.65, 1.89)


def test_the_default_is_the_script_and_an_unknown_source_is_refused():
    default = compose_config("cifar_vit", {"runtime.workers": 0})
    script, other = map(recipe, SOURCES)
    assert default == script != other
    with pytest.raises(UserError, match=r"recipe.source=vit_cifra.*vit_cifar"):
        recipe("vit_cifra")
    for grid in ("figure4", "figure6", "figure7", "figure8"):
        for config in plan("cifar_vit", grid, {"recipe.source": ["vit_cifar"], "seed": [0]}):
            assert config.schedule["name"] == "gradual_cosine"
            assert (grid == "figure8") == (config.data["mean"] == [0.0, 0.0, 0.0])
