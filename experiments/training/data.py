"""Batches of normalised images on the device, the same whatever loads them.

The global batch k of an epoch is a slice of that epoch's order; each rank takes its share.
Small data sets stay in memory (on the GPU if there is one) and are augmented in batches;
others go through loader processes. Both give the same bytes.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.errors import UserError
from experiments.training.augment import DRAWS, center_crop, crop_flip, normalise, resized_crop_flip
from experiments.training.datasets import ImageData, Split
from experiments.training.parallel import Ranks
from experiments.training.randomness import epoch_draws, epoch_order

Batch = tuple[Tensor, Tensor]


class Batches:
    """Training and test batches of one rank.

    Args:
        data: the data set.
        seed: decides order and augmentation.
        batch_size: images per optimizer step over all ranks.
        drop_last: leave out the last, smaller batch of an epoch.
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
        overfit: int | None,
        eval_batch_size: int,
        workers: int,
        ranks: Ranks,
        device: torch.device,
    ):
        self.data, self.seed, self.batch_size, self.overfit = data, seed, batch_size, overfit
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
        self._memory = None
        if data.in_memory:
            splits = {"train": data.train, "test": data.test}
            self._memory = {name: (s.images.to(device), s.labels.to(device)) for name, s in splits.items()}

    def train(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches of an epoch (from 0), starting at batch ``first``."""
        order = epoch_order(self.seed, 0 if self.overfit else epoch, len(self.data.train))
        shares = [self._share(order, step) for step in range(first, self.steps_per_epoch)]
        if self._memory is None:
            return self._loaded(self.data.train, shares, None if self.overfit else epoch)
        return self._augmented(shares, epoch)

    def test(self) -> Iterator[Batch]:
        """This rank's share of the test images, each exactly once; as many batches on every rank."""
        mine = np.arange(self.ranks.rank, len(self.data.test), self.ranks.size)
        rounds = -(-len(self.data.test) // (self.ranks.size * self.eval_batch_size))
        shares = np.array_split(mine, rounds)
        if self._memory is None:
            return self._loaded(self.data.test, shares, None)
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
        draws = torch.from_numpy(epoch_draws(self.seed, epoch, len(images), DRAWS)).to(self.device)
        plain = self.overfit is not None or self.data.augment == "none"
        for share in shares:
            index = torch.from_numpy(share).to(self.device)
            batch = images[index]
            if not plain:
                batch = crop_flip(batch, draws[index], self.data.padding, self.data.flip)
            yield normalise(batch, self.mean, self.std), labels[index]

    def _loaded(self, split: Split, shares: list[np.ndarray], epoch: int | None) -> Iterator[Batch]:
        full = [share.tolist() for share in shares if len(share)]
        loader = DataLoader(
            _Samples(split, self.data, self.seed, epoch),
            batch_sampler=full,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator().manual_seed(0),
        )
        try:
            for images, labels in loader:
                images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
                yield normalise(images, self.mean, self.std), labels
        except UserError as error:  # from a loader process it comes with a traceback in its text
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None
        for _ in range(len(shares) - len(full)):
            size = self.data.image_size
            yield self.mean.new_empty(0, self.data.channels, size, size), split.labels[:0].to(self.device)


class _Samples(Dataset):
    """One image at a time for loader processes: augmented for an epoch, or plain (None)."""

    def __init__(self, split: Split, data: ImageData, seed: int, epoch: int | None):
        self.split, self.data = split, data
        augmented = epoch is not None and data.augment != "none"
        self.draws = torch.from_numpy(epoch_draws(seed, epoch, len(split), DRAWS)) if augmented else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, size = self.split.image(index), self.data.image_size
        if self.draws is not None and self.data.augment == "resized_crop":
            image = resized_crop_flip(image, self.draws[index], size)
        else:
            if image.shape[1:] != (size, size):
                image = center_crop(image, size)
            if self.draws is not None:
                draws = self.draws[index : index + 1]
                image = crop_flip(image[None], draws, self.data.padding, self.data.flip)[0]
        return image, int(self.split.labels[index])


@atexit.register
def _end_loader_processes() -> None:
    # They ignore the SIGTERM with which multiprocessing would end them, to wait for them for ever.
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _leave_signals_to_the_trainer(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
