"""Compares our subspaces with recorded numbers of the authors' code, case by case (arXiv 2102.10472)."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from experiments.data.label_noise import noisy_labels
from experiments.tasks.losses import cross_entropy
from experiments.training.schedule import SubspaceSchedule
from tract.subspaces import evaluation as ev
from tract.subspaces.averaging import average, endpoint_weights, random_average, swag_sample
from tract.subspaces.layers import (
    apply_subspace,
    plain_at,
    plain_with,
    set_coefficients,
    set_coefficients_layerwise,
    subspace_layers,
)
from tract.subspaces.norm import reestimated
from tract.subspaces.paths import Path as Subspace
from tract.subspaces.paths import Simplex, path_of
from tract.subspaces.regulariser import squared_cosine, statistics


def check(case: dict, folder: Path) -> list[str]:
    """What of a case our code computes otherwise; nothing where all agrees."""
    if case["family"] not in FAMILIES:
        return [f"expected a family of {', '.join(FAMILIES)}, got {case['family']!r}"]
    with np.load(Path(folder) / case["file"]) as arrays:
        found = Comparison(case, {name: arrays[name] for name in arrays.files})
    FAMILIES[case["family"]](case, found)
    return found.disagreements


class Comparison:
    """The recorded arrays of a case, and what was found to differ from them."""

    def __init__(self, case: dict, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.disagreements: list[str] = []
        self.dtype = getattr(torch, case.get("dtype", "torch.float64").removeprefix("torch."))
        self.tolerance = 1e-9 if self.dtype == torch.float64 else 1e-4 if case["family"] == "train" else 1e-5

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def under(self, prefix: str) -> dict[str, Tensor]:
        """All arrays under a prefix, without it."""
        return {n.removeprefix(prefix): self.tensor(n) for n in self.arrays if n.startswith(prefix)}

    def equal(self, name: str, got: object, tolerance: float | None = None) -> None:
        """Largest difference, relative to the largest recorded number."""
        want = np.asarray(self.arrays[name], dtype=np.float64)
        got = got.detach().numpy() if isinstance(got, Tensor) else got
        got = np.asarray(got, dtype=np.float64)
        if got.shape != want.shape:
            self.disagreements.append(f"{name}: expected shape {want.shape}, got {got.shape}")
        elif want.size:
            apart, scale = np.abs(got - want).max(), np.abs(want).max()
            if not apart <= (self.tolerance if tolerance is None else tolerance) * (scale or 1.0):
                self.disagreements.append(f"{name}: largest difference {apart:.3g}, numbers up to {scale:.3g}")

    def equal_under(self, prefix: str, got: dict[str, Tensor]) -> None:
        """Every array under a prefix has its tensor."""
        for name in self.under(prefix):
            if name in got:
                self.equal(prefix + name, got[name])
            else:
                self.disagreements.append(f"{prefix}{name}: we have no such tensor")

    def metrics(self, prefix: str, got: dict[str, float]) -> None:
        """Every metric under a prefix; the authors' calibration error is added up in float32."""
        for name in self.under(prefix):
            if name in got:
                self.equal(prefix + name, got[name], 1e-6 if name == "ece" else None)
            else:
                self.disagreements.append(f"{prefix}{name}: we have no such metric")


def path_named(kind: str) -> Subspace:
    if kind == "standard":
        return Simplex(1)
    name = kind.rstrip("0123456789")
    return path_of(name, int(kind[len(name) :] or {"line": 2, "curve": 3}[name]))


# -- networks ---------------------------------------------------------------------------


class Tiny(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Conv2d(6, classes, 1, bias=False)

    def features(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.features(x)).mean((2, 3), keepdim=True)).flatten(1)


