"""What a training step asks of its device, seen without one.

The steps run on torch's meta device, whose tensors have shapes and no values: reading one on the host (``item``,
``nonzero``, a branch), copying one there, or mixing one with a tensor of another device is an error. What is copied to
the device, for which the host waits as well, and which operations there are is noted. (FakeTensorMode would have
tensors of a GPU, but autograd asks for the driver of one before it goes back through them.)
"""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.config import CONF, compose_config
from experiments.grid import load_grid
from experiments.runtime import Setting, trainer_of
from experiments.training.run import run
from experiments.training.torch_settings import torch_settings
from tests import test_tasks_detection as detection
from tests.cases import METHODS, METHODS_AND_MODELS

META = torch.device("meta")
# Those of torch's operations that have no deterministic CUDA kernel, or none that torch takes by itself.
WITHOUT = {
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward",
    "adaptive_max_pool3d_backward", "avg_pool3d_backward", "max_pool3d_with_indices_backward",
    "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d", "max_unpool3d",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
    "replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward", "nll_loss2d_forward",
    "nll_loss2d_backward", "_ctc_loss_backward", "_embedding_bag_dense_backward", "put_", "histc", "bincount",
    "median", "kthvalue", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "scatter_reduce",
    "_roi_align_backward", "_roi_pool_backward",
}  # fmt: skip


class _Watched(TorchDispatchMode):
    """The operations that are called, and those that bring something of the host to the device while the host waits."""

    def __init__(self):
        super().__init__()
        self.operations, self.copies = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.operations.add(name)
        given, made = (
            [part for part in tree_leaves(tree) if isinstance(part, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        is_copy = name in ("_to_copy", "copy_", "_foreach_copy_")
        # Numbers without dimensions go along with a kernel; all others of the host, and lists of numbers, are copied.
        of_host = [part for part in given if part.device.type == "cpu" and (part.ndim or is_copy)]
        in_background = is_copy and (kwargs.get("non_blocking") or any(arg is True for arg in args))
        if any(part.device == META for part in made) and (name == "lift_fresh" or (of_host and not in_background)):
            self.copies.append(name)
        return result


def _two_steps(setting, **changes):
    """Two steps of a recipe on the meta device: what was noted in the second."""
    config = compose_config(setting.experiment, setting.changes | SMALL | changes)
    with torch_settings(config):
        trainer = trainer_of(setting, config, 2, META)
        trainer.model.train()
        for index, batch in enumerate(trainer.batches.train(0)):
            watched = _Watched()
            with watched:
                trainer.step(batch, trainer.batches.global_count(index))
            trainer.progress.step += 1
    assert index == 1
    return watched


def _require_ready(watched):
    assert watched.copies == []
    assert not watched.operations & WITHOUT
    assert any(name.endswith("_backward") for name in watched.operations)


@pytest.fixture(autouse=True)
def _without_autocast(monkeypatch):
    """torch has none for the meta device; so half precision is left out, and where it is switched off it stays off."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


SMALL = {"batch_size": 8, "precision": "fp32", "start_from": None, "ema_decay": 0.9, "clip_grad_norm": 1.0}
FAMILIES = {
    "quickstart": Setting("quickstart", {}, 10, 1, 8),
    "cifar_resnet": Setting("cifar_resnet", {"micro_batch": 4}, 10, 3, 32),
    "cifar_vit": Setting("cifar_vit", {}, 10, 3, 32),
    "cifar100_zoo": Setting("cifar100_zoo", {"model": "resnet18"}, 100, 3, 32),
    "imagenet_resnet": Setting("imagenet_resnet", {"model": "imagenet_resnet18"}, 1000, 3, 224),
    "imagenet_deit": Setting("imagenet_deit", {"model": "deit3_small", "model.depth": 2, "mix_group": 4}, 1000, 3, 224),
    "transfer": Setting("transfer", {"model.depth": 2, "mix_group": 4}, 10, 3, 224),
    "subspaces": Setting("subspaces", {"method": "line"}, 10, 3, 32),
    "proxprop": Setting("proxprop", {"validation_images": 0, "eval_train": False}, 10, 3, 32),
    "oialr": Setting("oialr", {"model.depth": 2}, 10, 3, 32),
    "compare": Setting("compare", {"method": "swa"}, 10, 3, 32),
}


# Whitening looks at images before the first step; a step in which OIALR turns weights into factors looks at these.
LIKE_LINE = ("curve", "simplex")
QUICK = [
    pytest.param(method, model, marks=[pytest.mark.slow] * (model == "resnet_small" or method in LIKE_LINE))
    for method, model in METHODS_AND_MODELS
    if method != "whitening"
]
OPTIONS = METHODS | {"oialr": {"method.delay": 10}}


def test_no_family_is_left_out():
    """But detection, which waits in each step for how many boxes it has, and is looked at below."""
    assert {path.stem for path in CONF.glob("*.yaml")} == {*FAMILIES, "detection_voc"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_every_family_waits_for_nothing_and_has_deterministic_kernels(name):
    _require_ready(_two_steps(FAMILIES[name]))


@pytest.mark.parametrize(("method", "model"), QUICK)
def test_a_step_with_every_method_too(method, model):
    _require_ready(_two_steps(FAMILIES["quickstart"], method=method, model=model, **OPTIONS[method]))


def test_detection_has_deterministic_kernels_too(voc, tmp_path):
    """By its own pooling of regions: torchvision's is not deterministic on a GPU, or slow and compiled."""
    with _Watched() as watched:
        run(detection.tiny_config(voc, tmp_path, max_steps=1))
    assert {"roi_pool", "index_put", "convolution_backward"} <= watched.operations
    assert not watched.operations & (WITHOUT | {"roi_align"})


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(load_grid("table1")["axes"]["model"]))
def test_a_step_of_every_network_of_the_zoo_too(model):
    _require_ready(_two_steps(FAMILIES["cifar100_zoo"], model=model))


FAULTS = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.sum() > 0 else 2,
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: x.copy_(torch.ones(3)),
    "made of numbers": lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=META),
    "list as index": lambda x: x[[0, 2]],
    "index on the host": lambda x: x[torch.tensor([0, 2])],
    "mixed devices": lambda x: x + torch.ones(3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_way_to_wait_would_show(fault):
    watched = _Watched()
    try:
        with watched:
            FAULTS[fault](torch.ones(3, device=META))
    except (NotImplementedError, RuntimeError):
        return
    assert watched.copies


def test_what_does_not_wait_is_let_through():
    x = torch.ones(3, device=META)
    with _Watched() as watched:
        torch.where(x > 0, 3, x).add_(torch.tensor(2.0))[0] = 1.0
        torch.ones(3).to(META, non_blocking=True)
    assert watched.copies == []
