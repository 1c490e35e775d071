"""A recorded step that is replayed trains as the steps that it stands for; see recorded.py."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from experiments.config import COMPILE_MODES, folder_of, run_name
from experiments.models import resnet
from experiments.tasks.classification import Classification
from experiments.training import step_graph
from experiments.training.loop import Trainer
from experiments.training.run import run
from experiments.training.stop import StoppedError
from runfolder.errors import TrainingFailedError, UserError
from tests.cases import tiny_config
from tests.recorded import Recorder
from tests.same_runs import assert_equal_trees, last_checkpoint, points
from tests.test_experiments_loop import _close
from tract.methods.base import Method

# 11 steps of 130 images in an epoch and one of 7, fewer than the network's images.
SHORT = {"epochs": 2, "batch_size": 130, "runtime__log_every": 4, "compile": "graph"}
VARIANTS = {
    "tract": {"method": "tract", "ema_decay": 0.8},
    "groups": {"optim": "adamw", "decay_matrices_only": True, "bias_lr": 2.0, "clip_grad_norm": 0.3, "method": "tract"},
    "accumulation": {"micro_batch": 50, "method": "tract"},
    "bf16, mixed": {"precision": "bf16", "mixup": 0.8, "cutmix": 1.0},
    "sgd": {"optim": "sgd", "optim__lr": 0.05, "model": "resnet_small"},
    "two rules": {"optim": "sgd_adam", "optim__lr": 0.003, "method": "tract"},
    "two methods": {"method": "tract+patchnorm"},
    "proximal steps": {"method": "proxprop"},
    "fp16": {"precision": "fp16", "method": "tract", "clip_grad_norm": 0.5, "ema_decay": 0.8},
    "fp16, sgd": {"precision": "fp16", "optim": "sgd", "optim__lr": 0.05, "micro_batch": 50},
}


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setattr(step_graph, "Recorder", Recorder)


def _trained(folder, method="vanilla", **changes):
    width = {} if "model" in changes else {"model__width": 8}
    one = [tiny_config(folder, method=name, **SHORT | width | changes) for name in method.split("+")]
    config = one[0]
    if len(one) > 1:
        parts = {each.method["name"]: each.method for each in one}
        config.method = {"name": method, "_target_": "tract.methods.composed.Composed"} | parts
    run(config)
    return folder_of(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_steps_give_the_same_bytes(variant, tmp_path, monkeypatch):
    replayed = _trained(tmp_path / "replayed", **VARIANTS[variant])
    assert (Recorder.runs, Recorder.recordings, Recorder.replays) == (3 + 2, 1, 2 * 11 - 3)
    monkeypatch.setattr(step_graph, "_STEPS_BEFORE", 1000)
    eager = _trained(tmp_path / "eager", **VARIANTS[variant])
    assert (Recorder.runs, Recorder.replays) == (2 * 12, 0)
    states = [last_checkpoint(folder) for folder in (replayed, eager)]
    for key in ("model", "optimizer", "ema", "scaler"):
        assert_equal_trees(states[0][key], states[1][key])
    assert points(replayed) == points(eager)


def test_replayed_steps_train_as_a_run_without_graphs(tmp_path):
    sgd = {"method": "tract", "optim": "sgd", "optim__lr": 0.05}
    states = [last_checkpoint(_trained(tmp_path, compile=kind, **sgd)) for kind in ("graph", False)]
    _close(states[0]["model"], states[1]["model"], rtol=1e-3, atol=2e-5)


def test_the_debugger_of_gradients_runs_every_step_as_it_is(tmp_path):
    _trained(tmp_path, runtime__anomaly=True, max_steps=6)
    assert (Recorder.runs, Recorder.recordings) == (6, 0)


@pytest.mark.parametrize("steps", [2, 9, 12])
def test_a_run_that_is_stopped_ends_with_the_same_bytes(steps, tmp_path, monkeypatch):
    whole = _trained(tmp_path / "whole", method="tract", ema_decay=0.8)
    after_step = Trainer.after_step

    def stopped(self, at_end):
        after_step(self, at_end)
        if self.progress.step == steps:
            self._checkpoint()
            raise StoppedError("asked to")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "after_step", stopped)
        with pytest.raises(StoppedError):
            _trained(tmp_path / "stopped", method="tract", ema_decay=0.8)
    resumed = _trained(tmp_path / "stopped", method="tract", ema_decay=0.8)
    assert Recorder.replays > 0
    states = [last_checkpoint(folder) for folder in (whole, resumed)]
    for key in ("model", "optimizer", "ema"):
        assert_equal_trees(states[0][key], states[1][key])
    assert points(whole) == points(resumed)


@pytest.fixture
def damaged(monkeypatch):
    """A batch that is not finite, in step 7: a replayed one."""
    prepared = Classification.prepared

    def damage(self, batch, step, groups):
        images, labels = prepared(self, batch, step, groups)
        return images / (step != 6), labels

    monkeypatch.setattr(Classification, "prepared", damage)


def test_a_loss_that_is_not_finite_is_reported_with_its_step(damaged, tmp_path):
    with pytest.raises(TrainingFailedError, match="train/loss is not finite in step 7;"):
        _trained(tmp_path)
    assert Recorder.replays == 8 - 3, "seen at the next point of the log"


def test_a_layer_still_says_what_it_requires(damaged, tmp_path):
    with pytest.raises(TrainingFailedError, match="TrAct layer emb: expected finite inputs"):
        _trained(tmp_path, method="tract")
    assert Recorder.replays == 7 - 3


def test_a_step_whose_scaled_gradients_overflow_is_left_out_by_a_replay_too(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.amp.GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    states = []
    for before in (3, 1000):
        monkeypatch.setattr(step_graph, "_STEPS_BEFORE", before)
        states.append(last_checkpoint(_trained(tmp_path / str(before), precision="fp16", max_steps=30)))
    assert_equal_trees(states[0]["model"], states[1]["model"])
    assert_equal_trees(states[0]["scaler"], states[1]["scaler"])
    assert states[0]["scaler"]["scale"] < 2.0**40


REFUSED = {
    "a GPU for compile=graph, got runtime.device=cpu": {},
    "skips bad steps by itself for compile=graph, got precision=fp16, optim=sgd_adam": {
        "precision": "fp16",
        "method": "tract",
        "optim": "sgd_adam",
    },
    "does the same in every step for compile=graph, got line": {"method": "line"},
    "does the same in every step for compile=graph, got tract\\+line": {"method": "tract+line"},
    "does the same in every step for compile=graph, got oialr": {"method": "oialr"},
    "an optimizer with a fused kernel of torch's for compile=graph, got optim=lamb": {
        "optim": "lamb",
        "optim__lr": 0.1,
    },
    "a network that waits for nothing for compile=graph, got operation not permitted": {"model": "asking"},
    "compile to be true, false, default, reduce-overhead, max-autotune, graph, got 'graphs'": {"compile": "graphs"},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_recorded_is_refused_in_a_sentence(sentence, tmp_path, monkeypatch):
    if "cpu" in sentence:
        monkeypatch.setattr(Recorder, "device_type", "cuda")
    changes = dict(REFUSED[sentence])
    if changes.get("model") == "asking":
        changes["model"] = "resnet_small"
        forward = resnet.SmallResNet.forward
        monkeypatch.setattr(resnet.SmallResNet, "forward", lambda self, x: forward(self, x * float(x.max() > -1e9)))
    with pytest.raises(UserError, match=f"expected .*{sentence}"):
        _trained(tmp_path, **changes)


@pytest.mark.parametrize(
    ("ranks", "replayable", "sentence"),
    [(2, True, "one rank for compile=graph, got 2"), (1, False, "batches of one shape for compile=graph, got boxes")],
)
def test_ranks_and_batches_of_many_shapes_are_refused(ranks, replayable, sentence):
    task = SimpleNamespace(replayable=replayable, name="boxes")
    config = tiny_config("unused", compile="graph")
    with pytest.raises(UserError, match=f"expected {sentence}; compile=false trains it"):
        step_graph.step_graph(config, task, Method(), None, SimpleNamespace(size=ranks), torch.device("cpu"))


def test_a_mode_of_the_compiler_is_a_run_of_its_own():
    names = {mode: run_name(tiny_config("unused", compile=mode)) for mode in (False, True, *COMPILE_MODES, "graph")}
    assert names[True] == names["default"]
    assert len(set(names.values())) == 5


def test_the_mode_reaches_the_compiler(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda network, mode: modes.append(mode) or network)
    for kind in (True, "max-autotune", "graph", False):
        _trained(tmp_path, compile=kind, max_steps=1)
    assert modes == [None, "max-autotune"]
