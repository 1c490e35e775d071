"""Mixup and CutMix of a batch: one mixing proportion for the whole batch, partners by rolling it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def mixing(mixup: float, cutmix: float, classes: int) -> Mix | None:
    """What is done to each training batch, or None.

    Mixup (Zhang et al., arXiv 1710.09412) blends images, x = r x_i + (1 - r) x_j with r from
    Beta(alpha, alpha); CutMix (Yun et al., arXiv 1905.04899) pastes a box of x_j with a share
    1 - r of the area, r being corrected where the box sticks out. With both, each batch gets
    one of them with equal chance, as in DeiT. Labels become probabilities, mixed by r.

    Args:
        mixup: alpha of Mixup; 0 leaves it out.
        cutmix: alpha of CutMix; 0 leaves it out.
        classes: width of the labels.
    """
    kinds: list[Mix] = []
    if mixup > 0:
        kinds.append(v2.MixUp(alpha=mixup, num_classes=classes))
    if cutmix > 0:
        kinds.append(v2.CutMix(alpha=cutmix, num_classes=classes))
    if not kinds:
        return None
    return lambda images, labels: kinds[int(torch.randint(len(kinds), ()))](images, labels)
