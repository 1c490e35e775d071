"""The interface between a training loop and a training method.

Every hook does nothing by default, so plain training is ``Method()`` itself. A method is
the end of the line: it overrides hooks of this class only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

Predictor = Callable[[Tensor], Tensor]
Measure = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Setting:
    """What a method may know of a run before it changes the model.

    Attributes:
        another: makes the network anew, with other random numbers.
        steps: optimizer steps of the whole run.
        steps_per_epoch: likewise of an epoch.
        images: so many of the images that are trained on (or all, if there are fewer), spread evenly, in batches,
            without augmentation: the same ones on every rank.
    """

    another: Callable[[], nn.Module]
    steps: int
    steps_per_epoch: int
    images: Callable[[int], Iterable[Tensor]] = lambda count: ()


@dataclass(frozen=True)
class Occasion:
    """What a method may look at when the model is evaluated.

    Attributes:
        images: passes over this rank's share of the training images, without augmentation, in batches that
            no rank shares with another.
        share: adds a tensor up over all ranks, each of which makes the call.
        last: whether training ends here.
    """

    images: Callable[[], Iterable[Tensor]]
    share: Callable[[Tensor], Tensor]
    last: bool


class Method:
    """A training method as hooks into a loop that knows none of them.

    Order of calls: ``prepare`` and ``apply`` once; on resume ``match``; ``param_groups`` when the
    optimizer is made; per optimizer step ``before_step``, then inside ``accumulating`` (with more
    than one micro-batch) ``before_part`` and a forward and backward pass for each micro-batch,
    then ``penalty``, then the optimizer's own step, then ``after_step``; where a moving average is
    kept, then ``carry_average`` if the model changed, and ``after_average``; ``evaluated``,
    ``measured`` and ``metrics`` at each evaluation.

    A method keeps nothing between steps but what the step's number and the model's weights and
    buffers tell: a resumed run has only these. Several methods are one by
    :class:`tract.methods.composed.Composed`.

    Attributes:
        advice: what may help where the loss is not finite, such as "raise lambda_".
        pieces: each rank's share of a batch is cut into so many micro-batches, or a multiple of it.
        order: of several methods, those of a lower number come first, whatever order they are named in: 0 puts
            layers into the network, 1 works with the layers that are there, 2 with all weights that are there.
        changes_shapes: whether ``after_step`` adds, removes or reshapes parameters.
        keeps_shapes: whether the parameters must stay what they are after ``apply``.
    """

    advice: tuple[str, ...] = ()
    pieces: int = 1
    order: int = 0
    changes_shapes: bool = False
    keeps_shapes: bool = False

    @property
    def replayable(self) -> bool:
        """Whether each step is the same operations on the same tensors, so that one recorded step can be replayed.

        True where none of the hooks is overridden that may do something else in each step.
        """
        hooks = ("before_step", "before_part", "penalty", "after_step")
        return all(getattr(type(self), hook) is getattr(Method, hook) for hook in hooks)

    def prepare(self, setting: Setting) -> None:
        """Called before ``apply``."""

    def apply(self, model: nn.Module) -> str | None:
        """Change the model in place before the optimizer exists; may say what was done."""

    def claims(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Parameters (after ``apply``) whose gradient or shape is this method's business and no other method's."""
        return ()

    def match(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Make the model the one that these weights were saved from, before they are loaded.

        Modules, names, shapes, their order and ``requires_grad``, not the values.
        """

    def param_groups(self, model: nn.Module) -> list[dict]:
        """Parameter groups for the optimizer; every parameter in exactly one.

        A group of the first layer's parameters alone may say so by ``"first_layer": True``, for
        optimizers that treat this layer in another way; other optimizers take no notice.
        """
        return [{"params": list(model.parameters())}]

    def before_step(self, model: nn.Module, step: int) -> None:
        """Called before the forward passes of optimizer step ``step``, counted from 0."""

    def before_part(self, model: nn.Module, step: int, part: int, parts: int) -> None:
        """Called before the forward pass of micro-batch ``part`` of so many, counted from 0."""

    def accumulating(self, model: nn.Module) -> AbstractContextManager:
        """Context around all micro-batches of one optimizer step."""
        return nullcontext()

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A term of the loss that depends on the weights alone; its gradient is added once per step."""

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Called after the optimizer has stepped: the only hook that may change the model while it trains.

        It may replace, reshape, freeze, add and remove parameters and modules, alike on every
        rank, and tells the optimizer by :mod:`tract.parameters`. The loop sees what changed by
        the identity of parameters and modules, and by names, shapes and ``requires_grad``.
        """

    def carry_average(self, before: nn.Module, after: nn.Module) -> None:
        """Give the moving average of a changed model better values than the loop's.

        Args:
            before: the average until now, with the old modules and shapes.
            after: the average from now on. Its tensors are those of ``before`` where name and
                shape are the same, else the model's. Where the old average of a tensor no
                longer means anything (its basis was rotated), replace the parameter in
                ``after_step``, and set its average here.
        """

    def after_average(self, model: nn.Module, average: nn.Module) -> None:
        """Called after the moving average has taken in a step's weights: set in it what means nothing averaged.

        Frozen parameters and buffers of floating point are averaged as weights are; whole numbers are copied.
        """

    def evaluated(self, model: nn.Module, occasion: Occasion) -> Iterator[tuple[str, Predictor]]:
        """What is evaluated: predictors with a tag each; the first one is the result."""
        yield "test", model

    def measured(self, model: nn.Module, occasion: Occasion) -> Iterator[tuple[str, Measure]]:
        """What else is measured on the test images, with a tag each.

        A measure takes images and their labels and gives numbers by name, one for each image; what
        is logged is their mean. Called after ``evaluated``, on the same model.
        """
        return iter(())

    def metrics(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """(tag, value) pairs to log at each evaluation, tags under the method's name.

        Only of what a checkpoint holds (weights and buffers), not of gradients: a run
        resumed just before an evaluation must log the same.
        """
        return iter(())
