"""Mixup and CutMix within groups of a batch, as timm mixes the batch of a GPU."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from experiments.randomness import stream


class Mixing:
    """What is done to each training batch.

    Mixup (Zhang et al., arXiv 1710.09412) blends images, x = r x_i + (1 - r) x_j with r from
    Beta(alpha, alpha); CutMix (Yun et al., arXiv 1905.04899) pastes a box of x_j with a share
    1 - r of the area, r being corrected where the box sticks out. With both, each group gets
    one of them with equal chance. Labels become probabilities, mixed by r. x_j is the image as
    far from a group's end as x_i is from its start: timm 0.3.2's ``Mixup``, which DeiT calls on
    each GPU's batch.

    Args:
        mixup: alpha of Mixup; 0 leaves it out.
        cutmix: alpha of CutMix; 0 leaves it out.
        classes: width of the labels.
        seed: of the run.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int, seed: int):
        self.mixup, self.cutmix, self.classes, self.seed = mixup, cutmix, classes, seed

    def __call__(self, images: Tensor, labels: Tensor, step: int, groups: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Mixed in place, each group as seed, step and its number say.

        Args:
            images: (batch, channels, height, width), floating point; group after group.
            labels: (batch,), classes.
            step: of the optimizer.
            groups: {number: images} of each group.

        Returns:
            The images, and (batch, classes) probabilities.
        """
        targets = F.one_hot(labels, self.classes).to(images.dtype)
        parts = zip(groups, images.split(list(groups.values())), targets.split(list(groups.values())), strict=True)
        for group, own, target in parts:
            share = self._mix(own, stream(self.seed, "mix", step, group))
            target.copy_(share * target + (1 - share) * target.flip(0))
        return images, targets

    def _mix(self, images: Tensor, draws: np.random.Generator) -> float:
        """Mix one group, in place; its images' share in themselves."""
        pastes = draws.random() < 0.5 if self.mixup and self.cutmix else self.cutmix > 0
        alpha = self.cutmix if pastes else self.mixup
        share = draws.beta(alpha, alpha)
        if not pastes:
            others = images.flip(0)
            images.mul_(share).add_(others, alpha=1 - share)
            return share
        sizes = images.shape[-2:]
        halves = [int(size * np.sqrt(1 - share)) // 2 for size in sizes]
        centres = [draws.integers(size) for size in sizes]
        top, left = (max(0, c - half) for c, half in zip(centres, halves, strict=True))
        bottom, right = (min(size, c + half) for size, c, half in zip(sizes, centres, halves, strict=True))
        box = (..., slice(top, bottom), slice(left, right))
        images[box] = images[box].flip(0)
        return 1 - (bottom - top) * (right - left) / (sizes[0] * sizes[1])
