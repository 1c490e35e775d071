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


def epoch_order(seed: int, epoch: int, images: int, repeats: int = 1) -> np.ndarray:
    """The samples that epoch ``epoch`` (from 0) visits, in order, as many as there are images.

    Sample s is a copy of image s % images. With repeats (repeated augmentation, Hoffer et al.,
    arXiv 1901.09335) copies of an image stand beside each other, to be taken apart within their
    batch (``data/shares.py``), and the epoch ends when as many samples as images have been seen,
    so that it sees about images / repeats images.
    """
    order = stream(seed, "order", epoch).permutation(images)
    if repeats == 1:
        return order
    copies = order[:, None] + images * np.arange(repeats)
    return copies.reshape(-1)[:images]


def epoch_draws(seed: int, epoch: int, samples: int, draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for augmentation: row s belongs to sample s, whoever loads it."""
    return stream(seed, "augment", epoch).random((samples, draws))


def epoch_angles(seed: int, epoch: int, samples: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for rotations, likewise."""
    return stream(seed, "rotate", epoch).random(samples)
