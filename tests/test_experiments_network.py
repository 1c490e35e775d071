"""A method may change the model while it trains, and everything around the model follows; see reshaping.py."""

import functools
import gc
import itertools
import json
import signal
import weakref
from itertools import islice

import pytest
import torch
import torch.nn as nn

from experiments.ranks import Ranks
from experiments.training.loop import Trainer
from experiments.training.network import Network
from tests import reshaping
from tests.cases import tiny_config
from tests.same_runs import assert_equal_trees, assert_same, last_checkpoint, only_run
from tests.test_experiments_loop import SGD, _close, _model_and_batches, _train
from tests.test_resume import Machine
from tract.methods.base import Method
from tract.parameters import replace_in

SHORT = {"max_steps": 9, "model__width": 8}
VARIANTS = {
    "adam": {},
    "average": {"ema_decay": 0.8},
    "accumulation": {"micro_batch": 50, "ema_decay": 0.8},
    "groups": {"decay_matrices_only": True, "optim": "adamw", "clip_grad_norm": 1.0},
    "bf16": {"precision": "bf16", **SGD},
    "compiled": {"compile": True, "ema_decay": 0.8, **SGD},
}


@pytest.fixture
def reshaped(tmp_path, monkeypatch):
    """Train with method=reshaping, checked after every step."""
    monkeypatch.setattr("experiments.config.CONF", reshaping.with_reshaping(tmp_path / "conf"))
    monkeypatch.setattr("tests.cases.METHODS", {"reshaping": {}, "vanilla": {}})
    monkeypatch.setattr(Trainer, "after_step", reshaping.checked(Trainer.after_step))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return lambda name="run", **changes: _train(tmp_path / name, method="reshaping", **SHORT | changes)


# -- one rank -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_optimizer_and_average_hold_exactly_the_models_parameters_after_every_step(variant, reshaped):
    _, _, state = reshaped(**VARIANTS[variant])
    names = [name for name in state["model"] if name.startswith("head.1")]
    assert names == [f"head.1.{name}" for name in ("U", "V", "linear.weight", "linear.bias")]
    assert state["model"]["head.1.U"].shape == (3, 8)


def _literal(config):
    """Weights and their moving average of a run with SGD, step by step, without the loop."""
    model, batches = _model_and_batches(config)
    method = reshaping.Reshaping(2, 4, 6, "none")
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optim["lr"], momentum=config.optim["momentum"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.max_steps)
    average, decay = None, config.ema_decay
    for step, (x, y) in enumerate(islice(batches.train(0), config.max_steps)):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(model, optimizer, step)
        schedule.step()
        weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        before = weights if average is None else average
        if step == 4:
            before["head.1.U"] = torch.cat([before["head.1.U"], weights["head.1.U"][2:]])
        before = {n: before[n] if n in before and before[n].shape == w.shape else w for n, w in weights.items()}
        average = {name: decay * before[name] + (1 - decay) * w for name, w in weights.items()}
    return weights, average


def test_a_run_is_its_formulas_written_out(reshaped):
    config, _, state = reshaped(ema_decay=0.8, **SGD)
    weights, average = _literal(config)
    _close(state["model"], {name: weights[name] for name in state["model"]}, rtol=1e-4, atol=1e-5)
    got = {name.removeprefix("module."): t for name, t in state["ema"].items() if name != "n_averaged"}
    _close(got, {name: average[name] for name in got}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [64, 50, 7])
def test_accumulated_micro_batches_equal_the_large_batch(micro_batch, reshaped):
    _, _, whole = reshaped("whole", **SGD)
    _, _, parts = reshaped("parts", **SGD, micro_batch=micro_batch)
    _close(whole["model"], parts["model"], rtol=1e-3, atol=2e-5)


def test_compiled_equals_eager(reshaped):
    _, _, eager = reshaped("eager", **SGD, ema_decay=0.8)
    _, _, compiled = reshaped("compiled", **SGD, ema_decay=0.8, compile=True)
    for key in ("model", "ema"):
        _close(eager[key], compiled[key], rtol=1e-3, atol=2e-5)


