"""Object detection as a task: the losses of a Faster R-CNN, and mAP by the VOC 2007 protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from experiments.config import Config, Loss
from experiments.ranks import Ranks
from experiments.tasks.average_precision import ImageResult, mean_average_precision
from experiments.tasks.base import Batch, Forward, Task
from runfolder.errors import UserError

_LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")


class Detection(Task):
    """Boxes and classes of objects; ``train/loss_*`` are the four parts of the loss."""

    name = "detection"
    network = "a detector, such as faster_rcnn_vgg16,"
    primary_metric = "test/map"
    measures = _LOSSES

    def __init__(self, config: Config, classes: int):
        super().__init__(config, classes)
        plain = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "loss": Loss.cross_entropy}
        for key, value in plain.items():
            if getattr(config, key) != value:
                raise UserError(
                    f"expected {key} to be {value} for detection, got {getattr(config, key)}; leave it out."
                )

    def split(self, batch: Batch, parts: int) -> Iterator[Batch]:
        """Slices of both lists."""
        for index in torch.arange(len(batch[0])).tensor_split(parts):
            chosen = slice(int(index[0]), int(index[-1]) + 1)
            yield batch[0][chosen], batch[1][chosen]

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images times the four losses, which the network means over images; difficult objects are left out."""
        images, targets = batch
        found = forward(images, [_without_difficult(target) for target in targets])
        parts = len(images) * torch.stack([found[name].float() for name in _LOSSES])
        return parts.sum(), parts.detach()

    def evaluate(
        self, predictor: Forward, batches: Iterable[Batch], images: int, ranks: Ranks, between: Callable[[], None]
    ) -> dict[str, float]:
        """{"map"} in percent, see ``average_precision.py``."""
        own: dict[int, ImageResult] = {}
        for inputs, targets in batches:
            between()
            if inputs:
                with torch.no_grad():
                    answers = predictor(inputs)
                own |= {int(t["image"]): _result(a, t) for a, t in zip(answers, targets, strict=True)}
        found = {image: result for part in ranks.gather(own) for image, result in part.items()}
        if len(found) != images:
            raise AssertionError(f"evaluation counted {len(found)} of {images} images")
        by_image = [found[image] for image in sorted(found)]
        return {"map": 100 * mean_average_precision(by_image, self.classes)}


def _without_difficult(target: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: target[key][target["trained"]] for key in ("boxes", "labels")}


def _result(answer: dict[str, Tensor], target: dict[str, Tensor]) -> ImageResult:
    given = [answer[key].float() for key in ("boxes", "labels", "scores")]
    true = [target[key] for key in ("boxes", "labels", "difficult")]
    return ImageResult(*(part.cpu().numpy() for part in (*given, *true)))
