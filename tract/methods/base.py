"""The interface between a training loop and a training method.

Every hook does nothing by default, so plain training is ``Method()`` itself. A method is
the end of the line: it overrides hooks of this class only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn as nn
from torch import Tensor

Predictor = Callable[[Tensor], Tensor]


class Method:
    """A training method as hooks into a loop that knows none of them.

    Order of calls: ``apply`` once; on resume ``match``; ``param_groups`` when the optimizer
    is made; per optimizer step ``before_step``, then inside ``accumulating`` (with more than
    one micro-batch) the forward and backward passes, then ``penalty``, then the optimizer's
    own step, then ``after_step``; ``views`` and ``metrics`` at each evaluation.
    """

    def apply(self, model: nn.Module) -> str | None:
        """Change the model in place before the optimizer exists; may say what was done."""

    def match(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Give the model the shapes of these saved weights, before they are loaded."""

    def param_groups(self, model: nn.Module) -> list[dict]:
        """Parameter groups for the optimizer; every parameter in exactly one.

        A group of the first layer's parameters alone may say so by ``"first_layer": True``, for
        optimizers that treat this layer in another way; other optimizers take no notice.
        """
        return [{"params": list(model.parameters())}]

    def before_step(self, model: nn.Module, step: int) -> None:
        """Called before the forward passes of optimizer step ``step``, counted from 0."""

    def accumulating(self, model: nn.Module) -> AbstractContextManager:
        """Context around all micro-batches of one optimizer step."""
        return nullcontext()

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A term of the loss that depends on the weights alone; its gradient is added once per step."""

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Called after the optimizer has stepped; the method may reshape parameters."""

    def views(self, model: nn.Module) -> Iterator[tuple[str, Predictor]]:
        """The predictors to evaluate, with a tag each; the first one is the result."""
        yield "test", model

    def metrics(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """(tag, value) pairs to log at each evaluation, tags under the method's name.

        Only of what a checkpoint holds (weights and buffers), not of gradients: a run
        resumed just before an evaluation must log the same.
        """
        return iter(())
