"""A model with what training builds around it: gradient exchange, compiled program, moving average.

All three are made for the tensors that the model has, and made anew when a method changes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from experiments.config import GRAPH, Config
from experiments.ranks import Ranks
from tract.methods.base import Method
from tract.parameters import require_held


class Network:
    """The model as training runs it.

    Args:
        config: the run: ``ema_decay`` and ``compile``.
        model: the network itself.
        method: whose ``after_step`` may change the model.
        optimizer: over the model's parameters.
        ranks: who trains together.

    Attributes:
        call: what a forward pass in training goes through.
        average: the moving average, or None.
    """

    def __init__(
        self, config: Config, model: nn.Module, method: Method, optimizer: torch.optim.Optimizer, ranks: Ranks
    ):
        self._config, self._model, self._method, self._optimizer, self._ranks = config, model, method, optimizer, ranks
        self._may_change = type(method).after_step is not Method.after_step
        self._layout = _Layout(model)
        require_held(optimizer, model)
        self.call = self._wrapped()
        self.average = self._averaged()

    def after_step(self, step: int) -> None:
        """Let the method do what it does after optimizer step ``step``, follow it, and go on with the average.

        Raises:
            ValueError: the optimizer or another rank does not hold the parameters that the model has now.
        """
        self._method.after_step(self._model, self._optimizer, step)
        if self._may_change:
            self._follow(step)
        if self.average is not None:
            _update(self.average, self._model, self._config.ema_decay)
            self._method.after_average(self._model, self.average.module)

    def _follow(self, step: int) -> None:
        now = _Layout(self._model)
        if not self._ranks.highest(int(now.marks != self._layout.marks)):
            require_held(self._optimizer, self._model)
            return
        self._require_alike(now, step)
        require_held(self._optimizer, self._model)
        self._layout = now
        self.call = None  # so that what holds the old parameters goes before the new is built
        self.call = self._wrapped()
        before, self.average = self.average, self._averaged()
        if before is not None:
            _carry_over(before, self.average)
            self._method.carry_average(before.module, self.average.module)

    def _wrapped(self) -> nn.Module:
        """The model as it is, or through DistributedDataParallel, or compiled, or both."""
        network = self._model
        if self._ranks.size > 1:
            device = next(network.parameters()).device
            skips = any(getattr(module, "skips_parameters", False) for module in network.modules())
            on = [device] if device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=on, find_unused_parameters=skips)
        mode = self._config.compile
        if mode and mode != GRAPH:
            torch.compiler.reset()  # programs for earlier shapes would count towards the limit of recompilations
            network = torch.compile(network, mode=None if mode is True else mode)
        return network

    def _averaged(self) -> AveragedModel | None:
        return None if self._config.ema_decay is None else AveragedModel(self._model)

    def _require_alike(self, now: _Layout, step: int) -> None:
        """All ranks have the same parameters, new ones with the same values."""
        if self._ranks.size == 1:
            return
        first, *others = self._ranks.gather(now.summary(earlier=self._layout))
        differing = [name for other in others for name in {**first, **other} if first.get(name) != other.get(name)]
        if differing:
            raise ValueError(
                f"expected the method to change the model alike on every rank in step {step}, got differences in "
                f"{', '.join(dict.fromkeys(differing))}; random numbers must come from the step, not from torch's "
                "generator, which is another one on each rank."
            )


class _Layout:
    """What a model consists of, to be compared with what it consists of later.

    Buffers by name and shape alone: modules may assign them anew in each forward pass.
    """

    def __init__(self, model: nn.Module):
        self._parameters = dict(model.named_parameters())
        self._modules = dict(model.named_modules())  # held, as parameters are: an id is true while its object lives
        self._shapes = {name: _shape(tensor) for name, tensor in (*self._parameters.items(), *model.named_buffers())}
        held = (*self._modules.items(), *self._parameters.items())
        self.marks = [*((name, id(part)) for name, part in held), *self._shapes.items()]

    def summary(self, earlier: _Layout) -> dict[str, tuple]:
        """{name: shape and so on}, with the sum of what is new since an earlier layout."""
        known = set(earlier.marks)
        new = {
            name: parameter.detach().double().sum()
            for name, parameter in self._parameters.items()
            if not {(name, id(parameter)), (name, self._shapes[name])} <= known
        }
        sums = torch.stack(list(new.values())).view(torch.int64).tolist() if new else []
        return self._shapes | {name: (*self._shapes[name], value) for name, value in zip(new, sums, strict=True)}


@torch.no_grad()
def _update(average: AveragedModel, model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · model, which begins as the model; a launch or so for each dtype.

    Whole numbers have no average: they are the model's own. torch's ``update_parameters`` does the same, but
    copies its counter to the device in each step, for which the host waits.
    """
    pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for averaged, own in zip(_tensors(average.module), _tensors(model), strict=True):
        for tensors, tensor in zip(pairs[own.dtype], (averaged, own), strict=True):
            tensors.append(tensor)
    for dtype, (averages, owns) in pairs.items():
        if average.n_averaged > 0 and dtype.is_floating_point:
            torch._foreach_lerp_(averages, owns, 1 - decay)
        else:
            torch._foreach_copy_(averages, owns)
    average.n_averaged += 1


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def _shape(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad


def _carry_over(before: AveragedModel, after: AveragedModel) -> None:
    """What has the same name and shape in both goes on as it is."""
    old = dict((*before.named_parameters(), *before.named_buffers()))
    with torch.no_grad():
        for name, tensor in (*after.named_parameters(), *after.named_buffers()):
            if name in old and old[name].shape == tensor.shape:
                tensor.copy_(old[name])
