"""Batches of normalised images on the device, the same whatever loads them.

The global batch k of an epoch is a slice of that epoch's order; each rank takes its share.
Small data sets stay in memory (on the GPU if there is one) and are augmented in batches;
others go through loader processes. Both give the same bytes.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.errors import UserError
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
from experiments.training.parallel import Ranks
from experiments.training.randomness import epoch_angles, epoch_draws, epoch_order

Batch = tuple[Tensor, Tensor]


class Batches:
    """Training and test batches of one rank.

    Args:
        data: the data set.
        seed: decides order and augmentation.
        batch_size: images per optimizer step over all ranks.
        drop_last: leave out the last, smaller batch of an epoch.
        repeats: copies of each image in an epoch, of images / repeats images (repeated augmentation).
        overfit: use only the first so many batches of epoch 0, unaugmented, in every epoch.
        eval_batch_size: images per evaluation batch of one rank.
        workers: loader processes, for data that is not in memory.
        ranks: who shares the batches.
        device: where the batches go.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        seed: int,
        batch_size: int,
        drop_last: bool,
        repeats: int = 1,
        overfit: int | None,
        eval_batch_size: int,
        workers: int,
        ranks: Ranks,
        device: torch.device,
    ):
        self.data, self.seed, self.batch_size, self.overfit, self.repeats = data, seed, batch_size, overfit, repeats
        self.eval_batch_size, self.workers, self.ranks, self.device = eval_batch_size, workers, ranks, device
        self.mean, self.std = (torch.tensor(numbers, device=device) for numbers in (data.mean, data.std))
        images = len(data.train)
        last = 0 if drop_last else images % batch_size
        if images < batch_size and drop_last:
            raise UserError(f"expected at least batch_size={batch_size} training images with drop_last, got {images}.")
        if 0 < last < ranks.size:
            raise UserError(
                f"expected an image for each of {ranks.size} ranks in the last batch, got {last}; set drop_last=true."
            )
        self.steps_per_epoch = images // batch_size + (last > 0)
        if overfit is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, overfit)
        self._memory = self._loader = None
        self._requests: list[_Request] = []
        if data.in_memory:
            splits = {"train": data.train, "test": data.test}
            self._memory = {name: (s.images.to(device), s.labels.to(device)) for name, s in splits.items()}

    def train(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches of an epoch (from 0), starting at batch ``first``."""
        order = epoch_order(self.seed, 0 if self.overfit else epoch, len(self.data.train), self.repeats)
        shares = [self._share(order, step) for step in range(first, self.steps_per_epoch)]
        if self._memory is None:
            return self._loaded("train", shares, None if self.overfit else epoch)
        return self._augmented(shares, epoch)

    def test(self) -> Iterator[Batch]:
        """This rank's share of the test images, each exactly once; as many batches on every rank."""
        mine = np.arange(self.ranks.rank, len(self.data.test), self.ranks.size)
        rounds = -(-len(self.data.test) // (self.ranks.size * self.eval_batch_size))
        shares = np.array_split(mine, rounds)
        if self._memory is None:
            return self._loaded("test", shares, None)
        images, labels = self._memory["test"]
        index = (torch.from_numpy(share).to(self.device) for share in shares)
        return ((normalise(images[i], self.mean, self.std), labels[i]) for i in index)

    def global_count(self, step: int) -> int:
        """Images of batch ``step`` of an epoch over all ranks."""
        return min(self.batch_size, len(self.data.train) - step * self.batch_size)

    def _share(self, order: np.ndarray, step: int) -> np.ndarray:
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        return np.array_split(batch, self.ranks.size)[self.ranks.rank]

    def _augmented(self, shares: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        images, labels = self._memory["train"]
        draws = _Draws(self.data, self.seed, epoch, self.repeats * len(images), self.device)
        for share in shares:
            samples = torch.from_numpy(share)
            index = (samples % len(images)).to(self.device)
            batch = images[index]
            if self.overfit is None:
                batch = draws.augmented(batch, samples)
            yield normalise(batch, self.mean, self.std), labels[index]

    def close(self) -> None:
        """End the loader processes; the next batch starts new ones."""
        self._loader, self._requests = None, []

    def _loaded(self, split: str, shares: list[np.ndarray], epoch: int | None) -> Iterator[Batch]:
        full = [(split, epoch, share.tolist()) for share in shares if len(share)]
        try:
            for images, labels in self._answers(full):
                images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
                yield normalise(images, self.mean, self.std), labels
        except UserError as error:  # from a loader process it comes with a traceback in its text
            self.close()
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None
        for _ in range(len(shares) - len(full)):
            size = self.data.image_size
            labels = getattr(self.data, split).labels[:0].to(self.device)
            yield self.mean.new_empty(0, self.data.channels, size, size), labels

    def _answers(self, requests: list[_Request]) -> Iterator[Batch]:
        """What the loader makes of each request; its processes stay from epoch to epoch."""
        if self._loader is None:
            self._loader = DataLoader(
                _Samples(self.data, self.seed, self.repeats),
                batch_sampler=_Latest(self),
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_leave_signals_to_the_trainer,
                generator=torch.Generator().manual_seed(0),
            )
        self._requests = requests
        for batch in self._loader:
            if self._requests is not requests:
                raise RuntimeError("expected one pass over loaded batches at a time, got a second one inside it")
            yield batch


_Request = tuple[str, int | None, list[int]]  # split, epoch to augment for (or None) and samples of a batch


class _Latest:
    """The requests of the latest pass, asked for again at the start of each."""

    def __init__(self, batches: Batches):
        self._batches = weakref.ref(batches)

    def __iter__(self) -> Iterator[_Request]:
        return iter(self._batches()._requests)


class _Draws:
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


class _Samples(Dataset):
    """Batches of single images for loader processes: augmented for an epoch, or plain (None)."""

    def __init__(self, data: ImageData, seed: int, repeats: int):
        self.data, self.seed, self.repeats = data, seed, repeats
        self._epoch, self._draws = None, None

    def __getitems__(self, request: _Request) -> list[tuple[Tensor, int]]:
        name, epoch, samples = request
        split = getattr(self.data, name)
        labels = split.labels[torch.tensor(samples) % len(split)].tolist()
        if epoch is None:
            images = (_plain(split, sample % len(split), self.data) for sample in samples)
        else:
            images = map(partial(self._draws_of(epoch, len(split)).augmented_one, split), samples)
        return list(zip(images, labels, strict=True))

    def _draws_of(self, epoch: int, images: int) -> _Draws:
        if self._epoch != epoch:
            self._draws = _Draws(self.data, self.seed, epoch, self.repeats * images, torch.device("cpu"))
            self._epoch = epoch
        return self._draws


@atexit.register
def _end_loader_processes() -> None:
    # They ignore the SIGTERM with which multiprocessing would end them, to wait for them for ever.
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _leave_signals_to_the_trainer(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
