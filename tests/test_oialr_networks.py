"""What surrounds OIALR (arXiv 2401.08505): its networks, its learning-rate schedule, and the recipes of its authors."""

import argparse
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import resnet as torchvision_resnet

from experiments.config import CONF, build, compose_config
from experiments.grid import plan
from experiments.models import build_model
from experiments.tasks.losses import cross_entropy
from experiments.training.loop import total_steps
from experiments.training.schedule import TimmCosine
from runfolder.errors import UserError
from tests import golden_oialr_schedule
from tests.test_golden import SHARED
from tests.test_recipes import holds

COUNTS = {
    ("minivit", 10, 32): 42_684_682,
    ("vit_base", 1000, 224): 86_567_656,
    ("timm_resnet50", 1000, 224): 25_557_032,
    ("resnet_rs101", 1000, 160): 63_618_696,
}
SMALL = {"patch": 4, "width": 24, "depth": 3, "heads": 3, "image_size": 12}


def _count(model):
    return sum(p.numel() for p in model.parameters())


def _on_meta(name, classes, **options):
    with torch.device("meta"):
        return build_model(name, classes, **options)


def _shuffled(model):
    """Norms, positions and biases that are not at their start, so that what is left out shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name in ("cls_token", "pos_embed"):
                parameter.uniform_(0.5, 1.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
    return model


# -- networks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "classes", "size"), COUNTS)
def test_parameters_are_as_many_as_documented(name, classes, size):
    assert _count(_on_meta(name, classes, image_size=size)) == COUNTS[name, classes, size]


@pytest.mark.parametrize(("name", "classes", "size"), [case for case in COUNTS if "vit" in case[0]])
def test_a_transformers_parameters_are_as_many_as_a_sum_over_layers(name, classes, size):
    model = _on_meta(name, classes, image_size=size)
    w, (patch, depth, heads, bias) = 768, {"minivit": (8, 6, 6, 0), "vit_base": (16, 12, 12, 1)}[name]
    block = 2 * 2 * w + 3 * w * w + 3 * w * bias + w * w + w + 2 * 4 * w * w + 4 * w + w
    tokens = (size // patch) ** 2 + 1
    assert _count(model) == 3 * patch**2 * w + w + w + tokens * w + depth * block + 2 * w + (w + 1) * classes
    assert {block.attn.num_heads for block in model.blocks} == {heads}


def _literal_transformer(weights, x, patch, heads, depth):
    def linear(name, x):
        out = x @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    rows = F.unfold(x, patch, stride=patch).transpose(1, 2)
    x = rows @ weights["patch_embed.proj.weight"].flatten(1).T + weights["patch_embed.proj.bias"]
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1) + weights["pos_embed"]
    for k in range(depth):
        qkv = linear(f"blocks.{k}.attn.qkv", norm(f"blocks.{k}.norm1", x))
        q, key, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, key) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        x = x + linear(f"blocks.{k}.attn.proj", mixed)
        hidden = F.gelu(linear(f"blocks.{k}.mlp.fc1", norm(f"blocks.{k}.norm2", x)))
        x = x + linear(f"blocks.{k}.mlp.fc2", hidden)
    return linear("head", norm("norm", x)[:, 0])


@pytest.mark.parametrize("name", ["minivit", "vit_base"])
def test_the_transformers_equal_their_blocks_written_out(name):
    model, x = _shuffled(build_model(name, 7, **SMALL)).double(), torch.randn(4, 3, 12, 12).double()
    expected = _literal_transformer(dict(model.named_parameters()), x, patch=4, heads=3, depth=3)
    torch.testing.assert_close(model(x), expected)
    assert (name == "vit_base") == (model.blocks[0].attn.qkv.bias is not None)


@pytest.mark.filterwarnings("ignore")
def test_vit_base_is_timms_network_of_that_name():
    import timm

    theirs = _shuffled(timm.create_model("vit_base_patch16_224", num_classes=11, depth=2)).eval()
    ours = build_model("vit_base", 11, depth=2, image_size=224).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    assert torch.equal(ours(x), theirs(x))


def test_blocks_are_left_out_more_often_the_deeper_they_are():
    blocks = build_model("vit_base", 10, **SMALL | {"drop_path": 0.4}).blocks
    rates = [getattr(path, "drop_prob", 0.0) for block in blocks for path in (block.drop_path1, block.drop_path2)]
    assert rates == pytest.approx([0.0, 0.0, 0.2, 0.2, 0.4, 0.4])


@pytest.mark.parametrize(
    ("change", "sentence"), [({"image_size": 13}, "patch=4 pixels, got 13"), ({"heads": 5}, "heads=5")]
)
def test_transformers_of_broken_patches_or_heads_are_refused(change, sentence):
    with pytest.raises(ValueError, match=f"expected .*{sentence}"):
        build_model("minivit", 10, **SMALL | change)


def test_timms_resnet50_computes_what_torchvisions_does():
    ours, theirs = (
        _shuffled(build_model("timm_resnet50", 11)).eval(),
        torchvision_resnet.resnet50(num_classes=11).eval(),
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_branches_of_timms_resnet50_start_at_zero():
    model = build_model("timm_resnet50", 11)
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
    assert len(blocks) == 16
    assert all((block.bn3.weight == 0).all() for block in blocks)


def _literal_resnet_rs(weights, x, layers):
    """Of arXiv 2103.07579: deep stem, strided convolution for pooling, squeeze-excitation, ResNet-D's shortcuts."""

    def conv(name, x, stride=1):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), stride=stride, padding=weight.shape[-1] // 2)

    def norm(name, x):
        mean, var, weight, bias = (
            weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = F.relu(norm("conv1.1", conv("conv1.0", x, 2)))
    x = F.relu(norm("conv1.4", conv("conv1.3", x)))
    x = F.relu(norm("bn1", conv("conv1.6", x)))
    x = F.relu(norm("maxpool.1", conv("maxpool.0", x, 2)))
    for stage, blocks in enumerate(layers, start=1):
        for k in range(blocks):
            name, stride = f"layer{stage}.{k}", 2 if stage > 1 and k == 0 else 1
            out = F.relu(norm(f"{name}.bn1", conv(f"{name}.conv1", x)))
            out = F.relu(norm(f"{name}.bn2", conv(f"{name}.conv2", out, stride)))
            out = norm(f"{name}.bn3", conv(f"{name}.conv3", out))
            squeezed = F.relu(conv(f"{name}.se.fc1", out.mean((2, 3), keepdim=True)))
            out = out * conv(f"{name}.se.fc2", squeezed).sigmoid()
            if k == 0:
                pooled = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else x
                x = norm(f"{name}.downsample.2", conv(f"{name}.downsample.1", pooled))
            x = F.relu(out + x)
    return x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


def test_resnet_rs101_equals_its_blocks_written_out():
    model, x = _shuffled(build_model("resnet_rs101", 7)).double().eval(), torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x), _literal_resnet_rs(model.state_dict(), x, (3, 4, 23, 3)))


