"""A method that changes its model in the middle of training in every way that the interface promises.

After step ``convert`` the last Linear becomes :class:`Widened`: a module is replaced, its
parameters get other names, and three are added. After ``grow`` two parameters have other
shapes and one is frozen; after ``shrink`` one is removed and the frozen one trains again.
"""

import shutil
from pathlib import Path

import torch
import torch.nn as nn

import experiments.config
from experiments.training.loop import Trainer
from tract.methods.base import Method
from tract.parameters import add_to, remove_from, replace_in
from tract.surgery import replace_module

YAML = """name: reshaping
_target_: tests.reshaping.Reshaping
convert: 2
grow: 4
shrink: 6
fault: none
"""


class Widened(nn.Module):
    """x -> scale * (W x + b + V U x), with or without the scale."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear
        outputs, inputs = linear.weight.shape
        self.U, self.V = nn.Parameter(_drawn(rank, inputs)), nn.Parameter(_drawn(outputs, rank))
        self.scale = nn.Parameter(torch.ones(outputs))

    def forward(self, x):
        y = self.linear(x) + x @ self.U.T @ self.V.T
        return y if self.scale is None else y * self.scale


class Reshaping(Method):
    """See the module. ``fault``: "forget" to tell the optimizer, "draw" differently on each rank, "thaw" on resume."""

    def __init__(self, convert: int, grow: int, shrink: int, fault: str):
        self.convert, self.grow, self.shrink, self.fault = convert, grow, shrink, fault

    def match(self, model, weights):
        ranks = [tensor.shape[0] for name, tensor in weights.items() if name.endswith(".U")]
        if ranks:
            widened = _widen(model, ranks[0])
            if not any(name.endswith(".scale") for name in weights):
                _without_scale(widened)
            elif ranks[0] == 3 and self.fault != "thaw":
                widened.linear.bias.requires_grad_(False)

    def after_step(self, model, optimizer, step):
        if step == self.convert:
            widened = _widen(model, rank=2)
            if self.fault == "draw":
                nn.init.normal_(widened.U)
            for parameter in () if self.fault == "forget" else (widened.U, widened.V, widened.scale):
                add_to(optimizer, parameter, beside=widened.linear.weight)
        elif step == self.grow:
            widened = _widened(model)
            widened.linear.bias.requires_grad_(False)
            for name, axis in (("U", 0), ("V", 1)):
                old = getattr(widened, name)
                setattr(widened, name, nn.Parameter(_longer(old.detach(), axis)))
                replace_in(optimizer, old, getattr(widened, name), lambda _, moment, axis=axis: _longer(moment, axis))
        elif step == self.shrink:
            widened = _widened(model)
            widened.linear.bias.requires_grad_(True)
            remove_from(optimizer, widened.scale)
            _without_scale(widened)

    def carry_average(self, before, after):
        if isinstance(before.head[-1], Widened) and before.head[-1].U.shape != after.head[-1].U.shape:
            with torch.no_grad():
                after.head[-1].U[:2] = before.head[-1].U


def _widen(model, rank):
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    widened = Widened(linear, rank)
    replace_module(model, linear, widened)
    return widened


def _widened(model):
    return next(module for module in model.modules() if isinstance(module, Widened))


def _without_scale(widened):
    del widened.scale
    widened.scale = None


def _drawn(*shape):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _longer(tensor, axis):
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)


def with_reshaping(folder: Path) -> Path:
    """The configuration folder with the choice ``method=reshaping``."""
    shutil.copytree(experiments.config.CONF, folder, dirs_exist_ok=True)
    (folder / "method" / "reshaping.yaml").write_text(YAML)
    return folder


def prepare(conf: str) -> None:
    """For a process of its own: the choice, and a check after every step."""
    experiments.config.CONF = Path(conf)
    Trainer.after_step = checked(Trainer.after_step)


def checked(after_step):
    """The optimizer, the moving average and the ranks hold exactly the model's parameters."""

    def check(trainer, at_end):
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(names)
        assert {id(parameter) for parameter in trainer.optimizer.state} <= set(held)
        own = _shapes(trainer.model)
        if trainer.network.average is not None:
            assert _shapes(trainer.network.average.module) == own
        if trainer.ranks.size > 1:
            exchanged = {name.replace("_orig_mod.", "") for name in dict(trainer.network.call.named_parameters())}
            assert exchanged == {f"module.{name}" for name in own}
        values = [tensor.double().sum().item() for tensor in trainer.model.parameters()]
        everyones = trainer.ranks.gather((own, values))
        assert all(other == everyones[0] for other in everyones)
        after_step(trainer, at_end)

    return check


def _shapes(model):
    return {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
