"""Which samples make a batch, and its way to the device; the same for every kind of data.

The global batch k of an epoch is a slice of that epoch's order; each rank takes its share, see ``shares.py``.
"""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import signal
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.data.base import Data, Request, Samples
from experiments.data.shares import Share, shares
from experiments.data.upload import uploaded
from experiments.randomness import epoch_order
from experiments.ranks import Ranks
from experiments.tasks.base import Batch
from runfolder.errors import UserError


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
        mixed: images are mixed in pairs, which stay on one rank.
        mix_group: images that are mixed alike; None: the whole batch.
        overfit: use only the first so many batches of epoch 0, unaugmented, in every epoch.
        eval_batch_size: images per evaluation batch of one rank.
        eval_images: evaluate on so many test images, spread evenly; None: on all.
        eval_train: evaluate on the training images too.
        train_images: train on so many of the other training images, spread evenly; None: on all.
        validation: so many training images are evaluated instead of trained on.
        validation_last: those are the last ones, instead of being spread evenly.
        workers: loader processes, for data whose batches are not made on the device.
        ranks: who shares the batches.
        device: where the batches go.

    Attributes:
        evaluated: the numbers of the images that are evaluated, over all ranks: of "test" and perhaps "val", which
            is held out of the training images, and "fit", which are the others of them.
    """

    def __init__(
        self,
        data: Data,
        *,
        seed: int,
        batch_size: int,
        drop_last: bool,
        repeats: int = 1,
        mixed: bool = False,
        mix_group: int | None = None,
        overfit: int | None,
        eval_batch_size: int,
        eval_images: int | None = None,
        eval_train: bool = False,
        train_images: int | None = None,
        validation: int = 0,
        validation_last: bool = False,
        workers: int,
        ranks: Ranks,
        device: torch.device,
    ):
        self.data, self.seed, self.batch_size, self.overfit, self.repeats = data, seed, batch_size, overfit, repeats
        self.eval_batch_size, self.workers, self.ranks, self.device = eval_batch_size, workers, ranks, device
        self._mixed, self._mix_group = mixed, mix_group
        held, images = _chosen(len(data.train), validation, validation_last), len(data.train) - validation
        images = min(images, train_images or images)
        if images < 1:
            raise UserError(
                f"expected validation_images below {len(data.train)}, the training images, got {validation}."
            )
        self._trained = None
        if images < len(data.train):
            others = np.setdiff1d(np.arange(len(data.train)), held)
            self._trained = others[_chosen(len(others), images)]
        count = min(len(data.test), eval_images or len(data.test))
        self.evaluated = {"test": _chosen(len(data.test), count)}
        if validation:
            self.evaluated["val"] = held
        if eval_train:
            self.evaluated["fit"] = np.arange(images) if self._trained is None else self._trained
        self._images, self._drop_last = images, drop_last
        self._samples = data.samples(seed, repeats, device)
        last = 0 if drop_last else images % batch_size
        if images < batch_size and drop_last:
            raise UserError(f"expected at least batch_size={batch_size} training images with drop_last, got {images}.")
        least = "two images, which are mixed," if mixed else "an image"
        if not len(self.shares(batch_size)[-1].places):
            raise UserError(f"expected batch_size to have {least} for each of {ranks.size} ranks, got {batch_size}.")
        if last and not len(self.shares(last)[-1].places):
            raise UserError(
                f"expected {least} for each of {ranks.size} ranks in the last batch, got {last}; set drop_last=true."
            )
        self.steps_per_epoch = images // batch_size + (last > 0)
        if overfit is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, overfit)
        self._loader = None
        self._requests: list[Request] = []

    def train(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches of an epoch (from 0), starting at batch ``first``."""
        order = epoch_order(self.seed, 0 if self.overfit else epoch, self._images, self.repeats)
        if self._trained is not None:
            order = self._trained[order]
        parts = [self._share(order, step) for step in range(first, self.steps_per_epoch)]
        return self._made("train", parts, None if self.overfit else epoch)

    def test(self, part: str = "test") -> Iterator[Batch]:
        """This rank's share of a part that is evaluated, each image exactly once; as many batches on every rank."""
        numbers = self.evaluated[part]
        mine = numbers[self.ranks.rank :: self.ranks.size]
        rounds = -(-len(numbers) // (self.ranks.size * self.eval_batch_size))
        return self._made("test" if part == "test" else "train", np.array_split(mine, rounds), None)

    def plain(self) -> Iterator[Batch]:
        """Training images without augmentation, in batches as in training of which each is one rank's alone.

        As many batches on every rank, empty ones where they do not come out even.
        """
        numbers = np.arange(len(self.data.train)) if self._trained is None else self._trained
        parts = [numbers[at : at + self.batch_size] for at in range(0, self._images, self.batch_size)]
        parts = [part for part in parts if len(part) == self.batch_size or not self._drop_last]
        parts += [numbers[:0]] * (-len(parts) % self.ranks.size)
        return self._made("train", parts[self.ranks.rank :: self.ranks.size], None)

    def some(self, count: int) -> Iterator[Any]:
        """So many of the images that are trained on, or all: spread evenly, not augmented, alike on all ranks."""
        numbers = np.arange(len(self.data.train)) if self._trained is None else self._trained
        numbers = numbers[_chosen(len(numbers), min(count, len(numbers)))]
        parts = [numbers[at : at + self.batch_size] for at in range(0, len(numbers), self.batch_size)]
        return (images for images, _ in self._made("train", parts, None))

    def global_count(self, step: int) -> int:
        """Images of batch ``step`` of an epoch over all ranks."""
        return min(self.batch_size, self._images - step * self.batch_size)

    def shares(self, count: int) -> list[Share]:
        """What each rank has of a global batch of ``count`` images."""
        return shares(count, self.ranks.size, self.repeats, self._mix_group, self._mixed)

    def _share(self, order: np.ndarray, step: int) -> np.ndarray:
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        return batch[self.shares(len(batch))[self.ranks.rank].places]

    def close(self) -> None:
        """End the loader processes; the next batch starts new ones."""
        self._loader, self._requests = None, []

    def _made(self, split: str, parts: list[np.ndarray], epoch: int | None) -> Iterator[Batch]:
        samples, full = self._samples, [part for part in parts if len(part)]
        numbers = self._on_device(full) if samples.on_device else [part.tolist() for part in full]
        requests = [(split, epoch, own) for own in numbers]
        for batch in map(samples.__getitem__, requests) if samples.on_device else self._loaded(requests):
            yield samples.ready(batch, self.device)
        for _ in range(len(parts) - len(full)):
            yield samples.nothing(self.device)

    def _on_device(self, parts: list[np.ndarray]) -> Sequence[Tensor]:
        """All parts' samples, brought there at once."""
        together = np.concatenate([np.empty(0, dtype=np.int64), *parts])
        return uploaded(torch.from_numpy(together), self.device).split([len(part) for part in parts])

    def _loaded(self, requests: list[Request]) -> Iterator[Batch]:
        """What loader processes make of each request; they stay from epoch to epoch."""
        if self._loader is None:
            self._loader = DataLoader(
                _Answers(self._samples),
                batch_size=None,
                sampler=_Latest(self),
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
            if isinstance(batch, UserError):
                self.close()
                raise batch
            yield batch


def _chosen(images: int, count: int, last: bool = False) -> np.ndarray:
    """The numbers of so many images: spread evenly, or the last."""
    return np.arange(images - count, images) if last else np.arange(count) * images // max(1, count)


class _Answers(Dataset):
    """Batches, or what is wrong with one as a value: raised in a loader process it would come back as a traceback."""

    def __init__(self, samples: Samples):
        self._samples = samples

    def __getitem__(self, request: Request) -> Batch | UserError:
        try:
            return self._samples[request]
        except UserError as error:
            return error


class _Latest:
    """The requests of the latest pass, asked for again at the start of each."""

    def __init__(self, batches: Batches):
        self._batches = weakref.ref(batches)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._batches()._requests)


@atexit.register
def _end_loader_processes() -> None:
    # They ignore the SIGTERM with which multiprocessing would end them, to wait for them for ever. torch has a handler
    # that raises an error when one of them ends by a signal.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _leave_signals_to_the_trainer(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