class _Growing(Method):
    """One more row of a matrix after each step."""

    def after_step(self, model, optimizer, step):
        model.more = nn.Parameter(torch.zeros(step + 1, 2))
        optimizer.param_groups[0]["params"][2:] = [model.more]


class _Grown(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.register_parameter("more", None)

    def forward(self, x):
        return super().forward(x) + (0 if self.more is None else self.more.sum(0))


def _network(method, model, **changes):
    config = tiny_config("unused", **changes)
    return Network(config, model, method, torch.optim.SGD(model.parameters(), lr=0.1), Ranks())


def test_any_number_of_changes_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    # The limit is given, since timm.optim sets it to a million for the whole process.
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        network = _network(_Growing(), _Grown(), compile=True)
        for step in range(8):
            network.call(torch.ones(4, 3)).sum().backward()
            network.after_step(step)


def test_what_was_built_around_old_parameters_is_gone():
    model = _Grown()
    network = _network(_Growing(), model, ema_decay=0.5)
    network.after_step(0)
    old = [weakref.ref(part) for part in (model.more, network.average)]
    network.after_step(1)
    gc.collect()
    assert [reference() for reference in old] == [None, None]


def test_a_model_that_stays_as_it_is_is_left_alone():
    class Idle(Method):
        def after_step(self, model, optimizer, step):
            model.register_buffer("drawn", torch.full((1,), float(step)))  # assigned anew, of the same shape

    model = nn.Linear(3, 2)
    network = _network(Idle(), model, ema_decay=0.5)
    network.after_step(0)
    average = network.average
    network.after_step(1)
    assert network.average is average


def test_a_parameter_in_place_of_an_equal_one_is_a_change():
    """As where a basis is rotated: the average goes on, unless the method knows better."""

    class Turning(Method):
        def after_step(self, model, optimizer, step):
            old, model.bias = model.bias, nn.Parameter(-model.bias.detach())
            replace_in(optimizer, old, model.bias)

        def carry_average(self, before, after):
            after.bias.data = -before.bias

    model = nn.Linear(3, 2)
    start = model.bias.detach().clone()
    network = _network(Turning(), model, ema_decay=0.5)
    for step in range(3):
        network.after_step(step)
        torch.testing.assert_close(network.average.module.bias.detach(), start if step % 2 else -start)


FAULTS = {
    "lacks": (lambda model, optimizer: setattr(model, "new", nn.Parameter(torch.ones(1))), "without new;"),
    "keeps": (lambda model, optimizer: delattr(model, "bias"), r"not the model's, of shape \(2,\);"),
    "twice": (lambda model, optimizer: optimizer.param_groups[0]["params"].append(model.bias), "twice bias;"),
    "state": (
        lambda model, optimizer: optimizer.state[torch.ones(5)].update(x=1),
        r"state of another, of shape \(5,\)",
    ),
    "replaced": (
        lambda model, optimizer: setattr(model, "bias", nn.Parameter(torch.ones(2))),
        r"without bias; not the model's, of shape \(2,\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_optimizer_that_was_not_told_is_an_error_with_names(fault):
    change, message = FAULTS[fault]

    class Forgetful(Method):
        def after_step(self, model, optimizer, step):
            change(model, optimizer)

    with pytest.raises(ValueError, match=f"got: {message}"):
        _network(Forgetful(), nn.Linear(3, 2)).after_step(0)


def test_a_parameter_in_no_group_is_an_error_before_the_first_step():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="got: without bias;"):
        Network(tiny_config("unused"), model, Method(), torch.optim.SGD([model.weight], lr=0.1), Ranks())


class _InterruptedError(BaseException):
    pass


@pytest.mark.parametrize("variant", ["average", "groups", "compiled"])
def test_continued_after_every_step_it_ends_with_the_same_bytes(variant, reshaped, monkeypatch):
    changes = VARIANTS[variant] | {"runtime__checkpoint_steps": 1}
    _, undisturbed, whole = reshaped("whole", **changes)
    after_step, calls = Trainer.after_step, itertools.count()

    def interrupted(trainer, at_end):
        if next(calls) % 2:
            raise _InterruptedError
        after_step(trainer, at_end)

    monkeypatch.setattr(Trainer, "after_step", interrupted)
    for _ in range(SHORT["max_steps"] - 1):
        with pytest.raises(_InterruptedError):
            reshaped("parts", **changes)
    _, result, parts = reshaped("parts", **changes)
    assert result["attempts"] == SHORT["max_steps"]
    assert result["weights_sha256"] == undisturbed["weights_sha256"]
    for key in ("model", "optimizer", "ema"):
        assert_equal_trees(parts[key], whole[key])


def test_a_match_that_does_not_freeze_what_was_frozen_is_an_error(reshaped, monkeypatch):
    changes = {"method__fault": "thaw", "runtime__checkpoint_steps": 1}
    monkeypatch.setattr(Network, "after_step", _stopping_after(Network.after_step, 5))
    with pytest.raises(_InterruptedError):
        reshaped(**changes)
    with pytest.raises(ValueError, match=r"freeze what was frozen \(head.1.linear.bias\), got nothing"):
        reshaped(**changes)


def _stopping_after(after_step, last):
    def replacement(network, step):
        after_step(network, step)
        if step == last:
            raise _InterruptedError

    return replacement


# -- several ranks, and killed ----------------------------------------------------------------------

RUN = {
    "method": "reshaping", "model": "vit_small", "model.width": 8, "model.depth": 1, "batch_size": 130, "epochs": 1,
    "optim": "adamw", "optim.lr": 0.003, "decay_matrices_only": "true", "ema_decay": 0.8, "runtime.threads": 1,
    "runtime.workers": 0, "runtime.checkpoint_steps": 1, "runtime.log_every": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("machine"))
    conf = str(reshaping.with_reshaping(tmp_path_factory.mktemp("conf")))
    machine.start = functools.partial(machine.start, prepare=["tests.reshaping.prepare", conf])
    yield machine
    machine.server.stdin.close()
    machine.server.wait()


@pytest.fixture(scope="module")
def undisturbed(machine, tmp_path_factory):
    def train(ranks, **changes):
        runs = tmp_path_factory.mktemp("undisturbed")
        assert machine.start(_words(changes), runs=runs, ranks=ranks) == [0] * ranks, machine.output()
        return runs

    return functools.cache(train)


def _words(changes):
    return [f"{key.replace('__', '.')}={value}" for key, value in (RUN | changes).items()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_before_at_and_after_every_change_it_ends_with_the_same_bytes(
    ranks, machine, undisturbed, tmp_path, capsys
):
    """Checkpoints at steps 3, 6, 9 of 12; each attempt but the last is killed in its fifth step."""
    words, event = _words({"runtime.checkpoint_steps": 3}), ("optimizer", 5, "SIGKILL")
    codes = [machine.start(words, runs=tmp_path, ranks=ranks, event=event) for _ in range(4)]
    assert [first for first, *_ in codes] == [-signal.SIGKILL] * 3 + [0], machine.output()
    assert_same(tmp_path, undisturbed(ranks), capsys)


def test_two_ranks_equal_one(undisturbed):
    one, two = (last_checkpoint(only_run(undisturbed(ranks, optim="sgd"))) for ranks in (1, 2))
    for key in ("model", "ema"):
        _close(one[key], two[key], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_two_ranks_compiled(machine, undisturbed, tmp_path):
    codes = machine.start(_words({"compile": "true", "optim": "sgd"}), runs=tmp_path, ranks=2)
    assert codes == [0, 0], machine.output()
    one, two = (last_checkpoint(only_run(runs)) for runs in (undisturbed(1, optim="sgd"), tmp_path))
    _close(one["model"], two["model"], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("draw", "alike on every rank in step 2, got differences in head.1.U; random numbers must come from the step"),
        ("forget", "got: without head.1.U, head.1.V, head.1.scale;"),
    ],
)
def test_a_change_that_cannot_be_followed_is_one_sentence_on_all_ranks(fault, message, machine, tmp_path):
    codes = machine.start(_words({"method.fault": fault}), runs=tmp_path, ranks=2)
    assert codes == [1, 1]
    assert machine.output().count(message) >= 2
    assert message in json.loads((only_run(tmp_path) / "failure.json").read_text())["reason"]