@pytest.mark.parametrize("name", ["timm_resnet50", "resnet_rs101"])
def test_dropout_is_before_the_classifier_and_off_in_evaluation(name):
    model, pooled, taken = build_model(name, 10, dropout=0.75), [], []
    model.global_pool.register_forward_hook(lambda _, __, out: pooled.append(out))
    model.fc.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    model(torch.rand(4, 3, 32, 32))
    model.eval()(torch.rand(4, 3, 32, 32))
    left = taken[0] != 0
    assert left[pooled[0] != 0].double().mean().item() == pytest.approx(0.25, abs=0.05)
    torch.testing.assert_close(taken[0][left], 4 * pooled[0][left])
    assert torch.equal(taken[1], pooled[1])


# -- schedule ----------------------------------------------------------------------------------------

PLAIN = {
    "lr": 0.3, "epochs": None, "warmup_epochs": 0, "warmup_lr": 0.0, "warmup_prefix": True, "min_lr": 0.0,
    "cycle_mul": 1.0, "cycle_limit": 1, "cycle_decay": 0.1, "k_decay": 1.0, "cooldown_epochs": 0, "on_updates": True,
}  # fmt: skip
PER_EPOCH = 7
CASES = {
    "the mini ViT's": {"epochs": 10, "warmup_epochs": 2, "cycle_limit": 500, "cycle_decay": 0.4, "k_decay": 0.34},
    "that of ImageNet": {"epochs": 9, "warmup_epochs": 1, "min_lr": 0.9, "cycle_mul": 1.5, "cycle_limit": 30},
    "longer than the run": {"epochs": 12, "warmup_epochs": 3, "cycle_limit": 3, "cycle_decay": 0.5},
    "no prefix": {"epochs": 5, "warmup_epochs": 2, "warmup_prefix": False, "cycle_limit": 2, "min_lr": 0.01},
    "cycles that grow": {"epochs": 2, "cycle_mul": 2.0, "cycle_limit": 3, "cycle_decay": 0.7, "k_decay": 1.7},
    "cycles that shrink": {"epochs": 5, "cycle_mul": 0.75, "cycle_limit": 4, "cycle_decay": 0.9},
    "a limit": {"epochs": 3, "warmup_epochs": 1, "cycle_limit": 2, "min_lr": 0.02},
    "cooldown": {"epochs": 8, "warmup_epochs": 1, "cooldown_epochs": 3, "min_lr": 0.03},
    "no warm-up": {"epochs": 12, "k_decay": 0.5},
    "per epoch": {"epochs": 10, "warmup_epochs": 2, "on_updates": False, "k_decay": 0.34, "cycle_limit": 500},
    "cycles of epochs": {"epochs": 3, "warmup_epochs": 1, "on_updates": False, "cycle_mul": 1.5, "cycle_limit": 9},
}


