import functools
import itertools
import json
import math
import re
from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.utils import clip_grad_norm_

from experiments.config import CONF, build, choices_of, config_hash, folder_of, options_of
from experiments.data.batches import Batches
from experiments.models import build_model
from experiments.randomness import seed_torch
from experiments.ranks import Ranks
from experiments.training import checkpoint
from experiments.training.loop import Trainer
from experiments.training.run import run
from runfolder.errors import TrainingFailedError, UserError
from runfolder.records import read_result
from tests.cases import METHODS, METHODS_AND_MODELS, tiny_config
from tract.methods.base import Method

SGD = {"optim": "sgd", "optim__lr": 0.05}


def _train(folder, **overrides):
    """(config, result, content of the last checkpoint) of a run."""
    config = tiny_config(folder, **overrides)
    result = run(config)
    last = folder_of(config).newest_checkpoint()
    return config, result, checkpoint.load(last, config_hash(config))


def _scalars(config):
    """{tag: [(x, value), ...]} as TensorBoard reads it."""
    events = EventAccumulator(str(folder_of(config)), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _model_and_batches(config):
    data = build(config.data).load()
    seed_torch(config.seed, "initialisation")
    model = build_model(config.model["name"], 10, **data.shape, **options_of(config.model))
    options = {key: getattr(config, key) for key in ("seed", "batch_size", "drop_last", "eval_batch_size")}
    batches = Batches(data, **options, overfit=None, workers=0, ranks=Ranks(), device=torch.device("cpu"))
    return model, batches


def _close(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# -- one run, written out -------------------------------------------------------------------------


def _literal(config, steps):
    """Weights, their moving average and the losses of SGD with a cosine, step by step."""
    model, batches = _model_and_batches(config)
    loss_function = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optim["lr"], momentum=config.optim["momentum"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average, losses, decay = None, [], config.ema_decay or 0.0
    for x, y in islice((batch for epoch in range(config.epochs) for batch in batches.train(epoch)), steps):
        loss = loss_function(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if config.clip_grad_norm is not None:
            clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        schedule.step()
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        average = weights if average is None else {n: decay * average[n] + (1 - decay) * weights[n] for n in weights}
        losses.append(loss.item())
    return weights, average, losses


LITERAL = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.1},
    "gradient norm": {"clip_grad_norm": 0.3},
    "moving average": {"ema_decay": 0.7},
    "whole batches only": {"drop_last": True, "max_steps": 13},
}


@pytest.mark.parametrize("case", LITERAL)
def test_a_run_is_its_formulas_written_out(case, tmp_path):
    changes = {"max_steps": 7} | LITERAL[case]
    config, _, state = _train(tmp_path, **SGD, runtime__log_every=1, **changes)
    weights, average, losses = _literal(config, config.max_steps)
    _close(state["model"], weights, rtol=1e-4, atol=1e-5)
    assert [value for _, value in _scalars(config)["train/loss"]] == pytest.approx(losses, rel=1e-4)
    if config.ema_decay is not None:
        ema = {name.removeprefix("module."): t for name, t in state["ema"].items() if name != "n_averaged"}
        _close(ema, average, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro_batch", [64, 50, 7])
def test_accumulated_micro_batches_equal_the_large_batch(method, micro_batch, tmp_path):
    _, _, whole = _train(tmp_path, method=method, **SGD, max_steps=4)
    _, _, parts = _train(tmp_path, method=method, **SGD, max_steps=4, micro_batch=micro_batch)
    _close(whole["model"], parts["model"], rtol=1e-3, atol=2e-5)


# -- evaluation and record --------------------------------------------------------------------------


def test_evaluation_equals_scikit_learns(tmp_path):
    config, result, state = _train(tmp_path, epochs=2, eval_batch_size=77)
    model, batches = _model_and_batches(config)
    model.load_state_dict(state["model"])
    with torch.no_grad():
        scores = torch.cat([model.eval()(x) for x, _ in batches.test()]).double()
    labels = torch.cat([y for _, y in batches.test()]).numpy()
    metrics = result["metrics"]
    assert metrics["test/top1"] == pytest.approx(100 * accuracy_score(labels, scores.argmax(1).numpy()))
    assert metrics["test/top5"] == pytest.approx(100 * top_k_accuracy_score(labels, scores.numpy(), k=5))
    assert metrics["test/loss"] == pytest.approx(log_loss(labels, scores.softmax(1).numpy()), rel=1e-5)


EPOCH_TAGS = {"test/loss", "test/top1", "test/top5", "test/ece", "time/epoch_seconds", "time/train_seconds"}
EPOCH_TAGS |= {"memory/peak_mib", "time/images_per_second"}
EPOCH_TAGS |= {"model/parameters_trainable", "model/parameters_inference", "model/state_bytes"}


@pytest.mark.parametrize(
    ("changes", "evaluations", "steps"),
    [
        ({"epochs": 3}, [1, 2, 3], 36),  # 1,437 images: 12 steps of at most 128
        ({"epochs": 5, "eval_every": 2}, [2, 4, 5], 60),
        ({"epochs": 2, "drop_last": True}, [1, 2], 22),
        ({"epochs": 5, "max_steps": 30}, [1, 2, 3], 30),
        ({"epochs": 5, "max_steps": 1}, [1], 1),
    ],
)
def test_the_record_has_steps_and_epochs_as_x_axes(changes, evaluations, steps, tmp_path):
    config, result, _ = _train(tmp_path, method="tract", runtime__log_every=5, **changes)
    per_epoch = 11 if config.drop_last else 12
    logged = sorted(set(range(5, steps + 1, 5)) | set(range(per_epoch, steps + 1, per_epoch)) | {steps})
    scalars = _scalars(config)
    for tag in ("train/loss", "train/top1", "train/lr"):
        assert [x for x, _ in scalars[tag]] == logged, tag
    others = scalars.keys() - EPOCH_TAGS - {"train/loss", "train/top1", "train/lr"}
    assert others
    assert all(tag.startswith("tract/") for tag in others)
    for tag in EPOCH_TAGS | others:
        assert [x for x, _ in scalars[tag]] == evaluations, tag
    assert result["steps"] == steps
    assert scalars["test/top1"][-1][1] == pytest.approx(result["metrics"]["test/top1"])
    for step, rate in scalars["train/lr"]:  # of the step that was just taken, the first being step 0
        expected = config.optim["lr"] * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        assert rate == pytest.approx(expected, rel=1e-5)


def test_peak_memory_is_that_of_the_runs_own_training(tmp_path, monkeypatch):
    """Not of an evaluation, an earlier run in the process, or an earlier epoch."""
    peak, steps, evaluate = [1000.0], itertools.count(1), Trainer._in_use

    def trained(trainer, *arguments):
        peak[0] = max(peak[0], next(steps))
        return step(trainer, *arguments)

    def evaluated(trainer, predictor):
        peak[0] = max(peak[0], 500.0)
        return evaluate(trainer, predictor)

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", trained)
    monkeypatch.setattr(Trainer, "_in_use", evaluated)
    monkeypatch.setattr("experiments.training.loop._forget_peak", lambda device: peak.__setitem__(0, 0.0))
    monkeypatch.setattr("experiments.training.loop._peak_mib", lambda device: peak[0])
    config, _, _ = _train(tmp_path, epochs=3)
    assert _scalars(config)["memory/peak_mib"] == [(1, 12.0), (2, 24.0), (3, 36.0)]


@pytest.mark.parametrize(
    ("given", "takes", "between"),
    [(None, 0.5, 300), (None, 3.0, 300), (None, 9.0, 900), (120.0, 9.0, 120), (0.0, 9.0, 60)],
)
def test_checkpoints_take_a_hundredth_of_the_time_unless_told_otherwise(given, takes, between, tmp_path, monkeypatch):
    """By a clock on which a step takes a minute."""
    now, begun, step, save = [0.0], [], Trainer.step, checkpoint.Keeper.save

    def stepped(trainer, *arguments):
        now[0] += 60
        return step(trainer, *arguments)

    def saved(keeper, *arguments):
        begun.append(now[0])
        now[0] += takes
        return save(keeper, *arguments)

    monkeypatch.setattr("experiments.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Trainer, "step", stepped)
    monkeypatch.setattr(checkpoint.Keeper, "save", saved)
    run(tiny_config(tmp_path, epochs=12, runtime__checkpoint_seconds=given))
    waits = [later - earlier - takes for earlier, later in zip(begun[1:-1], begun[2:-1], strict=False)]
    assert waits
    assert set(waits) == {between}


def test_training_accuracy_and_loss_are_means_over_the_window(tmp_path):
    often, _, _ = _train(tmp_path / "often", runtime__log_every=1, epochs=1)
    seldom, _, _ = _train(tmp_path / "seldom", runtime__log_every=50, epochs=1)
    counts = np.array([128] * 11 + [1437 - 11 * 128])
    for tag in ("train/loss", "train/top1"):
        values = np.array([value for _, value in _scalars(often)[tag]])
        ((x, mean),) = _scalars(seldom)[tag]
        assert (x, mean) == (12, pytest.approx((values * counts).sum() / 1437, rel=1e-5))


def test_runtime_does_not_change_the_weights_but_the_seed_does(tmp_path):
    changes = [{}, {"log_every": 3}, {"checkpoint_steps": 2, "keep_checkpoints": 1}, {"checkpoint_seconds": 0.0}]
    digests = {
        _train(tmp_path / str(i), **{f"runtime__{key}": value for key, value in change.items()})[1]["weights_sha256"]
        for i, change in enumerate(changes)
    }
    assert len(digests) == 1
    assert _train(tmp_path / "seed", seed=1)[1]["weights_sha256"] not in digests


def test_a_finished_run_is_only_reported(tmp_path):
    config, result, _ = _train(tmp_path, max_steps=2)
    before = {path: path.stat().st_mtime_ns for path in folder_of(config).path.rglob("*") if path.name != "lock"}
    assert run(config) == result == read_result(folder_of(config))
    assert before == {
        path: path.stat().st_mtime_ns for path in folder_of(config).path.rglob("*") if path.name != "lock"
    }


# -- failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint_before(log_every, tmp_path):
    changes = {"optim": "sgd", "optim__lr": 1e30, "runtime__checkpoint_steps": 1, "runtime__log_every": log_every}
    config = tiny_config(tmp_path, model="resnet_small", model__width=8, **changes)
    with pytest.raises(TrainingFailedError, match=r"train/loss is not finite in step (\d+)") as caught:
        run(config)
    step = int(re.search(r"step (\d+)", str(caught.value))[1])
    folder = folder_of(config)
    assert json.loads((folder / "failure.json").read_text())["reason"] == str(caught.value)
    assert not (folder / "result.json").exists()
    state = checkpoint.load(folder.newest_checkpoint(), config_hash(config))
    assert state["step"] == step - 1 == 1
    assert all(math.isfinite(number) for number in state["progress"]["window"])


# -- methods --------------------------------------------------------------------------------------------


def test_the_table_has_every_method():
    assert set(METHODS) == set(choices_of("method"))


@pytest.mark.parametrize(("method", "model"), METHODS_AND_MODELS)
def test_every_method_learns_and_the_optimizer_has_exactly_the_models_parameters(method, model, tmp_path, monkeypatch):
    after_step, seen = Trainer.after_step, []

    def checked(trainer, at_end):
        held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in trainer.model.parameters())
        assert {id(p) for p in trainer.optimizer.state} <= set(held)
        seen.append(trainer.progress.step)
        after_step(trainer, at_end)

    monkeypatch.setattr(Trainer, "after_step", checked)
    size = {"model__width": 8} if model == "resnet_small" else {"model__width": 32, "model__depth": 1}
    learn = {"epochs": 4, "batch_size": 32, "optim__lr": 0.01, "data__augment": "none", "runtime__log_every": 1000}
    config, result, _ = _train(tmp_path, method=method, model=model, **size, **learn)
    losses = [value for _, value in _scalars(config)["train/loss"]]
    assert seen == list(range(len(seen)))
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    assert result["metrics"]["test/loss"] < math.log(10)  # better than guessing


RELATIVES = [name for name in METHODS if name not in ("vanilla", "tract", "patchnorm", "dual_patchnorm")]


@pytest.mark.parametrize("method", RELATIVES)
def test_compiled_equals_eager(method, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    short = {**SGD, "max_steps": 3, "ema_decay": 0.8}
    _, eager, its = _train(tmp_path / "eager", method=method, **short)
    _, compiled, state = _train(tmp_path / "compiled", method=method, compile=True, **short)
    for key in ("model", "ema"):
        _close(its[key], state[key], rtol=1e-3, atol=2e-5)
    assert compiled["metrics"].keys() == eager["metrics"].keys()


@pytest.mark.parametrize("method", RELATIVES)
def test_bf16_stays_near_float32(method, tmp_path):
    short = {**SGD, "max_steps": 6, "ema_decay": 0.8}
    _, exact, its = _train(tmp_path / "fp32", method=method, **short)
    _, rounded, state = _train(tmp_path / "bf16", method=method, precision="bf16", **short)
    assert all(tensor.dtype == its["model"][name].dtype for name, tensor in state["model"].items())
    first, second = (torch.cat([t.flatten().double() for t in s["model"].values()]) for s in (its, state))
    assert 0 < (first - second).norm() < 0.02 * first.norm()
    for tag in ("test/loss", "ema/loss"):
        assert rounded["metrics"][tag] == pytest.approx(exact["metrics"][tag], rel=0.02)


def test_hooks_are_called_in_the_documented_order(tmp_path, monkeypatch):
    calls = []

    class Recording(Method):
        def apply(self, model):
            calls.append("apply")

        def match(self, model, weights):
            assert weights.keys() == model.state_dict().keys()
            calls.append("match")

        def param_groups(self, model):
            calls.append("param_groups")
            return super().param_groups(model)

        def before_step(self, model, step):
            calls.append(f"before_step {step}")

        @contextmanager
        def accumulating(self, model):
            calls.append("accumulating")
            yield
            calls.append("accumulated")

        def penalty(self, model):
            calls.append("penalty")

        def after_step(self, model, optimizer, step):
            calls.append(f"after_step {step}")

        def evaluated(self, model, occasion):
            assert not model.training
            calls.append("evaluated")
            return super().evaluated(model, occasion)

        def metrics(self, model):
            calls.append("metrics")
            yield "recording/calls", float(len(calls))

    monkeypatch.setattr("tract.methods.base.Method", Recording)
    steps = [[f"before_step {s}", "accumulating", "accumulated", "penalty", f"after_step {s}"] for s in range(2)]
    config, result, _ = _train(tmp_path, max_steps=2, micro_batch=64)
    assert calls == ["apply", "param_groups", *steps[0], *steps[1], "evaluated", "metrics"]
    assert result["metrics"]["recording/calls"] == len(calls)

    calls.clear()
    (folder_of(config) / "result.json").unlink()
    run(config)
    assert calls == ["apply", "match", "param_groups"]

    calls.clear()
    _train(tmp_path, max_steps=1)
    assert calls[2:-2] == ["before_step 0", "penalty", "after_step 0"]


def test_a_penalty_is_added_once_per_step_however_many_micro_batches(tmp_path, monkeypatch):
    class Decay(Method):
        def penalty(self, model):
            return 0.05 * sum(p.square().sum() for p in model.parameters())

    expected = _train(tmp_path / "decay", **SGD, optim__weight_decay=0.1, max_steps=4)[2]
    monkeypatch.setattr("tract.methods.base.Method", Decay)
    for micro_batch in (None, 50):
        got = _train(tmp_path / "penalty", **SGD, max_steps=4, micro_batch=micro_batch)[2]
        _close(got["model"], expected["model"], rtol=1e-3, atol=2e-5)


def test_the_loop_names_no_method_model_or_data_set():
    source = (CONF.parent / "training" / "loop.py").read_text()
    body = "\n".join(line for line in source.splitlines() if not line.startswith("from "))
    imports = [line for line in source.splitlines() if line.startswith("from tract")]
    assert imports == ["from tract.methods.base import Measure, Method, Occasion"]
    names = [name for group in ("method", "model", "data") for name in choices_of(group)]
    assert not [name for name in names if re.search(rf"\b{name}\b", body, re.IGNORECASE)]


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"channels_last": True}])
def test_other_number_and_memory_formats_learn_the_same(changes, tmp_path):
    size = {"model": "resnet_small", "model__width": 8, "epochs": 2}
    plain, other = (_train(tmp_path, **size, **more)[1]["metrics"]["test/loss"] for more in ({}, changes))
    assert other == pytest.approx(plain, rel=0.05)


def test_bad_input_met_while_training_keeps_its_checkpoints(tmp_path, monkeypatch):
    after_step = Trainer.after_step

    def bad_image(trainer, at_end):
        after_step(trainer, at_end)
        if trainer.progress.step == 3:
            raise UserError("expected a readable image")

    config = tiny_config(tmp_path, runtime__checkpoint_steps=2)
    monkeypatch.setattr(Trainer, "after_step", bad_image)
    with pytest.raises(UserError, match="readable image"):
        run(config)
    assert folder_of(config).newest_checkpoint().name.startswith("step-00000002-")


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [None, 1, 4, 21, 64])
@pytest.mark.parametrize("images", [9, 64, 65])
def test_no_micro_batch_is_empty_or_larger_than_asked(images, micro_batch, ranks):
    """Equally many on every rank; one image more only where the smallest share leaves no other way."""

    class Stub:
        config = tiny_config("unused", batch_size=images, micro_batch=micro_batch)
        method = Method()

    shares = [len(share) for share in np.array_split(np.arange(images), ranks)]
    parts = Trainer._parts(Stub, shares)
    sizes = [len(part) for share in shares for part in np.array_split(np.arange(share), parts)]
    assert min(sizes) >= 1
    assert max(sizes) <= (micro_batch or max(shares)) or parts == min(shares)