class Block(nn.Module):
    """Two convolutions beside a shortcut; the last ReLU is the network's."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x)


class CifarResNet(nn.Module):
    """Depth 6 k + 2 with stages of width w, 2 w and 4 w."""

    def __init__(self, depth: int, width: int, classes: int):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.blocks, inputs = nn.ModuleList(), width
        for stage in range(3):
            for index in range((depth - 2) // 6):
                outputs = width * 2**stage
                self.blocks.append(Block(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
        self.fc = nn.Conv2d(inputs, classes, 1, bias=False)

    def features(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        for block in self.blocks:
            x = block(F.relu(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.features(x)).mean((2, 3), keepdim=True)).flatten(1)


def network(arch: str, weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    classes = len(weights["fc.weight"])
    if arch == "tiny":
        return Tiny(classes).to(dtype)
    depth, width = (*map(int, arch.removeprefix("cifar_resnet_").split("_")), 16)[:2]
    return CifarResNet(depth, width, classes).to(dtype)


def subspace_network(case: dict, found: Comparison, prefix: str) -> nn.Module:
    """A network with endpoints, whose names of parameters are the authors'."""
    weights, path = found.under(prefix), path_named(case["kind"])
    model = network(case["arch"], weights, found.dtype)
    apply_subspace(model, path, [copy.deepcopy(model) for _ in range(path.endpoints - 1)], shared_bias=True)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    lost = [name for name in missing if name.rpartition(".")[2] not in STATISTICS]
    if lost or unexpected:
        found.disagreements.append(f"{prefix}: names that differ: {', '.join(lost + unexpected)}")
    if "layers" in case:
        layers = subspace_layers(model)
        names = [name for name, module in model.named_modules() if module in layers]
        if names != case["layers"]:
            found.disagreements.append(f"layers: expected {case['layers']}, got {names}")
    return model


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """In evaluation, of (batches, n, ...) images or (n, ...)."""
    model.eval()
    return model(images.flatten(0, 1) if images.ndim == 5 else images)


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval().features(images.flatten(0, 1))


# -- families ---------------------------------------------------------------------------


def check_conv(case: dict, found: Comparison) -> None:
    def make() -> nn.Module:
        return nn.Conv2d(**case["conv"], dtype=found.dtype)

    path = path_named(case["kind"])
    model = nn.Sequential(make())
    apply_subspace(model, path, [nn.Sequential(make()) for _ in range(path.endpoints - 1)], shared_bias=True)
    layer = model[0]
    layer.load_state_dict(found.under("param/"))
    set_coefficients(model, path.coefficients(*found.arrays["coef"].tolist()))
    x = found.tensor("x").requires_grad_()
    output = model(x)
    output.backward(found.tensor("grad_output"))
    found.equal("output", output)
    found.equal("effective_weight", layer.point()[0])
    found.equal("grad/x", x.grad)
    found.equal_under("grad/", {"x": x.grad} | {n: p.grad for n, p in layer.named_parameters()})


def check_batchnorm(case: dict, found: Comparison) -> None:
    def make() -> nn.Module:
        options = {name: case[name] for name in ("momentum", "eps", "track_running_stats")}
        return nn.Sequential(nn.BatchNorm2d(len(found.arrays["param/weight"]), **options, dtype=found.dtype))

    path, model = path_named(case["kind"]), make()
    apply_subspace(model, path, [make() for _ in range(path.endpoints - 1)])
    layer = model[0].train(case["training"])
    found.equal_under("init/", dict(layer.named_parameters()))
    before = {name: found.tensor(f"{name}/before") for name in STATISTICS if f"{name}/before" in found}
    layer.load_state_dict(found.under("param/") | before, strict=False)
    for step in range(case["n_forward"]):
        at = f"step{step}/"
        set_coefficients(model, path.coefficients(*found.arrays[at + "coef"].tolist()))
        x = found.tensor(at + "x").requires_grad_()
        output = model(x)
        output.backward(found.tensor(at + "grad_output"))
        weight, bias = layer.point()
        found.equal(at + "output", output)
        found.equal(at + "grad_x", x.grad)
        found.equal(at + "effective_weight", weight)
        found.equal(at + "effective_bias", bias)
        for name in STATISTICS:
            if at + name in found:
                found.equal(at + name, getattr(layer, name))
    found.equal_under("grad/", {name: parameter.grad for name, parameter in layer.named_parameters()})