def _rates(schedule, epochs, beyond=0):
    steps = epochs * PER_EPOCH
    return [schedule.lr * schedule.factor(step, PER_EPOCH, steps) for step in range(steps + beyond)]


def _timms_rates(schedule, epochs, beyond=0):
    """Of timm's scheduler where OIALR's trainer steps it: after each update, and after each epoch."""
    from timm.scheduler import create_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=schedule.lr)
    length = schedule.epochs
    if length + schedule.warmup_epochs > epochs:
        length -= schedule.warmup_epochs
    options = argparse.Namespace(
        sched="cosine", epochs=length, warmup_epochs=schedule.warmup_epochs, cooldown_epochs=schedule.cooldown_epochs,
        min_lr=schedule.min_lr, warmup_lr=schedule.warmup_lr, warmup_prefix=schedule.warmup_prefix,
        lr_cycle_mul=schedule.cycle_mul, lr_cycle_limit=schedule.cycle_limit, lr_cycle_decay=schedule.cycle_decay,
        lr_k_decay=schedule.k_decay, sched_on_updates=schedule.on_updates,
    )  # fmt: skip
    scheduler, _ = create_scheduler(options, optimizer, updates_per_epoch=PER_EPOCH)
    rates = []
    for update in range(epochs * PER_EPOCH + beyond):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(update + 1)
        if (update + 1) % PER_EPOCH == 0:
            scheduler.step((update + 1) // PER_EPOCH)
    return rates


@pytest.mark.parametrize("case", CASES)
def test_rates_equal_timms_at_every_step(case):
    schedule = TimmCosine(**PLAIN | CASES[case])
    got, expected = (rates(schedule, 12, beyond=PER_EPOCH) for rates in (_rates, _timms_rates))
    assert got == pytest.approx(expected, rel=0, abs=1e-12)
    assert len(set(got)) > 5


def test_a_cosine_by_its_ends_its_middle_and_its_restart():
    options = {"epochs": 10, "warmup_epochs": 2, "warmup_lr": 0.06, "min_lr": 0.1, "cycle_limit": 2, "cycle_decay": 0.5}
    schedule = TimmCosine(**PLAIN | options)
    expected = {0: 0.06, 1: 0.18, 2: 0.3, 7: 0.2, 12: 0.15, 17: 0.125, 22: 0.1, 30: 0.1}
    for epoch, rate in expected.items():
        assert schedule.lr * schedule.factor(epoch * PER_EPOCH, PER_EPOCH, 40 * PER_EPOCH) == pytest.approx(rate), epoch


@pytest.mark.parametrize("k", [0.34, 1.0, 2.0])
def test_k_decay_is_the_power_of_the_progress(k):
    """Halfway between lr and min_lr, 0 here, where progress^k is 1/2."""
    schedule, steps = TimmCosine(**PLAIN | {"k_decay": k, "epochs": 1000}), 1000 * PER_EPOCH
    middle = 0.5 ** (1 / k) * steps
    before, after = (schedule.factor(step, PER_EPOCH, steps) for step in (math.floor(middle), math.ceil(middle)))
    assert after <= 0.5 <= before
    assert before - after < 0.01


def test_cycles_that_shrink_come_to_an_end():
    """5 epochs, half as many, and so on are 10 together, however many cycles there may be."""
    schedule = TimmCosine(
        **PLAIN | {"epochs": 5, "cycle_mul": 0.5, "cycle_limit": 10**6, "cycle_decay": 1.0, "min_lr": 0.1}
    )
    rates = _rates(schedule, 20)
    assert rates[: 5 * PER_EPOCH] == pytest.approx(_rates(TimmCosine(**PLAIN | {"min_lr": 0.1}), 5))
    assert rates[5 * PER_EPOCH] == pytest.approx(0.3)
    assert rates[10 * PER_EPOCH :] == [0.1] * (10 * PER_EPOCH)


@pytest.mark.parametrize("epochs", [3, 12, 300])
@pytest.mark.parametrize("cooldown", [0, 1])
def test_without_epochs_the_cosine_fills_the_run_between_warm_up_and_cooldown(epochs, cooldown):
    options = {"warmup_epochs": 1, "min_lr": 0.05, "cooldown_epochs": cooldown}
    ours = _rates(TimmCosine(**PLAIN | options), epochs)
    assert ours == pytest.approx(_rates(TimmCosine(**PLAIN | options | {"epochs": epochs - 1 - cooldown}), epochs))
    assert ours.count(0.3) == 1
    assert ours[: PER_EPOCH + 1] == pytest.approx([0.3 * step / PER_EPOCH for step in range(PER_EPOCH + 1)])
    assert sum(rate == pytest.approx(0.05) for rate in ours) == cooldown * PER_EPOCH


def test_a_least_rate_above_the_first_one_is_risen_to():
    rates = _rates(TimmCosine(**PLAIN | {"min_lr": 0.8, "warmup_epochs": 1}), 20)
    assert rates == sorted(rates)
    assert 0.79 < rates[-1] < 0.8


def test_a_run_that_ends_within_its_warm_up_needs_no_epochs_for_a_cosine():
    schedule = TimmCosine(**PLAIN | {"warmup_epochs": 10, "warmup_lr": 0.1})
    assert [0.3 * schedule.factor(step, 2, 5) for step in range(5)] == pytest.approx([0.1 + 0.01 * k for k in range(5)])
    with pytest.raises(ValueError, match="epochs left for a cosine in a run of 10, got 0 with .*warmup_epochs=10"):
        schedule.factor(20, 2, 20)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cycle_mul", 0),
        ("cycle_limit", 0),
        ("k_decay", -1),
        ("epochs", 0),
        ("warmup_lr", -0.1),
        ("cooldown_epochs", -1),
    ],
)
def test_options_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=f"^expected {key} .*, got {value}.$"):
        TimmCosine(**PLAIN | {key: value})


