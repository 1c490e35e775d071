"""The random numbers of an epoch, and what becomes of images by them; the only place that draws them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from experiments.data.augment import (
    DRAWS,
    PIPELINES,
    augment_one,
    center_crop,
    crop_flip,
    random_box,
    resized_crop_flip,
    resized_side,
    rotate,
    turns,
)
from experiments.data.options import ImageOptions
from experiments.data.upload import uploaded
from experiments.randomness import epoch_angles, epoch_draws

Reader = Callable[..., Tensor]  # of one image; takes a Spare, see decode()


class Draws:
    """What becomes of the samples of an epoch, in batches or one by one.

    Args:
        options: say what is done.
        seed: of the run.
        epoch: from 0.
        samples: copies of all images.
        device: where batches of images are.
    """

    def __init__(self, options: ImageOptions, seed: int, epoch: int, samples: int, device: torch.device):
        self._options = options
        draws = epoch_draws(seed, epoch, samples, DRAWS) if options.augment != "none" else np.empty((0, DRAWS))
        angles = epoch_angles(seed, epoch, samples) if options.rotation else np.empty(0)
        self._draws = uploaded(torch.from_numpy(draws), device)
        self._turns = uploaded(turns(torch.from_numpy(angles), options.rotation), device)

    def augmented(self, images: Tensor, samples: Tensor) -> Tensor:
        """A batch of images, (batch, channels, height, width), which are these samples; all on the same device."""
        options = self._options
        if options.augment == "crop_flip":
            images = crop_flip(images, self._draws[samples], options.padding, options.flip)
        return rotate(images, self._turns[samples]) if options.rotation else images

    def augmented_one(self, read: Reader, sample: int) -> Tensor:
        """One image of any size, which is this sample, as (channels, size, size)."""
        options, draws = self._options, self._draws[sample : sample + 1]
        if options.augment == "resized_crop":
            image = read(partial(_spare_for_crop, draws[0], options.image_size))
            image = resized_crop_flip(image, draws[0], options.image_size, options.interpolation)
        elif options.augment in PIPELINES:
            image = augment_one(read(), draws[0, 0].item(), options.augment, options.image_size, options.interpolation)
        else:
            return self.augmented(plain(read, options)[None], torch.tensor([sample]))[0]
        return rotate(image[None], self._turns[sample : sample + 1])[0] if options.rotation else image


def plain(read: Reader, options: ImageOptions) -> Tensor:
    """An image as evaluation sees it."""
    size, ratio = options.image_size, options.crop_ratio
    image = read(partial(_spare_for_centre, size, ratio))
    return image if image.shape[1:] == (size, size) else center_crop(image, size, ratio, options.interpolation)


def _spare_for_crop(draws: Tensor, size: int, height: int, width: int) -> float:
    (_, _, *sides), _ = random_box(draws, height, width)
    return min(sides) / size


def _spare_for_centre(size: int, ratio: float, height: int, width: int) -> float:
    return min(height, width) / resized_side(size, ratio)