def check_init(case: dict, found: Comparison) -> None:
    """The draws of a layer: torch's own first, then He's normal for each endpoint."""
    path, names = path_named(case["kind"]), ("in_channels", "out_channels", "kernel_size", "stride", "bias", "padding")
    torch.manual_seed(case["torch_seed"])
    first = nn.Conv2d(**{name: case[name] for name in names}, dtype=found.dtype)
    made = [nn.Sequential(copy.deepcopy(first), nn.BatchNorm2d(case["out_channels"])) for _ in range(path.endpoints)]
    for one in made:
        nn.init.kaiming_normal_(one[0].weight)
    model, *others = made
    apply_subspace(model, path, others, shared_bias=True)
    found.tolerance = 0.0
    found.equal_under("param/", dict(model[0].named_parameters()))
    found.equal_under("bn/", dict(model[1].named_parameters()))


def drawn(path: Subspace, layers: int, layerwise: bool, generator: np.random.RandomState) -> list[tuple[float, ...]]:
    """Alpha of every layer in one forward pass."""
    if layerwise:
        return [path.draw(generator) for _ in range(layers)]
    return [path.draw(generator)] * layers


def check_draws(case: dict, found: Comparison, forwards: int) -> None:
    path, generator = path_named(case["kind"]), np.random.RandomState(case["np_seed"])
    layers = len(case["layers"])
    found.equal("coef", [drawn(path, layers, case["layerwise"], generator) for _ in range(forwards)])
    pairs = random.Random(case["py_seed"])
    if len(found.arrays["pairs"]):
        found.equal("pairs", [path.draw_pair(pairs) for _ in found.arrays["pairs"]])


def check_sampling(case: dict, found: Comparison) -> None:
    one = case["kind"].startswith("simplex")  # whose trainer takes a single sample
    check_draws(case, found, case["n_batches"] * (1 if one else case["num_samples"]))


def check_regularizer(case: dict, found: Comparison) -> None:
    model = subspace_network(case, found, "param/")
    cosine, apart = statistics(model)
    found.equal("stats/cossim", cosine)
    found.equal("stats/l2", apart)
    loss = torch.zeros((), dtype=found.dtype)
    for pair in found.arrays["pairs"].tolist() if case["beta"] > 0 else []:
        loss = loss + case["beta"] * squared_cosine(model, *pair)
    if loss.requires_grad:
        loss.backward()
    found.equal("loss", loss)
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    found.equal_under("grad/", gradients)


def check_train(case: dict, found: Comparison) -> None:
    model, path = subspace_network(case, found, "init/"), path_named(case["kind"])
    optimizer = torch.optim.SGD(model.parameters(), case["lr"], case["momentum"], weight_decay=case["wd"])
    smoothing = re.search(r"[\d.]+$", case["criterion"])  # "ce", or with a number behind it
    smoothing = float(smoothing[0] if smoothing else case.get("smoothing", 0.0))
    steps, points, losses = case["steps"], iter(()), []
    samples = 1
    if "coef" in found:
        points = iter(found.arrays["coef"].tolist())
        samples = len(found.arrays["coef"]) // steps
        check_draws(case, found, steps * samples)
    for step in range(steps):
        images, targets = found.tensor(f"x{step}"), found.tensor(f"y{step}")
        size = len(images) // samples
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=found.dtype)
        for sample in range(samples):
            if path.endpoints > 1:
                set_coefficients_layerwise(model, [path.coefficients(*alpha) for alpha in next(points)])
            part = slice(sample * size, (sample + 1) * size)
            loss = loss + cross_entropy(model(images[part]), targets[part], smoothing) / size / samples
        if len(found.arrays["pairs"]):
            loss = loss + case["beta"] * squared_cosine(model, *found.arrays["pairs"][step].tolist())
        loss.backward()
        found.equal_under(f"grad{step}/", {name: parameter.grad for name, parameter in model.named_parameters()})
        optimizer.step()
        losses.append(loss.item())
    found.equal("losses", losses)
    found.equal_under("final/", dict(model.named_parameters()))
    found.equal_under("final_buffer/", model.state_dict())


