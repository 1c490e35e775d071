"""Accuracy of a predictor over the test set, every image once on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.ranks import Ranks


@torch.no_grad()
def evaluate(
    predictor: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    images: int,
    ranks: Ranks,
    between: Callable[[], None],
) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 accuracy in percent.

    Args:
        predictor: images to class scores, in evaluation mode.
        batches: this rank's share; equally many batches on every rank, empty ones allowed.
        images: size of the whole test set, to be counted exactly.
        ranks: who shares the test set.
        between: called (on all ranks) before each batch; what it raises ends the evaluation.

    Returns:
        {"loss", "top1", "top5"}; with fewer than five classes top5 is 100.
    """
    sums = None
    for inputs, labels in batches:
        between()
        if sums is None:
            sums = torch.zeros(4, dtype=torch.float64, device=labels.device)
        if len(labels):
            sums += _sums(predictor(inputs).float(), labels)
    loss, top1, top5, count = ranks.sum(sums).tolist()
    if count != images:
        raise AssertionError(f"evaluation counted {count:g} of {images} test images")
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


def _sums(scores: Tensor, labels: Tensor) -> Tensor:
    """(sum of losses, top-1 hits, top-5 hits, images) of one batch, float64."""
    loss = F.cross_entropy(scores, labels, reduction="none").double().sum()
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    count = torch.tensor(len(labels), dtype=torch.float64, device=labels.device)
    return torch.stack([loss, hits[:, 0].sum().double(), hits.sum().double(), count])
