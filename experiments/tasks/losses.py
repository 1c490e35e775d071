"""Losses over class scores, as sums over images: the loop divides by the global batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(scores: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Softmax cross-entropy, summed over the batch.

    Args:
        scores: (batch, classes), float32 or better.
        targets: (batch,) class numbers, or (batch, classes) probabilities.
        label_smoothing: share spread evenly over all classes.
    """
    return F.cross_entropy(scores, targets, reduction="sum", label_smoothing=label_smoothing)


def binary_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """DeiT-III's loss: one sigmoid per class, meaned over classes, summed over the batch.

    A class counts as present if its target is above 0, so both classes of a mixed image are
    (Wightman et al., arXiv 2110.00476). It must not be combined with label smoothing, which
    would make every class present.

    Args:
        scores: (batch, classes), float32 or better.
        targets: as for :func:`cross_entropy`.
    """
    if targets.ndim == 1:
        targets = F.one_hot(targets, scores.shape[1])
    present = (targets > 0).to(scores.dtype)
    return F.binary_cross_entropy_with_logits(scores, present, reduction="sum") / scores.shape[1]
