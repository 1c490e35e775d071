"""The published recipes, value by value, and their arithmetic: steps, rates at chosen steps, images seen.

Facts: pytorch-cifar100 at commit 11d8418, the commands of the DeiT-III repository, section 4 of arXiv 2410.23970.
"""

import re

import numpy as np
import pytest

from experiments.config import CONF, build, compose_config
from experiments.grid import plan
from experiments.randomness import epoch_order
from experiments.training.loop import total_steps

IMAGENET = 1_281_167


def rates(config, steps_per_epoch):
    """Epoch (from 0) -> the rate in its first step."""
    schedule, steps = build(config.schedule), total_steps(config, steps_per_epoch)
    return [
        config.optim["lr"] * schedule.factor(epoch * steps_per_epoch, steps_per_epoch, steps)
        for epoch in range(config.epochs)
    ]


def holds(config, facts):
    """All facts {dotted key: value} of a configuration."""
    for key, value in facts.items():
        node = config
        for part in key.split("."):
            node = node[part] if isinstance(node, dict) else getattr(node, part)
        assert node == value, key
    return True


# -- CIFAR-100 ----------------------------------------------------------------------------

CIFAR100 = {
    "batch_size": 128, "drop_last": False, "loss": "cross_entropy", "label_smoothing": 0.0, "precision": "fp32",
    "optim.name": "sgd", "optim.lr": 0.1, "optim.momentum": 0.9, "optim.weight_decay": 5e-4, "optim.nesterov": False,
    "decay_matrices_only": False, "data.name": "cifar100", "data.augment": "crop_flip", "data.padding": 4,
    "data.flip": True, "data.rotation": 15.0, "mixup": 0.0, "cutmix": 0.0, "repeats": 1,
}  # fmt: skip


@pytest.mark.parametrize(("epochs", "drops", "steps"), [(200, [59, 119, 159], 78_200), (133, [39, 79, 106], 52_003)])
def test_the_36_networks(epochs, drops, steps):
    config = compose_config("cifar100_zoo", {"epochs": epochs})
    assert holds(config, CIFAR100)
    assert total_steps(config, 391) == steps
    by_epoch = rates(config, 391)
    assert by_epoch[0] == 0
    expected = [0.1 * 0.2 ** sum(epoch >= drop for drop in drops) for epoch in range(1, epochs)]
    assert by_epoch[1:] == pytest.approx(expected, rel=1e-12)


def test_all_36_networks_have_both_arms_and_the_short_one():
    runs = plan("cifar100_zoo", "table1", {"seed": [0]})
    assert len({config.model["name"] for config in runs}) == 36
    counts = {}
    for config in runs:
        arm = (config.method["name"], config.epochs)
        counts[arm] = counts.get(arm, 0) + 1
    assert counts == {("vanilla", 200): 36, ("tract", 200): 36, ("tract", 133): 36}


# -- VOC ------------------------------------------------------------------------------------