def accuracy(logits: Tensor, targets: Tensor) -> float:
    return ev.ensemble_accuracy([logits], targets)


def pair_metrics(first: nn.Module, second: nn.Module, images: Tensor, targets: Tensor) -> dict[str, float]:
    """Two networks as the authors' evaluator of lines and curves compares them; accuracy is the second's."""
    logits = [outputs(first, images), outputs(second, images)]
    return {
        "acc": accuracy(logits[1], targets),
        "m0_acc": accuracy(logits[0], targets),
        "ensemble_acc": ev.ensemble_accuracy(logits, targets),
        "tvdist": ev.total_variation(logits),
        "feat_cossim": ev.feature_cosine([features(first, images), features(second, images)], squared=True),
    }


def check_eval_pair(case: dict, found: Comparison) -> None:
    model, images, targets = subspace_network(case, found, "ckpt/"), found.tensor("val_x"), found.tensor("val_y")
    both = []
    for index in (0, 1):
        one = reestimated(plain_at(model, case[f"alpha{index}"]), found.tensor("train_x"))
        found.equal_under(f"bn{index}/", one.state_dict())
        found.equal(f"logits_alpha{index}", outputs(one, images))
        both.append(one)
    found.metrics("metric/", pair_metrics(*both, images, targets.flatten()))


def check_eval_mid(case: dict, found: Comparison) -> None:
    model, targets = subspace_network(case, found, "ckpt/"), found.tensor("val_y").flatten()
    path = path_named(case["kind"])
    middle = plain_at(model, *path.midpoint())
    if case["update_bn"]:
        reestimated(middle, found.tensor("train_x"))
    found.equal_under("bn/", middle.state_dict())
    logits = outputs(middle, found.tensor("val_x"))
    found.equal("logits", logits)
    cosine, apart = statistics(model)
    right = accuracy(logits, targets)
    found.metrics(
        "metric/",
        {
            "acc": right,
            "wa_acc": right,
            "m0_acc": 0.0,  # the authors' evaluator always writes 0
            "ece": ev.expected_calibration_error(logits, targets),
            "test_loss": (cross_entropy(logits, targets, 0.0) / len(targets)).item(),
            "cossim": cosine.item(),
            "norm": apart.item(),
            "l2": apart.item(),
        },
    )


def checkpoints(case: dict, found: Comparison) -> list[nn.Module]:
    models = []
    for index in range(case["n"]):
        weights = found.under(f"ckpt{index}/")
        models.append(network(case["arch"], weights, found.dtype))
        models[-1].load_state_dict(weights)
    return models


def averaged(like: nn.Module, state: dict[str, Tensor], found: Comparison) -> nn.Module:
    model = copy.deepcopy(like)
    model.load_state_dict(state)
    return reestimated(model, found.tensor("train_x"))


def check_eval_ensemble(case: dict, found: Comparison) -> None:
    models, images, targets = checkpoints(case, found), found.tensor("val_x"), found.tensor("val_y").flatten()
    logits = [outputs(model, images) for model in models]
    for index, one in enumerate(logits):
        found.equal(f"logits{index}", one)
    found.metrics(
        "metric/",
        {
            "acc": ev.ensemble_accuracy(logits, targets),
            "tvdist": ev.total_variation(logits),
            "percent_disagree": ev.disagreement(logits),
            "percent_disagree_correct": ev.disagreement_where_one_is_right(logits, targets),
            "feat_cossim": ev.feature_cosine([features(model, images) for model in models], squared=False),
        },
    )

    def alone(logits: Tensor) -> dict[str, float]:
        return {
            "acc": accuracy(logits, targets),
            "ece": ev.expected_calibration_error(logits, targets),
            "test_loss": (cross_entropy(logits, targets, 0.0) / len(targets)).item(),
        }

    found.metrics("default_test/", alone(logits[0]))
    mean = averaged(models[0], average([model.state_dict() for model in models]), found)
    found.equal_under("avg/", mean.state_dict())
    found.metrics("avg_metric/", alone(outputs(mean, images)))


