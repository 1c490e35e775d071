"""Accuracy of a predictor over the test set, every image once on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.ranks import Ranks
from tract.subspaces.evaluation import calibration_sums

_BINS = 20  # of the calibration error


@torch.no_grad()
def evaluate(
    predictor: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    images: int,
    ranks: Ranks,
    between: Callable[[], None],
) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 accuracy and the expected calibration error in percent.

    The calibration error is 100 sum_b |hits_b - confidence_b| / n over 20 bins of the predicted class's
    probability (Guo et al., arXiv 1706.04599, equation 3).

    Args:
        predictor: images to class scores, in evaluation mode.
        batches: this rank's share; equally many batches on every rank, empty ones allowed.
        images: size of the whole test set, to be counted exactly.
        ranks: who shares the test set.
        between: called (on all ranks) before each batch; what it raises ends the evaluation.

    Returns:
        {"loss", "top1", "top5", "ece"}; with fewer than five classes top5 is 100.
    """
    sums = None
    for inputs, labels in batches:
        between()
        if sums is None:
            sums = torch.zeros(4 + _BINS, dtype=torch.float64, device=labels.device)
        if len(labels):
            sums += _sums(predictor(inputs).float(), labels)
    loss, top1, top5, count, *excess = ranks.sum(sums).tolist()
    if count != images:
        raise AssertionError(f"evaluation counted {count:g} of {images} images")
    hits = {"top1": 100 * top1 / count, "top5": 100 * top5 / count}
    return {"loss": loss / count, **hits, "ece": 100 * sum(map(abs, excess)) / count}


def _sums(scores: Tensor, labels: Tensor) -> Tensor:
    """(sum of losses, top-1 hits, top-5 hits, images, hits minus confidence in each bin) of one batch, float64."""
    loss = F.cross_entropy(scores, labels, reduction="none").double().sum()
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    counts = torch.stack([loss, hits[:, 0].sum().double(), hits.sum().double(), torch.full_like(loss, len(labels))])
    return torch.cat([counts, calibration_sums(scores, labels, _BINS)])
