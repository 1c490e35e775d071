"""Several methods as one: each hook of each part, and one sentence where parts contradict each other."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn

from experiments.config import compose_config, from_tree, to_tree
from experiments.training.loop import Trainer
from experiments.training.run import run
from tests.cases import METHODS, tiny_config
from tests.same_runs import assert_equal_trees
from tests.test_experiments_loop import SGD, _close, _train
from tract.methods.base import Method
from tract.methods.composed import Composed
from tract.methods.patchnorm import PatchNormMethod
from tract.methods.tract import TrActMethod

SIZES = {"max_steps": 4, "model__width": 8, "micro_batch": 50, "ema_decay": 0.8}


def _tract(layer=None):
    return TrActMethod(0.1, layer, "global")


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3))


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """The last checkpoint of a run with these methods."""
    monkeypatch.setitem(METHODS, "several", {})

    def train(name, *methods, **changes):
        several = methods[0] if len(methods) == 1 else list(methods)
        monkeypatch.setattr("tests.cases.compose_config", lambda e, o: compose_config(e, o | {"method": several}))
        return _train(tmp_path / name, **{"method": "several"} | SIZES | changes)[2]

    return train


# -- laws of whole runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vanilla"])
def test_composed_with_vanilla_a_method_trains_to_the_same_bytes(method, composed):
    alone = composed("alone", method)
    for name, parts in {"before": ("vanilla", method), "after": (method, "vanilla")}.items():
        both = composed(name, *parts)
        for key in ("model", "ema", "optimizer"):
            assert_equal_trees(both[key], alone[key])


@pytest.mark.parametrize("method", METHODS)
def test_one_part_is_that_method(method, tmp_path):
    """By a node of its own here: on the command line a list of one is that one."""
    _, alone, _ = _train(tmp_path / "alone", method=method, **SIZES)
    tree = to_tree(tiny_config(tmp_path / "one", method=method, **SIZES))
    tree["method"] = {"name": method, "_target_": "tract.methods.composed.Composed", method: tree["method"]}
    one = run(from_tree(tree))
    assert one["weights_sha256"] == alone["weights_sha256"]
    assert one["metrics"] == alone["metrics"]


def test_the_order_of_tract_and_patchnorm_makes_no_difference(composed):
    first, second = composed("first", "tract", "patchnorm"), composed("second", "patchnorm", "tract")
    assert_equal_trees(first["model"], second["model"])


def test_tract_with_patchnorm_is_tract_on_normalised_patches(composed):
    """The second route: the plain pair of a normalised model and TrAct by hand, gradient for gradient."""
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    both, by_hand = _model(), _model()
    Composed(tract=_tract(), patchnorm=PatchNormMethod(None)).apply(both)
    _tract().apply(by_hand)
    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    both(x).square().sum().backward()
    by_hand(normed).square().sum().backward()
    torch.testing.assert_close(both[0].embedding.weight.grad, by_hand[0].weight.grad)


@pytest.mark.parametrize("micro_batch", [64, 7])
def test_accumulated_micro_batches_equal_the_large_batch(micro_batch, composed):
    whole = composed("whole", "tract", "patchnorm", **SGD, micro_batch=None)
    parts = composed("parts", "tract", "patchnorm", **SGD, micro_batch=micro_batch)
    _close(whole["model"], parts["model"], rtol=1e-3, atol=2e-5)


def test_a_run_with_two_methods_continues_to_the_same_bytes(composed, monkeypatch):
    class StopError(BaseException):
        pass

    whole = composed("whole", "tract", "patchnorm")
    after_step = Trainer.after_step

    def stopping(trainer, at_end):
        if trainer.progress.step == 2 and not stopped:
            stopped.append(True)
            raise StopError
        after_step(trainer, at_end)

    stopped = []
    monkeypatch.setattr(Trainer, "after_step", stopping)
    with pytest.raises(StopError):
        composed("parts", "tract", "patchnorm", runtime__checkpoint_steps=1)
    parts = composed("parts", "tract", "patchnorm", runtime__checkpoint_steps=1)
    for key in ("model", "ema", "optimizer"):
        assert_equal_trees(parts[key], whole[key])


# -- hook by hook -----------------------------------------------------------------------------------


class _Noting(Method):
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def _note(self, hook):
        self.calls.append(f"{self.name} {hook}")

    def apply(self, model):
        self._note("apply")
        return self.name

    def match(self, model, weights):
        self._note("match")

    def before_step(self, model, step):
        self._note(f"before_step {step}")

    @contextmanager
    def accumulating(self, model):
        self._note("in")
        yield
        self._note("out")

    def penalty(self, model):
        return torch.tensor(float(len(self.name)))

    def after_step(self, model, optimizer, step):
        self._note(f"after_step {step}")

    def carry_average(self, before, after):
        self._note("carry_average")

    def after_average(self, model, average):
        self._note("after_average")

    def evaluated(self, model, occasion):
        yield "test", self.name
        yield f"{self.name}/more", self.name

    def metrics(self, model):
        yield f"{self.name}/metric", 1.0


def test_every_hook_reaches_every_part_in_order():
    calls = []
    both, model = Composed(a=_Noting("a", calls), plain=Method(), bb=_Noting("bb", calls)), _model()
    assert both.apply(model) == "a; bb"
    both.match(model, {})
    both.before_step(model, 3)
    with both.accumulating(model):
        calls.append("inside")
    both.after_step(model, None, 3)
    both.carry_average(model, model)
    both.after_average(model, model)
    hooks = ["apply", "match", "before_step 3", "in"]
    before = [f"{name} {hook}" for hook in hooks for name in ("a", "bb")] + ["inside", "bb out", "a out"]
    hooks = ("after_step 3", "carry_average", "after_average")
    assert calls == before + [f"{name} {hook}" for hook in hooks for name in ("a", "bb")]
    assert float(both.penalty(model)) == 3
    assert Composed(a=Method()).penalty(model) is None
    assert [tag for tag, _ in both.metrics(model)] == ["a/metric", "bb/metric"]
    overridden = {name for name, hook in vars(Composed).items() if callable(hook) and not name.startswith("_")}
    assert overridden == {name for name, hook in vars(Method).items() if callable(hook)}  # a new hook is forwarded too


def test_what_is_evaluated_is_what_parts_say_and_tags_are_different():
    both = Composed(plain=Method(), a=_Noting("a", []), b=_Noting("b", []))
    evaluated = [("test", "a"), ("a/more", "a"), ("b/test", "b"), ("b/more", "b")]
    assert list(both.evaluated(None, None)) == evaluated
    assert list(Composed(plain=Method(), more=Method()).evaluated("model", None)) == [("test", "model")]


class _Grouping(Method):
    """Groups by layer, with these options."""

    def __init__(self, *options):
        self.options = options

    def param_groups(self, model):
        layers = (model[0], model[2])
        return [{"params": layer.parameters(), **more} for layer, more in zip(layers, self.options, strict=True)]


def test_a_parameter_is_in_one_group_with_the_options_of_all_parts():
    model = _model()
    model[0] = nn.Sequential(model[0])
    both = Composed(tract=_tract("2"), layers=_Grouping({"lr": 0.1}, {"lr": 0.2}))
    both.apply(model)
    groups = [(group.pop("params"), group) for group in both.param_groups(model)]
    assert [[id(p) for p in params] for params, _ in groups] == [
        [id(p) for p in model[0].parameters()],
        [id(p) for p in model[2].parameters()],
    ]
    assert [options for _, options in groups] == [{"lr": 0.1}, {"lr": 0.2, "first_layer": True}]


def test_contradicting_options_are_an_error():
    both = Composed(a=_Grouping({"lr": 0.1}, {}), b=_Grouping({"lr": 0.3}, {}))
    with pytest.raises(ValueError, match=r"agree on 0.weight, got lr=0.1 and lr=0.3"):
        both.param_groups(_model())


class _Claiming(Method):
    def claims(self, model):
        return [model[0].weight]


CONFLICTS = {
    "claims": ({"tract": _tract(), "other": _Claiming()}, r"got tract and other both on 0.weight; give one of them"),
    "tract": ({"tract": _tract("0"), "again": _tract("2")}, "got TrAct on '0' already"),
    "norms": ({"a": PatchNormMethod("0"), "b": PatchNormMethod("2")}, "without normalised patches, got '0.before'"),
    "moved": ({"a": PatchNormMethod("0"), "b": _tract("0")}, "got Sequential; wrap the layer that receives"),
}


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_methods_that_claim_the_same_layer_are_one_sentence(conflict):
    parts, message = CONFLICTS[conflict]
    with pytest.raises((TypeError, ValueError), match=message):
        Composed(**parts).apply(_model())


def test_no_part_is_an_error_and_advice_is_that_of_all():
    with pytest.raises(ValueError, match="at least one method"):
        Composed()
    assert Composed(plain=Method(), tract=_tract()).advice == ("raise lambda_",)
