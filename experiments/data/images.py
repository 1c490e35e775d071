"""Images in classes, in memory or in files, and how they become batches: decoded, augmented, normalised."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from experiments.data.augment import ONE_BY_ONE, normalise, transforms
from experiments.data.base import Data, Request, Samples
from experiments.data.corruptions import corrupted
from experiments.data.decode import Spare, decode, decode_file
from experiments.data.draws import Draws, plain
from experiments.data.label_noise import noisy_labels
from experiments.data.listing import Listing
from experiments.data.options import ImageOptions
from experiments.data.shards import Shards
from experiments.randomness import stream
from experiments.tasks.classification import Classification
from runfolder.errors import UserError


@dataclass(frozen=True)
class Split:
    """Images with labels: decoded (``images``), as files (``files``) or packed in a few files (``shards``)."""

    labels: Tensor
    images: Tensor | None = None  # (n, channels, height, width), uint8
    files: Sequence[Path] | None = None
    shards: Shards | None = None
    reduced_decode: bool = False  # see decode()
    made_by: str = ""  # what was done to the images of these names before they came here

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """3 where images are decoded when they are needed."""
        return 3 if self.images is None else self.images.shape[1]

    def image(self, index: int, spare: Spare | None = None) -> Tensor:
        """One image, (channels, height, width), uint8; perhaps a smaller one with ``reduced_decode`` and ``spare``."""
        if self.images is not None:
            return self.images[index]
        spare = spare if self.reduced_decode else None
        if self.files is not None:
            return decode_file(self.files[index], spare)
        return decode(self.shards.read(index), self.shards.where(index), spare)

    def identity(self) -> Iterable[bytes]:
        """What tells two splits apart: labels, and first pixels or names."""
        yield self.labels.numpy().tobytes()
        if self.images is not None:
            yield self.images[:: max(1, len(self) // 100)].contiguous().numpy().tobytes()
        else:
            yield b"\n".join(self._names()) + self.made_by.encode()

    def _names(self) -> Iterable[bytes]:
        """The file names of images that are not decoded."""
        if isinstance(self.files, Listing) or self.files is None:
            return (self.shards or self.files).names.tolist()
        return (os.fsencode(path.name) for path in self.files)


@dataclass(frozen=True)
class ImageData(Data):
    """A data set with everything the loop's data pipe needs to know about it.

    Args:
        train: for training.
        test: for testing.
        classes: their names, in the order of the labels.
        options: image_size, mean and std are those of the training images where they are not given, and the labels of
            some training images are drawn anew where it says so.
    """

    train: Split
    test: Split
    classes: list[str]
    options: ImageOptions

    task = Classification

    def __post_init__(self):
        options, channels = replace(self.options, **_found(self.train, self.options)), self.train.channels
        object.__setattr__(self, "options", options)
        if options.label_noise:
            object.__setattr__(self, "train", _with_label_noise(self.train, len(self.classes), options))
        if options.augment in ONE_BY_ONE and channels != 3:
            raise UserError(
                f"data.augment={options.augment} is for colour images; give data.augment=crop_flip or none."
            )
        if len(options.mean) != channels or len(options.std) != channels or min(options.std) <= 0:
            raise UserError(
                f"expected data.mean and data.std with {channels} numbers (std above 0), "
                f"got {options.mean} and {options.std}."
            )

    @property
    def shape(self) -> dict[str, int]:
        """Their channels and size."""
        return {"in_channels": self.train.channels, "image_size": self.options.image_size}

    def samples(self, seed: int, repeats: int, device: torch.device) -> Samples:
        """Whole batches on the device, or single images by loader processes."""
        if self.options.in_memory:
            return ImagesInMemory(self, seed, repeats, device)
        transforms()  # imported before loader processes begin, which so have it
        return ImageSamples(self, seed, repeats, torch.device("cpu"))


class ImageSamples(Samples):
    """Batches of labelled images of one size: augmented for an epoch, or plain (None).

    Args:
        data: the data set.
        seed: of the run.
        repeats: copies of each image in an epoch.
        device: where batches are made.
    """

    def __init__(self, data: ImageData, seed: int, repeats: int, device: torch.device):
        self.data, self.seed, self.repeats, self.device = data, seed, repeats, device
        self._epoch, self._draws, self._memory = None, None, _Memory()

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        name, epoch, samples = request
        split, options = getattr(self.data, name), self.data.options
        numbers = [sample % len(split) for sample in samples]
        readers = [partial(split.image, number) for number in numbers]
        if epoch is None:
            images = [plain(read, options) for read in readers]
        else:
            images = list(map(self._draws_of(epoch).augmented_one, readers, samples))
        images = default_collate(images).contiguous()  # as in loader processes, which collate into shared memory
        return _as_tested(images, numbers, options) if name == "test" else images, split.labels[numbers]

    def ready(self, batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """On the device, its images normalised."""
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        options, floats = self.data.options, None
        if images.device.type == "cpu" and images.is_contiguous():
            floats = self._memory.floats(images.shape)
        return normalise(images, *_on(images.device, tuple(options.mean), tuple(options.std)), floats), labels

    def nothing(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A batch of no image."""
        size = self.data.options.image_size
        images = torch.empty(0, self.data.train.channels, size, size, device=device)
        return images, torch.empty(0, dtype=torch.int64, device=device)

    def _draws_of(self, epoch: int) -> Draws:
        if self._epoch != epoch:
            samples = self.repeats * len(self.data.train)
            self._draws = Draws(self.data.options, self.seed, epoch, samples, self.device)
            self._epoch = epoch
        return self._draws