DETECTION = {
    "micro_batch": 1, "bias_lr": 2.0, "precision": "fp32", "optim.name": "sgd", "optim.lr": 1e-3,
    "optim.momentum": 0.9, "optim.weight_decay": 5e-4, "data.name": "voc2007", "data.flip": True,
    "model.min_size": 600, "model.max_size": 1000, "model.width": 64, "model.hidden": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "images", "steps", "drops_at", "with_decay_of_biases"),
    [("simple_faster_rcnn", 1, 14 * 5011, 10 * 5011, False), ("py_faster_rcnn", 2, 70_000, 50_000, True)],
)
def test_detection_is_one_of_two_public_programs(source, images, steps, drops_at, with_decay_of_biases):
    runs = plan("detection_voc", "table5", {"recipe.source": [source]})
    assert [(config.method["name"], config.seed) for config in runs] == [
        ("vanilla", 0), ("vanilla", 1), ("tract", 0), ("tract", 1),
    ]  # fmt: skip
    for config in runs:
        assert holds(config, DETECTION)
        assert config.method.get("lambda_", 0.1) == 0.1
        assert config.batch_size == images
        assert total_steps(config, 5011) == steps
        assert config.decay_matrices_only is not with_decay_of_biases
        schedule, of_epoch = build(config.schedule), -(-5011 // images)
        found = [schedule.factor(step, of_epoch, steps) for step in (0, drops_at - 1, drops_at, steps - 1)]
        assert found == pytest.approx([1, 1, 0.1, 0.1])


# -- ImageNet, ResNets ----------------------------------------------------------------------

RESNET = {
    "batch_size": 256, "drop_last": False, "loss": "cross_entropy", "label_smoothing": 0.0, "optim.name": "sgd",
    "optim.momentum": 0.9, "optim.nesterov": False, "optim.weight_decay": 1e-4, "data.name": "imagenet",
    "data.image_size": 224, "data.augment": "resized_crop", "data.crop_ratio": 0.875, "runtime.gpus": 1,
}  # fmt: skip


@pytest.mark.parametrize(("epochs", "lr"), [(30, 0.141), (60, 0.1), (90, 0.1)])
def test_imagenet_resnets(epochs, lr):
    for config in plan("imagenet_resnet", "table2", {"epochs": [epochs]}):
        assert holds(config, RESNET | {"optim.lr": lr})
        third = epochs // 3
        assert rates(config, 5005) == pytest.approx([lr] * third + [lr / 10] * third + [lr / 100] * third)
        assert total_steps(config, 5005) == 5005 * epochs


def test_the_grid_of_rates():
    runs = plan("imagenet_resnet", "table2_lr", {})
    assert {config.optim["lr"] for config in runs} == {0.2, 0.141, 0.1, 0.071, 0.05}


# -- DeiT-III -----------------------------------------------------------------------------

DEIT = {
    "batch_size": 2048, "drop_last": True, "precision": "fp16", "optim.name": "lamb", "optim.eps": 1e-8,
    "optim.betas": [0.9, 0.999], "optim.max_grad_norm": 1.0, "decay_matrices_only": True, "clip_grad_norm": None,
    "schedule.warmup_epochs": 5.0, "schedule.warmup_lr": 1e-6, "schedule.min_lr": 1e-5, "data.crop_ratio": 1.0,
    "data.interpolation": "bicubic", "model.patch": 16, "model.depth": 12, "seed": 0, "runtime.gpus": 8,
}  # fmt: skip
PRETRAIN = {"loss": "bce", "label_smoothing": 0.0, "mixup": 0.8, "cutmix": 1.0, "repeats": 3} | {
    "mix_group": 256,
    "data.augment": "three_augment", "start_from": None,
}  # fmt: skip
FINETUNE = {"loss": "cross_entropy", "label_smoothing": 0.1, "mixup": 0.0, "cutmix": 1.0, "repeats": 1} | {
    "data.augment": "three_augment_simple_crop", "data.image_size": 224, "epochs": 50, "optim.lr": 3e-4,
    "optim.weight_decay": 0.02,
}  # fmt: skip
# (network, epochs) -> rate, weight decay, drop path, image size; and of fine-tuning the drop path, images of a GPU
RUNS = {
    ("deit3_small", 400): (4e-3, 0.03, 0.0, 224, 0.05, 128),
    ("deit3_small", 800): (4e-3, 0.05, 0.05, 224, 0.05, 128),
    ("deit3_base", 400): (3e-3, 0.03, 0.1, 192, 0.15, 64),
    ("deit3_base", 800): (3e-3, 0.05, 0.2, 192, 0.15, 64),
}


@pytest.mark.parametrize("run", RUNS)
def test_deit(run):
    lr, decay, drop_path, size, drop_path_after, group = RUNS[run]
    choices = {"model": run[0], "recipe.pretrain_epochs": run[1]}
    before = compose_config("imagenet_deit", choices)
    facts = {"epochs": run[1], "optim.lr": lr, "optim.weight_decay": decay, "data.image_size": size}
    assert holds(before, DEIT | PRETRAIN | facts | {"model.drop_path": drop_path, "schedule.lr": lr})
    after = compose_config("imagenet_deit", choices | {"stage": "finetune"})
    assert holds(after, DEIT | FINETUNE | {"model.drop_path": drop_path_after, "mix_group": group})
    assert after.schedule["lr"] == 3e-4
    steps = IMAGENET // 2048
    assert steps == 625
    assert total_steps(before, steps) == 625 * run[1]
    order = epoch_order(0, 0, IMAGENET, before.repeats)[: steps * 2048]
    assert len(np.unique(order % IMAGENET)) == -(-steps * 2048 // 3), "a third of the images in an epoch"


def test_table_3_has_its_lambdas():
    runs = plan("imagenet_deit", "table3", {})
    before = [config for config in runs if config.start_from is None]
    arms = [(c.model["name"], c.epochs, c.method.get("lambda_")) for c in before]
    assert arms == [
        ("deit3_small", 400, None), ("deit3_small", 400, 0.1), ("deit3_small", 800, None), ("deit3_small", 800, 0.2),
        ("deit3_base", 400, None), ("deit3_base", 400, 0.1),
    ]  # fmt: skip


# -- transfer -------------------------------------------------------------------------------

TRANSFER = {
    "batch_size": 768, "drop_last": True, "loss": "cross_entropy", "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0,
    "mix_group": 96, "repeats": 3, "precision": "fp16", "decay_matrices_only": True, "clip_grad_norm": None,
    "optim.lr": 0.01, "optim.momentum": 0.9, "optim.nesterov": True, "optim.weight_decay": 1e-4, "model.drop_path": 0.0,
    "schedule.name": "epoch_cosine", "schedule.warmup_epochs": 5.0, "schedule.warmup_lr": 1e-6,
    "schedule.min_lr": 1e-5, "data.image_size": 224, "data.augment": "rand_augment", "data.interpolation": "bicubic",
    "data.crop_ratio": 0.875, "data.mean": [0.485, 0.456, 0.406], "data.std": [0.229, 0.224, 0.225],
}  # fmt: skip


def test_transfer_is_the_first_deits():
    runs = plan("transfer", "table4", {})
    assert len(runs) == 8
    for config in runs:
        assert holds(config, TRANSFER)
        assert config.method.get("lambda_", 0.2) == 0.2
        assert config.start_from.startswith("imagenet_deit/")


# -- sources --------------------------------------------------------------------------------

SOURCED = [path for path in sorted(CONF.rglob("*.yaml")) if path.parent.name != "cluster"]


@pytest.mark.parametrize("path", SOURCED, ids=lambda path: str(path.relative_to(CONF)))
def test_every_recipe_and_component_says_where_its_values_are_from(path):
    """For each value or for the file: published and where, ours, or a mark that the file explains."""
    comments = " ".join(line.partition("#")[2] for line in path.read_text().splitlines())
    assert re.search(r"\b[Pp]ublished\b|\b[Oo]urs\b|\[(paper|code|command|answer|main\.py|ours)\]", comments)