# -- vectors -----------------------------------------------------------------------------------------


def _vector(folder, **changes):
    """Two epochs of warm-up of 3 updates each and a cycle of five, by the formula; one update more than there are."""
    t = np.arange(22)
    rates = 1e-4 * t / 6
    rates[6:] = 2e-5 + 4e-5 * (1 + np.cos(np.pi * ((t[6:] - 6) % 15 / 15) ** 0.34))
    rates[21] = 0.4e-4
    np.savez(folder / "lr.npz", lrs=rates)
    schedule = {"sched": "cosine", "epochs": 5, "warmup_epochs": 2, "cooldown_epochs": 1, "min_lr": 2e-5}
    schedule |= {"warmup_lr": 0.0, "warmup_prefix": True, "lr_cycle_mul": 1.0, "lr_cycle_limit": 500}
    schedule |= {"lr_cycle_decay": 0.4, "lr_k_decay": 0.34, "sched_on_updates": True}
    config = {"epochs": 7, "schedule": schedule | changes, "lr": 1e-4, "updates_per_epoch": 3, "effective_epochs": 5}
    return {"name": "lr", "kind": "lr_schedule", "file": "lr.npz", "tolerance_abs": 1e-9, "config": config}


def test_a_vector_by_hand_agrees_and_other_options_do_not(tmp_path):
    assert golden_oialr_schedule.check(_vector(tmp_path), tmp_path) == []
    changes = {"lr_k_decay": 0.35, "lr_cycle_decay": 0.41, "min_lr": 1e-5, "warmup_prefix": False, "warmup_lr": 1e-6}
    for key, value in changes.items():
        assert golden_oialr_schedule.check(_vector(tmp_path, **{key: value}), tmp_path), key
    (fault,) = golden_oialr_schedule.check(_vector(tmp_path, sched="step"), tmp_path)
    assert fault == "expected sched cosine, got 'step'"
    assert golden_oialr_schedule.check({"kind": "optimizer_state"}, tmp_path) == ["unknown kind 'optimizer_state'"]


