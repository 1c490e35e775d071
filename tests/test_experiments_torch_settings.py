"""Torch's global switches belong to a run while it runs, and to nobody's result but as its configuration says."""

import json
from contextlib import suppress
from itertools import islice

import pytest
import torch

from experiments.config import compose_config, config_hash, folder_of, from_tree, to_tree
from experiments.ranks import Ranks
from experiments.training.assembly import build_trainer, load_data
from experiments.training.log import RunLog
from experiments.training.optim import state_by_name
from experiments.training.run import run
from experiments.training.stop import StopRequest
from experiments.training.torch_settings import Switches, torch_settings
from runfolder.errors import UserError
from tests.cases import METHODS_AND_MODELS, tiny_config
from tests.same_runs import assert_equal_trees

WANTED = [
    ({}, (True, False, "highest", True)),
    ({"runtime.deterministic": False}, (False, True, "highest", True)),
    ({"matmul_precision": "high"}, (True, False, "high", True)),
    ({"matmul_precision": "medium", "conv_precision": "highest"}, (True, False, "medium", False)),
]


def _seen():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
    )


@pytest.mark.parametrize(("changes", "expected"), WANTED)
def test_a_run_has_the_switches_of_its_configuration(changes, expected):
    with torch_settings(compose_config("quickstart", changes)):
        assert _seen() == expected
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("before", [True, False])
def test_they_are_put_back_whatever_they_were_also_after_an_error(before):
    usual = Switches.now()
    odd = Switches(1, before, before, before, before, "high" if before else "highest", not before)
    other = {"matmul_precision": "medium", "conv_precision": "highest" if odd.conv_tf32 else "high"}
    try:
        odd.put()
        with suppress(ZeroDivisionError), torch_settings(compose_config("quickstart", other)):
            assert Switches.now() != odd
            raise ZeroDivisionError
        assert Switches.now() == odd
    finally:
        usual.put()


def test_an_operation_without_a_deterministic_kernel_is_named_with_the_cure():
    def train(deterministic):
        with torch_settings(compose_config("quickstart", {"runtime.deterministic": deterministic})):
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    train(deterministic=False)
    with pytest.raises(UserError, match=r"got put_, which has none on this device; runtime.deterministic=false"):
        train(deterministic=True)


def test_precisions_decide_the_run_and_at_their_usual_values_leave_its_name_as_it_was():
    usual = compose_config("cifar_vit", {})
    tree = to_tree(usual)
    assert not {"matmul_precision", "conv_precision"} & tree.keys()  # so runs from before they came are found
    changed = [compose_config("cifar_vit", c) for c, _ in WANTED[2:]]
    hashes = {config_hash(config) for config in (usual, *changed, compose_config("cifar_vit", WANTED[1][0]))}
    assert len(hashes) == 3
    for config in changed:
        assert from_tree(to_tree(config)) == config
    with pytest.raises(UserError, match="expected conv_precision to be highest or high, got 'medium'"):
        compose_config("cifar_vit", {"conv_precision": "medium"})


def test_the_record_of_an_attempt_has_them(tmp_path):
    config = tiny_config(tmp_path, max_steps=1, matmul_precision="high", runtime__deterministic=False)
    run(config)
    (attempt,) = json.loads(folder_of(config).provenance.read_text())["attempts"]
    assert attempt["switches"] == {
        "threads": 1, "deterministic": False, "warn_only": False, "fill_uninitialized_memory": False,
        "cudnn_benchmark": True, "matmul_precision": "high", "conv_tf32": True,
    }  # fmt: skip


def _trained(config, fill):
    """All that two steps leave, with new tensors full of nan or of whatever was there."""
    with torch_settings(config):
        torch.utils.deterministic.fill_uninitialized_memory = fill
        made = (Ranks(), torch.device("cpu"), StopRequest(None), RunLog(), lambda step, state: None)
        trainer = build_trainer(config, load_data(config, Ranks()), *made)
        trainer.model.train()
        for index, batch in enumerate(islice(trainer.batches.train(0), 2)):
            trainer.step(batch, trainer.batches.global_count(index))
            trainer.progress.step += 1
        return {
            "model": trainer.model.state_dict(),
            "optimizer": state_by_name(trainer.optimizer, trainer.model),
            "average": trainer.network.average.state_dict(),
        }


@pytest.mark.parametrize(("method", "model"), METHODS_AND_MODELS)
def test_nothing_reads_memory_that_it_has_not_written(method, model, tmp_path):
    """Deterministic mode can fill new memory with nan; nothing needs it, so runs leave it off."""
    small = {"model__width": 8} if model == "resnet_small" else {}
    config = tiny_config(
        tmp_path, method, model=model, batch_size=64, micro_batch=40, ema_decay=0.5, clip_grad_norm=1.0, **small
    )
    assert_equal_trees(_trained(config, fill=True), _trained(config, fill=False))


def test_the_filling_would_show():
    with torch_settings(compose_config("quickstart", {})):
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all()