def check_eval_simplex_ensemble(case: dict, found: Comparison) -> None:
    model, targets = subspace_network(case, found, "ckpt/"), found.tensor("val_y").flatten()
    path, generator = path_named(case["kind"]), np.random.RandomState(case["np_seed"])
    layers = len(case["layers"])
    points = [drawn(path, layers, case["layerwise"], generator) for _ in range(case["k"])]
    found.equal("coef", points)
    logits = []
    for index, alphas in enumerate(points):
        one = plain_with(model, [path.coefficients(*alpha) for alpha in alphas])
        logits.append(outputs(reestimated(one, found.tensor("train_x")), found.tensor("val_x")))
        found.equal(f"logits{index}", logits[-1])
    alone = [accuracy(one, targets) for one in logits]
    together = torch.stack(logits).mean(0)
    found.metrics(
        "metric/",
        {
            "acc": ev.ensemble_accuracy(logits, targets),
            "avg_model_acc": float(np.mean(alone)),
            "avg_model_std": float(np.std(alone)),
            "ece": ev.expected_calibration_error(together, targets),
            "test_loss": (cross_entropy(together, targets, 0.0) / len(targets)).item(),
        }
        | {f"model_{index}_acc": one for index, one in enumerate(alone)},
    )


def check_baseline(case: dict, found: Comparison) -> None:
    models, images, targets = checkpoints(case, found), found.tensor("val_x"), found.tensor("val_y").flatten()
    states, trainer = [model.state_dict() for model in models], case["trainer"]
    generator, second = np.random.RandomState(case["np_seed"]), None
    if trainer.startswith("rand_"):
        level = {"global": "global", "layerwise": "layer", "perweight": "weight"}[trainer.removeprefix("rand_")]
        if level == "layer":
            generator.exponential(1.0, case["n"])  # theirs draws once before it draws for the layers
        state = random_average(states, generator, level)
    elif trainer == "swag":
        state = swag_sample(states, torch.Generator().manual_seed(case["torch_seed"]))
    elif trainer == "linestats_swa":
        state = average(states, endpoint_weights(case["t"], 1, 2))
        second = average(states, endpoint_weights(case["baset"], 1, 2))
    elif trainer.startswith("swa_endpoint"):
        state = average(states, endpoint_weights(case["t"], case["j"], case["n"]))
        second = average(states, endpoint_weights(case["baset"], case["j"], case["n"]))
    elif trainer.startswith(("average", "avg")):
        state = average(states)
    else:
        found.disagreements.append(f"expected a known trainer, got {trainer!r}")
        return
    model = averaged(models[0], state, found)
    logits = outputs(model, images)
    found.equal_under("result/", model.state_dict())
    found.equal("logits", logits)
    metrics = {
        "acc": accuracy(logits, targets),
        "ece": ev.expected_calibration_error(logits, targets),
        "test_loss": (cross_entropy(logits, targets, 0.0) / len(targets)).item(),
    }
    if second is not None:
        other = averaged(models[0], second, found)
        found.equal_under("result1/", other.state_dict())
        metrics |= pair_metrics(other, model, images, targets)
    found.metrics("metric/", metrics)


