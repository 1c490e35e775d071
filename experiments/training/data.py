"""Which samples make a batch, and its way to the device; the same whatever loads them.

The global batch k of an epoch is a slice of that epoch's order; each rank takes its share.
Small data sets of images stay in memory (on the GPU if there is one) and are augmented in
batches; others go through loader processes. Both give the same bytes.
"""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import signal
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from experiments.errors import UserError
from experiments.training.boxes import BoxData, BoxSamples
from experiments.training.datasets import ImageData
from experiments.training.parallel import Ranks
from experiments.training.randomness import epoch_order
from experiments.training.samples import Draws, ImageSamples, Request

Batch = tuple[Any, Any]  # images and what is to be learnt of them, as the kind of data has it
Data = ImageData | BoxData
_SAMPLES = {ImageData: ImageSamples, BoxData: BoxSamples}  # how each kind of data becomes batches


def fingerprint(data: Data) -> str:
    """Sixteen hex digits that tell two data sets apart: classes, sizes, and what identifies the splits."""
    digest = hashlib.sha256(repr((len(data.train), len(data.test), data.classes, data.shape)).encode())
    for split in (data.train, data.test):
        for part in split.identity():
            digest.update(part)
    return digest.hexdigest()[:16]


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
        data: Data,
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
        self._samples = _SAMPLES[type(data)](data, seed, repeats)
        images = len(data.train)
        last = 0 if drop_last else images % batch_size
        if images < batch_size and drop_last:
            raise UserError(f"expected at least batch_size={batch_size} training images with drop_last, got {images}.")
        if batch_size < ranks.size:
            raise UserError(f"expected batch_size to have an image for each of {ranks.size} ranks, got {batch_size}.")
        if 0 < last < ranks.size:
            raise UserError(
                f"expected an image for each of {ranks.size} ranks in the last batch, got {last}; set drop_last=true."
            )
        self.steps_per_epoch = images // batch_size + (last > 0)
        if overfit is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, overfit)
        self._memory = self._loader = None
        self._requests: list[Request] = []
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
        return ((self._samples.normalised(images[i]), labels[i]) for i in index)

    def global_count(self, step: int) -> int:
        """Images of batch ``step`` of an epoch over all ranks."""
        return min(self.batch_size, len(self.data.train) - step * self.batch_size)

    def _share(self, order: np.ndarray, step: int) -> np.ndarray:
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        return np.array_split(batch, self.ranks.size)[self.ranks.rank]

    def _augmented(self, shares: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        images, labels = self._memory["train"]
        draws = Draws(self.data, self.seed, epoch, self.repeats * len(images), self.device)
        for share in shares:
            samples = torch.from_numpy(share)
            index = (samples % len(images)).to(self.device)
            batch = images[index]
            if self.overfit is None:
                batch = draws.augmented(batch, samples)
            yield self._samples.normalised(batch), labels[index]

    def close(self) -> None:
        """End the loader processes; the next batch starts new ones."""
        self._loader, self._requests = None, []

    def _loaded(self, split: str, shares: list[np.ndarray], epoch: int | None) -> Iterator[Batch]:
        full = [(split, epoch, share.tolist()) for share in shares if len(share)]
        try:
            for batch in self._answers(full):
                yield self._samples.ready(batch, self.device)
        except UserError as error:  # from a loader process it comes with a traceback in its text
            self.close()
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None
        for _ in range(len(shares) - len(full)):
            yield self._samples.nothing(self.device)

    def _answers(self, requests: list[Request]) -> Iterator[Batch]:
        """What the loader makes of each request; its processes stay from epoch to epoch."""
        if self._loader is None:
            self._loader = DataLoader(
                self._samples,
                collate_fn=self._samples.collate,
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


class _Latest:
    """The requests of the latest pass, asked for again at the start of each."""

    def __init__(self, batches: Batches):
        self._batches = weakref.ref(batches)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._batches()._requests)


@atexit.register
def _end_loader_processes() -> None:
    # They ignore the SIGTERM with which multiprocessing would end them, to wait for them for ever.
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _leave_signals_to_the_trainer(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
