"""Classification as a task: cross-entropy of one class per image, and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from experiments.config import Config, Loss
from experiments.ranks import Ranks
from experiments.tasks.accuracy import evaluate
from experiments.tasks.base import Batch, Forward, Task
from experiments.tasks.losses import binary_cross_entropy, cross_entropy
from experiments.tasks.mixing import Mixing


class Classification(Task):
    """One class per image; ``train/top1`` in percent."""

    name = "classification"
    network = "a classifier"
    primary_metric = "test/top1"
    measures = ("top1",)
    replayable = True

    def __init__(self, config: Config, classes: int):
        super().__init__(config, classes)
        self._mixing = Mixing(config.mixup, config.cutmix, classes, config.seed)

    def prepared(self, batch: Batch, step: int, groups: dict[int, int]) -> Batch:
        """Mixed, where the recipe says so."""
        if not (self.config.mixup or self.config.cutmix):
            return batch
        return self._mixing(*batch, step, groups)

    def split(self, batch: Batch, parts: int) -> Iterator[Batch]:
        """Slices of both tensors."""
        return zip(*(tensor.tensor_split(parts) for tensor in batch), strict=True)

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy or binary cross-entropy; of a mixed image the larger part's class is the right one."""
        images, targets = batch
        scores = forward(images).float()
        classes = targets if targets.ndim == 1 else targets.argmax(1)
        hits = (100.0 * (scores.detach().argmax(1) == classes)).sum(0, keepdim=True)
        if self.config.loss is Loss.bce:
            return binary_cross_entropy(scores, targets), hits
        return cross_entropy(scores, targets, self.config.label_smoothing), hits

    def evaluate(
        self, predictor: Forward, batches: Iterable[Batch], images: int, ranks: Ranks, between: Callable[[], None]
    ) -> dict[str, float]:
        """{"loss", "top1", "top5", "ece"}, see :func:`experiments.tasks.accuracy.evaluate`."""
        return evaluate(predictor, batches, images, ranks, between)