def check_update_bn(case: dict, found: Comparison) -> None:
    model, path = subspace_network(case, found, "ckpt/"), path_named(case["kind"])
    batches = [found.tensor(f"x{index}") for index in range(case["n_batches"])]
    plain = reestimated(plain_at(model, *case["coef"]), batches)
    found.equal_under("after/", plain.state_dict())
    found.equal("logits", outputs(plain, torch.cat(batches)))
    # What another evaluator of theirs does: running statistics as in training, at one point.
    set_coefficients(model, path.coefficients(*case["coef"]))
    for layer in subspace_layers(model):
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    with torch.no_grad():
        for batch in batches:
            model.train()(batch)
    found.equal_under("ema/", model.state_dict())


def check_lr(case: dict, found: Comparison) -> None:
    schedule = SubspaceSchedule(
        policy=case["policy"],
        lr=case["base_lr"],
        warmup_epochs=case["warmup_length"],
        swa_lr=case["swa_lr"],
        swa_start=case["swa_start"],
        snapshots=case["num_models"],
        of_epochs=160,
    )
    per_epoch, steps = 3, 3 * case["epochs"]
    rates = np.array([case["base_lr"] * schedule.factor(step, per_epoch, steps) for step in range(steps)])
    for place in range(per_epoch):  # the same in all steps of an epoch
        found.equal("lr", rates[place::per_epoch])


def check_label_smoothing(case: dict, found: Comparison) -> None:
    scores = found.tensor("x").requires_grad_()
    loss = cross_entropy(scores, found.tensor("y"), case["smoothing"]) / len(scores)
    loss.backward()
    found.equal("loss", loss)
    found.equal("grad/x", scores.grad)


class Recorded:
    """Stands for a generator: the permutation and labels of a recorded case, as far as they show."""

    def __init__(self, places: np.ndarray, labels: np.ndarray):
        self.places, self.labels = places, labels

    def permutation(self, n: int) -> np.ndarray:
        assert n == len(self.places)
        return self.places

    def integers(self, classes: int, size: int) -> np.ndarray:
        return self.labels[self.places[:size]]


def check_label_noise(case: dict, found: Comparison) -> None:
    """Which places are relabelled shows only where the label changed; the rest of them may be any other."""
    count, rate, noisy = case["n"], case["label_noise"], found.arrays["noisy"].astype(np.int64)
    clean, head = np.arange(count) % 10, found.arrays.get("perm_head", np.array([], dtype=np.int64))
    known = dict.fromkeys([*head.tolist(), *np.flatnonzero(noisy != clean).tolist()])
    places = np.array([*known, *(place for place in range(count) if place not in known)])
    found.equal("noisy", noisy_labels(clean, rate, 10, Recorded(places, noisy)))
    if len(head):
        found.equal("labels_head", noisy[head])
    # Their own noise and ours have as many places, of which a tenth keeps its label by chance (five deviations).
    ours = noisy_labels(clean, rate, 10, np.random.default_rng(0))
    allowed = 5 * (0.09 * count * rate) ** 0.5
    for whose, labels in (("recorded", noisy), ("our", ours)):
        changed = int((labels != clean).sum())
        if abs(changed - 0.9 * int(count * rate)) > allowed:
            found.disagreements.append(f"expected about {0.9 * count * rate:.0f} changed {whose} labels, got {changed}")
    if (noisy != clean).sum() != case["n_changed"]:
        found.disagreements.append(f"expected {case['n_changed']} changed labels, got {(noisy != clean).sum()}")


FAMILIES: dict[str, Callable[[dict, Comparison], None]] = {
    "conv": check_conv,
    "batchnorm": check_batchnorm,
    "init": check_init,
    "sampling": check_sampling,
    "regularizer": check_regularizer,
    "train": check_train,
    "eval_pair": check_eval_pair,
    "eval_mid": check_eval_mid,
    "eval_ensemble": check_eval_ensemble,
    "eval_simplex_ensemble": check_eval_simplex_ensemble,
    "baseline": check_baseline,
    "update_bn": check_update_bn,
    "lr": check_lr,
    "label_smoothing": check_label_smoothing,
    "label_noise": check_label_noise,
}