def test_a_wrong_rate_and_a_wrong_length_disagree(tmp_path):
    case = _vector(tmp_path)
    rates = dict(np.load(tmp_path / "lr.npz"))["lrs"]
    rates[11] += 2e-9
    np.savez(tmp_path / "lr.npz", lrs=rates)
    assert golden_oialr_schedule.check(case, tmp_path) == ["lrs: largest difference 2e-09, after 11 updates"]
    case["config"]["effective_epochs"] = 4
    assert golden_oialr_schedule.check(case, tmp_path)[0] == "effective_epochs: expected 4, got 5"


def test_the_originals_rates_agree():
    folder = SHARED / "oialr"
    if not (folder / "manifest.json").is_file():
        pytest.skip("no folder golden/oialr beside TRACT_DATA")
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    cases = [case for case in cases if case["kind"] == golden_oialr_schedule.KIND]
    assert cases
    assert {case["name"]: golden_oialr_schedule.check(case, folder) for case in cases} == {c["name"]: [] for c in cases}


# -- recipes -----------------------------------------------------------------------------------------

# Helmholtz-AI-Energy/OIALR @ e9e885d.
ALL = {
    "optim.name": "adamw", "optim.betas": [0.9, 0.999], "precision": "bf16", "drop_last": False,
    "loss": "cross_entropy", "decay_matrices_only": False, "schedule.name": "timm_cosine",
    "schedule.warmup_prefix": True, "schedule.on_updates": True, "schedule.cycle_decay": 0.4,
    "data.interpolation": "bicubic", "repeats": 1,
}  # fmt: skip
TRAINER = {  # configs/training/oialr_trainer.yaml
    "epochs": 90, "batch_size": 4096, "optim.lr": 2e-4, "optim.weight_decay": 0.01, "label_smoothing": 0.1,
    "mixup": 0.0, "cutmix": 0.0, "clip_grad_norm": None, "schedule.epochs": 300, "schedule.warmup_epochs": 17,
    "schedule.min_lr": 8e-4, "schedule.warmup_lr": 8e-5, "schedule.cycle_mul": 1.5, "schedule.cycle_limit": 30,
    "schedule.k_decay": 1.0, "data.name": "imagenet", "data.image_size": 224, "data.crop_ratio": 0.9,
    "data.augment": "rand_augment_erase",
}  # fmt: skip
BASELINE = {  # what cifar10-minivit.yaml and imagenet-resnetrs.yaml share
    "epochs": 300, "schedule.epochs": None, "schedule.warmup_epochs": 10, "schedule.min_lr": 1e-5,
    "schedule.warmup_lr": 1e-5, "schedule.cycle_mul": 1.0, "schedule.cycle_limit": 500, "schedule.k_decay": 0.34,
}  # fmt: skip
SOURCES = {
    "cifar10_minivit": BASELINE | {
        "model.name": "minivit", "data.name": "cifar10", "batch_size": 1024, "optim.lr": 3e-4,
        "optim.weight_decay": 0.01, "label_smoothing": 0.1, "mixup": 0.0, "cutmix": 0.0, "clip_grad_norm": 5.0,
        "data.image_size": 32, "data.augment": "rand_augment_erase_small", "data.mean": [0.4914, 0.4822, 0.4465],
        "data.std": [0.2023, 0.1994, 0.2010],
    },
    "imagenet_resnetrs": BASELINE | {
        "model.name": "resnet_rs101", "model.dropout": 0.25, "data.name": "imagenet", "batch_size": 4096,
        "optim.lr": 1e-3, "optim.weight_decay": 0.001, "label_smoothing": 0.19, "mixup": 0.1, "cutmix": 1.0,
        "mix_group": 256, "clip_grad_norm": 1.0, "data.image_size": 160, "data.crop_ratio": 0.9,
        "data.augment": "rand_augment_erase",
    },
    "imagenet_vit": TRAINER | {"model.name": "vit_base"},
    "imagenet_resnet50": TRAINER | {"model.name": "timm_resnet50", "model.dropout": 0.0},
}  # fmt: skip
# delay, stability_frequency, sigma_cutoff_fraction, keep_first_layer, stable_update_delay
OPTIONS = ("delay", "stability_frequency", "sigma_cutoff_fraction", "keep_first_layer", "stable_update_delay")
METHOD = {
    "cifar10_minivit": (2500, 500, 0.15, False, 0),
    "imagenet_resnetrs": (200, 100, 0.15, False, 0),
    "imagenet_vit": (10000, 2000, 0.2, True, 1),
    "imagenet_resnet50": (10000, 2000, 0.2, True, 1),
}
PER_EPOCH_OF = {"cifar10": 49, "imagenet": 313}  # "49 iterations / epoch"; 1,281,167 images in batches of 4,096


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_has_its_files_values_in_full_and_in_low_rank(source):
    for method in ("vanilla", "oialr"):
        config = compose_config("oialr", {"recipe.source": source, "method": method})
        assert holds(config, ALL | SOURCES[source])
    assert tuple(config.method[key] for key in OPTIONS) == METHOD[source]
    assert config.method["keep_last_layer"] is True
    assert config.method["network_layer_perc_step"] == 0.1


