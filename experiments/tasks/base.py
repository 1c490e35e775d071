"""What a network is trained for: its loss, its measures, and how it is judged.

The loop knows a task by these methods only. A network says by its attribute ``task`` which one it is
for; without it, it is a classifier.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hydra.utils import get_object
from torch import Tensor

from experiments.config import Config
from experiments.ranks import Ranks
from runfolder.errors import UserError

Batch = tuple[Any, Any]  # images and what is to be learnt of them, as the kind of data has it
Forward = Callable[..., Any]  # the network, in the run's number format


class Task(ABC):
    """The interface; one object serves one run.

    Attributes:
        name: what a network for it has as its attribute ``task``.
        network: what such a network is called in a sentence.
        primary_metric: tag of the number that a run is known by.
        measures: what ``train/*`` shows beside the loss, in the order of :meth:`loss`.
        replayable: whether whole batches are tensors of the same shapes, and the loss asks the device nothing, so that
            one recorded step can be replayed.

    Args:
        config: the run.
        classes: how many there are to tell apart.

    Raises:
        UserError: values of the configuration that this task has no use for.
    """

    name: str
    network: str
    primary_metric: str
    measures: tuple[str, ...] = ()
    replayable: bool = False

    def __init__(self, config: Config, classes: int):
        self.config, self.classes = config, classes

    def require_network(self) -> None:
        """Refuse a network that cannot be trained for this task.

        Raises:
            UserError: it gives other answers than the task's.
        """
        model, data = self.config.model, self.config.data
        if getattr(get_object(model["_target_"]), "task", "classification") != self.name:
            raise UserError(f"expected model={self.network} for data={data['name']}, got {model['name']}.")

    def prepared(self, batch: Batch, step: int, groups: dict[int, int]) -> Batch:
        """What is trained on in a step.

        Args:
            batch: this rank's share of the global batch.
            step: of the optimizer, from 0.
            groups: what the share consists of, see :class:`experiments.data.shares.Share`.
        """
        return batch

    @abstractmethod
    def split(self, batch: Batch, parts: int) -> Iterator[Batch]:
        """The batch in so many micro-batches, none of them empty."""

    @abstractmethod
    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the images' losses, sums of the images' measures, (measures,)); both float32 or better."""

    @abstractmethod
    def evaluate(
        self, predictor: Forward, batches: Iterable[Batch], images: int, ranks: Ranks, between: Callable[[], None]
    ) -> dict[str, float]:
        """Judge a predictor on a set of images, every image once on any number of ranks.

        Args:
            predictor: images to the network's answers, in evaluation mode.
            batches: this rank's share; equally many batches on every rank, empty ones allowed.
            images: how many there are over all ranks.
            ranks: who shares them.
            between: called (on all ranks) before each batch; what it raises ends the evaluation.

        Returns:
            The same numbers on every rank, the primary metric among them.
        """
