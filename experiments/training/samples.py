"""How the images of a data set of class labels become a batch: decoded, augmented, normalised.

``data.py`` says which samples make a batch; this says what they are, in whichever process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from experiments.training.augment import (
    DRAWS,
    PIPELINES,
    augment_one,
    center_crop,
    crop_flip,
    normalise,
    random_box,
    resized_crop_flip,
    resized_side,
    rotate,
)
from experiments.training.datasets import ImageData, Split
from experiments.training.randomness import epoch_angles, epoch_draws

Request = tuple[str, int | None, list[int]]  # split, epoch to augment for (or None) and samples of a batch


class Draws:
    """All random numbers of an epoch, and what becomes of images by them, in batches or one by one.

    Args:
        data: says what is done.
        seed: of the run.
        epoch: from 0.
        samples: copies of all images.
        device: where the images are.
    """

    def __init__(self, data: ImageData, seed: int, epoch: int, samples: int, device: torch.device):
        self._data = data
        draws = epoch_draws(seed, epoch, samples, DRAWS) if data.augment != "none" else np.empty((0, DRAWS))
        angles = epoch_angles(seed, epoch, samples) if data.rotation else np.empty(0)
        self._draws, self._angles = torch.from_numpy(draws).to(device), torch.from_numpy(angles)

    def augmented(self, images: Tensor, samples: Tensor) -> Tensor:
        """A batch of images, (batch, channels, height, width), which are these samples."""
        if self._data.augment == "crop_flip":
            draws = self._draws[samples.to(self._draws.device)]
            images = crop_flip(images, draws, self._data.padding, self._data.flip)
        return rotate(images, self._angles[samples], self._data.rotation) if self._data.rotation else images

    def augmented_one(self, split: Split, sample: int) -> Tensor:
        """One image of any size, which is this sample, as (channels, size, size)."""
        data, index, draws = self._data, sample % len(split), self._draws[sample : sample + 1]
        if data.augment == "resized_crop":
            image = split.image(index, partial(_spare_for_crop, draws[0], data.image_size))
            image = resized_crop_flip(image, draws[0], data.image_size, data.interpolation)
        elif data.augment in PIPELINES:
            image = augment_one(
                split.image(index), draws[0, 0].item(), data.augment, data.image_size, data.interpolation
            )
        else:
            return self.augmented(_plain(split, index, data)[None], torch.tensor([sample]))[0]
        return rotate(image[None], self._angles[[sample]], data.rotation)[0] if data.rotation else image


def _plain(split: Split, index: int, data: ImageData) -> Tensor:
    """An image as evaluation sees it."""
    size = data.image_size
    image = split.image(index, partial(_spare_for_centre, size, data.crop_ratio))
    return image if image.shape[1:] == (size, size) else center_crop(image, size, data.crop_ratio, data.interpolation)


def _spare_for_crop(draws: Tensor, size: int, height: int, width: int) -> float:
    (_, _, *sides), _ = random_box(draws, height, width)
    return min(sides) / size


def _spare_for_centre(size: int, ratio: float, height: int, width: int) -> float:
    return min(height, width) / resized_side(size, ratio)


@cache
def _on(device: torch.device, *constants: tuple[float, ...]) -> list[Tensor]:
    return [torch.tensor(numbers, device=device) for numbers in constants]


class ImageSamples(Dataset):
    """Batches of labelled images of one size: augmented for an epoch, or plain (None).

    Args:
        data: the data set.
        seed: of the run.
        repeats: copies of each image in an epoch.
    """

    collate: Callable = staticmethod(default_collate)

    def __init__(self, data: ImageData, seed: int, repeats: int):
        self.data, self.seed, self.repeats = data, seed, repeats
        self._epoch, self._draws = None, None

    def __getitems__(self, request: Request) -> list[tuple[Tensor, int]]:
        name, epoch, samples = request
        split = getattr(self.data, name)
        labels = split.labels[torch.tensor(samples) % len(split)].tolist()
        if epoch is None:
            images = (_plain(split, sample % len(split), self.data) for sample in samples)
        else:
            images = map(partial(self._draws_of(epoch, len(split)).augmented_one, split), samples)
        return list(zip(images, labels, strict=True))

    def ready(self, batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """A collated batch on the device, its images normalised."""
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        return self.normalised(images), labels

    def normalised(self, images: Tensor) -> Tensor:
        """float32 images of the data set's mean and standard deviation, from uint8 ones on any device."""
        return normalise(images, *_on(images.device, tuple(self.data.mean), tuple(self.data.std)))

    def nothing(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A batch of no image."""
        size = self.data.image_size
        images = torch.empty(0, self.data.channels, size, size, device=device)
        return images, torch.empty(0, dtype=torch.int64, device=device)

    def _draws_of(self, epoch: int, images: int) -> Draws:
        if self._epoch != epoch:
            self._draws = Draws(self.data, self.seed, epoch, self.repeats * images, torch.device("cpu"))
            self._epoch = epoch
        return self._draws
