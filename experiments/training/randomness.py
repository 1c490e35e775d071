"""Every random draw is a function of the seed, its purpose and its place in the run.

No generator's state is carried along or saved: the order of epoch e, the crop of image i in
epoch e, the dropout of step s are each computed from numbers that a resumed run knows.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def stream(seed: int, purpose: str, *place: int) -> np.random.Generator:
    """An independent generator for one purpose at one place (for example an epoch)."""
    key = [seed, zlib.crc32(purpose.encode()), *place]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def seed_torch(seed: int, purpose: str, *place: int) -> None:
    """Seed torch's generators (CPU and all devices) for one purpose at one place."""
    torch.manual_seed(int(stream(seed, purpose, *place).integers(2**63)))


def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order in which epoch ``epoch`` (from 0) visits the images."""
    return stream(seed, "order", epoch).permutation(images)


def epoch_draws(seed: int, epoch: int, images: int, draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for augmentation: row i belongs to image i, whoever loads it."""
    return stream(seed, "augment", epoch).random((images, draws))