def test_the_default_is_the_mini_vit_in_low_rank():
    assert compose_config("oialr", {}) == compose_config(
        "oialr", {"recipe.source": "cifar10_minivit", "method": "oialr"}
    )


def test_a_source_that_is_unknown_is_refused():
    with pytest.raises(UserError, match=r"unknown choice recipe.source=imagenet_vti; nearest: imagenet_vit"):
        compose_config("oialr", {"recipe.source": "imagenet_vti", "method": "vanilla"})


def rates_of(config):
    per_epoch = PER_EPOCH_OF[config.data["name"]]
    steps = total_steps(config, per_epoch)
    schedule = build(config.schedule)
    return [config.optim["lr"] * schedule.factor(step, per_epoch, steps) for step in range(steps)]


@pytest.mark.parametrize("source", ["cifar10_minivit", "imagenet_resnetrs"])
def test_the_baselines_rate_rises_for_ten_epochs_and_falls_to_the_end(source):
    config = compose_config("oialr", {"recipe.source": source, "method": "vanilla"})
    rates, lr = rates_of(config), config.optim["lr"]
    ten = 10 * PER_EPOCH_OF[config.data["name"]]
    assert rates[0] == pytest.approx(1e-5)
    assert max(rates) == rates[ten] == pytest.approx(lr)
    assert rates[:ten] == sorted(rates[:ten])
    assert rates[ten:] == sorted(rates[ten:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-4)
    assert len(rates) == {"cifar10": 14_700, "imagenet": 93_900}[config.data["name"]]
    progress = ((len(rates) // 2 - ten) / (len(rates) - ten)) ** 0.34
    assert rates[len(rates) // 2] == pytest.approx(1e-5 + (lr - 1e-5) * (1 + math.cos(math.pi * progress)) / 2)


@pytest.mark.parametrize("source", ["imagenet_vit", "imagenet_resnet50"])
def test_the_trainers_rate_rises_all_the_time_towards_what_it_calls_the_least(source):
    rates = rates_of(compose_config("oialr", {"recipe.source": source, "method": "vanilla"}))
    assert len(rates) == 28_170
    assert rates == sorted(rates)
    assert (rates[0], rates[17 * 313]) == pytest.approx((8e-5, 2e-4))
    progress = (28_169 - 17 * 313) / (283 * 313)
    assert rates[-1] == pytest.approx(8e-4 - 6e-4 * (1 + math.cos(math.pi * progress)) / 2)


GRIDS = {  # runs, of which without the method
    "oialr_cifar10_minivit": (9, 3),
    "oialr_imagenet_vit": (12, 6),
    "oialr_imagenet_resnet": (9, 3),
    "oialr_imagenet_resnet50": (12, 6),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_each_low_rank_run_with_the_baselines_rate_has_a_baseline_that_differs_in_the_method_alone(grid):
    runs = plan("oialr", grid, {})
    assert all(run.method["name"] in ("vanilla", "oialr") for run in runs)
    plain = [run for run in runs if run.method["name"] == "vanilla"]
    assert (len(runs), len(plain)) == GRIDS[grid]
    for baseline in plain:
        twins = [run for run in runs if run.method["name"] == "oialr" and run.seed == baseline.seed]
        assert sum(_without_method(run) == _without_method(baseline) for run in twins) == 1


def _without_method(config):
    return {key: value for key, value in vars(config).items() if key != "method"}


RISING, FALLING = (1e-4, 3e-4, 8e-4), (1e-5, 1e-3, 1e-5)  # at first, after the warm-up, at the end
OTHER_RATES = {  # grid -> run of one seed -> rates
    "oialr_cifar10_minivit": {2: RISING},
    "oialr_imagenet_resnet": {2: RISING},
    "oialr_imagenet_vit": {1: FALLING, 3: FALLING},
    "oialr_imagenet_resnet50": {1: FALLING, 3: FALLING},
}


@pytest.mark.parametrize("grid", GRIDS)
def test_the_other_rates_of_the_grids(grid):
    """Those that the authors' files mark "SVD" rise; ours fall."""
    runs = plan("oialr", grid, {"seed": [0]})
    for place, expected in OTHER_RATES[grid].items():
        rates, config = rates_of(runs[place]), runs[place]
        warm = int(config.schedule["warmup_epochs"] * PER_EPOCH_OF[config.data["name"]])
        assert (rates[0], rates[warm], rates[-1]) == pytest.approx(expected, rel=1e-3)


def test_mixed_labels_that_are_smoothed_twice_by_a_tenth_are_smoothed_once_by_0_19():
    from timm.data.mixup import mixup_target

    scores, labels, share = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,)), 0.3
    theirs = mixup_target(labels, 5, lam=share, smoothing=0.1).double()
    expected = F.cross_entropy(scores, theirs, label_smoothing=0.1, reduction="sum")
    one_hot = F.one_hot(labels, 5).double()
    ours = cross_entropy(scores, share * one_hot + (1 - share) * one_hot.flip(0), 0.19)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_a_recipe_gives_a_method_plain_values_and_its_file_has_them_where_no_recipe_does(tmp_path, monkeypatch):
    conf = shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr("experiments.config.CONF", conf)
    text = "name: scaled\n_target_: tract.methods.tract.TrActMethod\n"
    text += "lambda_: ${of_recipe:oialr.sigma_cutoff_fraction,0.7}\n"
    text += "layer: ${of_recipe:oialr.nothing,null}\nstatistics: ${of_recipe:oialr.nothing,global}\n"
    (conf / "method" / "scaled.yaml").write_text(text)
    values = {"lambda_": 0.15, "layer": None, "statistics": "global"}
    assert compose_config("oialr", {"method": "scaled"}).method.items() >= values.items()
    assert compose_config("quickstart", {"method": "scaled"}).method.items() >= (values | {"lambda_": 0.7}).items()
