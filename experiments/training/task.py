"""What a network is trained for: its loss, its measures, and how it is judged.

The loop knows a task by these methods only. A batch is a pair of images and what is to be
learnt of them, in the form in which the task's kind of data has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hydra.utils import get_object
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from experiments.config import Config, Loss
from experiments.errors import UserError
from experiments.training.data import Batch, Data
from experiments.training.evaluate import evaluate
from experiments.training.losses import binary_cross_entropy, cross_entropy
from experiments.training.mix import mixing
from experiments.training.parallel import Ranks
from experiments.training.randomness import seed_torch

Forward = Callable[..., Any]  # the network, in the run's number format


class Task(ABC):
    """The interface; one object serves one run.

    Attributes:
        headline: tag of the number that a run is known by.
        detects: whether its networks find objects, instead of giving one answer for an image.
        measures: what ``train/*`` shows beside the loss, in the order of :meth:`loss`.
    """

    headline: str
    measures: tuple[str, ...] = ()
    detects = False

    def require_network(self, config: Config) -> None:
        """Refuse a network that cannot be trained for this task.

        Raises:
            UserError: it gives other answers than the task's.
        """
        made_by = get_object(config.model["_target_"])
        if (isinstance(made_by, type) and issubclass(made_by, GeneralizedRCNN)) != self.detects:
            wanted = "a detector, such as faster_rcnn_vgg16," if self.detects else "a classifier"
            raise UserError(f"expected model={wanted} for data={config.data['name']}, got {config.model['name']}.")

    def prepared(self, batch: Batch, step: int) -> Batch:
        """The batch that is trained on in optimizer step ``step`` (from 0); the same on every rank but for its data."""
        return batch

    @abstractmethod
    def split(self, batch: Batch, parts: int) -> Iterator[Batch]:
        """The batch in so many micro-batches, none of them empty."""

    @abstractmethod
    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the images' losses, sums of the images' measures, (measures,)); both float32 or better."""

    @abstractmethod
    def evaluate(
        self, predictor: Forward, batches: Iterable[Batch], ranks: Ranks, between: Callable[[], None]
    ) -> dict[str, float]:
        """Judge a predictor on the test set, every image once on any number of ranks.

        Args:
            predictor: images to the network's answers, in evaluation mode.
            batches: this rank's share; equally many batches on every rank, empty ones allowed.
            ranks: who shares the test set.
            between: called (on all ranks) before each batch; what it raises ends the evaluation.

        Returns:
            The same numbers on every rank, the headline's among them.
        """


class Classification(Task):
    """One class per image; ``train/top1`` in percent."""

    headline = "test/top1"
    measures = ("top1",)

    def __init__(self, config: Config, data: Data):
        self._config, self._images = config, len(data.test)
        self._mix = mixing(config.mixup, config.cutmix, len(data.classes))

    def prepared(self, batch: Batch, step: int) -> Batch:
        """Mixed, where the recipe says so."""
        if self._mix is None:
            return batch
        seed_torch(self._config.seed, "mix", step)  # the same proportion and box on every rank
        return self._mix(*batch)

    def split(self, batch: Batch, parts: int) -> Iterator[Batch]:
        """Slices of both tensors."""
        return zip(*(tensor.tensor_split(parts) for tensor in batch), strict=True)

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy or binary cross-entropy; of a mixed image the larger part's class is the right one."""
        images, targets = batch
        scores = forward(images).float()
        classes = targets if targets.ndim == 1 else targets.argmax(1)
        hits = (scores.detach().argmax(1) == classes).sum()
        if self._config.loss is Loss.bce:
            return binary_cross_entropy(scores, targets), 100.0 * hits[None]
        return cross_entropy(scores, targets, self._config.label_smoothing), 100.0 * hits[None]

    def evaluate(
        self, predictor: Forward, batches: Iterable[Batch], ranks: Ranks, between: Callable[[], None]
    ) -> dict[str, float]:
        """{"loss", "top1", "top5"}, see :func:`experiments.training.evaluate.evaluate`."""
        return evaluate(predictor, batches, self._images, ranks, between)