class _Memory:
    """Of batches that nobody has any more: new memory costs a batch three times as long as its arithmetic."""

    def __init__(self):
        self._free: list[np.ndarray] = []

    def floats(self, shape: Sequence[int]) -> Tensor:
        """Of any values, contiguous. The memory is free again when no tensor lies in it any more."""
        count = math.prod(shape)
        memory = self._free.pop() if self._free else None
        if memory is None or len(memory) < count:
            memory = np.empty(count, np.float32)
        lent = memory[:count]
        weakref.finalize(lent, self._keep, memory)
        return torch.from_numpy(lent).view(*shape)

    def _keep(self, memory: np.ndarray) -> None:
        if len(self._free) < 2:  # while one is trained on the next is made
            self._free.append(memory)


class ImagesInMemory(ImageSamples):
    """The same bytes from decoded images that stay on the device, where they are augmented in batches."""

    on_device = True

    def __init__(self, data: ImageData, seed: int, repeats: int, device: torch.device):
        super().__init__(data, seed, repeats, device)
        tested = _as_tested(data.test.images, range(len(data.test)), data.options)
        parts = {"train": (data.train.images, data.train.labels), "test": (tested, data.test.labels)}
        self._kept = {name: (images.to(device), labels.to(device)) for name, (images, labels) in parts.items()}

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        name, epoch, samples = request
        images, labels = self._kept[name]
        index = samples % len(images) if self.repeats > 1 else samples
        batch = images[index]
        return batch if epoch is None else self._draws_of(epoch).augmented(batch, samples), labels[index]


def _as_tested(images: Tensor, numbers: Sequence[int], options: ImageOptions) -> Tensor:
    """Test images of these numbers, with the corruption that is asked for: the same ones in every run."""
    if options.corruption is None or options.corrupted_files:
        return images
    return corrupted(images, numbers, options.corruption, options.severity, seed=0)


@cache
def _on(device: torch.device, *constants: tuple[float, ...]) -> list[Tensor]:
    return [torch.tensor(numbers, device=device) for numbers in constants]


def _with_label_noise(train: Split, classes: int, options: ImageOptions) -> Split:
    """Again on its own result, it changes nothing."""
    generator = stream(options.label_noise_seed, "label noise")
    labels = noisy_labels(train.labels.numpy(), options.label_noise, classes, generator)
    return replace(train, labels=torch.from_numpy(labels))


def _found(train: Split, options: ImageOptions) -> dict[str, Any]:
    """The options image_size, mean and std: of the training images, where not given."""
    found = {key: getattr(options, key) for key in ("image_size", "mean", "std")}
    if None not in found.values():
        return found
    if train.images is None:
        raise UserError(
            "expected data.image_size, data.mean and data.std for images that are not kept in memory, got null; "
            "ImageNet's are data.image_size=224 data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225]."
        )
    count = train.images.numel() // train.channels
    total = train.images.sum(dim=(0, 2, 3), dtype=torch.float64)
    squares = torch.stack([(channel.double() ** 2).sum() for channel in train.images.unbind(1)])
    mean = total / count / 255
    std = (squares / count / 255**2 - mean**2).clamp(min=0).sqrt()
    measured = {"image_size": train.images.shape[-1], "mean": mean.tolist(), "std": std.tolist()}
    return {key: measured[key] if value is None else value for key, value in found.items()}
