"""Which samples make a batch, and its way to the device; the same for every kind of data.

The global batch k of an epoch is a slice of that epoch's order; each rank takes its share, see ``shares.py``.
"""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import signal
import weakref
from collections.abc import Iterable, Iterator
from itertools import islice
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
        self._loaders: dict[str, _Loader] = {}

    def train(self, epoch: int, first: int = 0, end: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches of an epoch (from 0), starting at batch ``first``.

        Loader processes go on with the next epoch while the last batches are taken, up to the epoch before ``end``;
        what they have made waits until it is asked for, whatever is evaluated meanwhile.
        """
        steps = self.steps_per_epoch
        places = range(epoch * steps + first, max(epoch + 1, end) * steps)
        return islice(self._ready("train", self._asked(epoch, first, end), places), steps - first)

    def _asked(self, epoch: int, first: int, end: int) -> Iterator[Request]:
        """For an epoch's batches from ``first`` on, and for those of the following epochs before ``end``."""
        while True:
            order = epoch_order(self.seed, 0 if self.overfit else epoch, self._images, self.repeats)
            if self._trained is not None:
                order = self._trained[order]
            parts = (self._share(order, step) for step in range(first, self.steps_per_epoch))
            for numbers in self._numbers(parts):
                yield "train", None if self.overfit else epoch, numbers
            epoch, first = epoch + 1, 0
            if epoch >= end:
                return

    def test(self, part: str = "test") -> Iterator[Batch]:
        """This rank's share of a part that is evaluated, each image exactly once; as many batches on every rank."""
        numbers = self.evaluated[part]
        mine = numbers[self.ranks.rank :: self.ranks.size]
        rounds = -(-len(numbers) // (self.ranks.size * self.eval_batch_size))
        return self._made("test" if part == "test" else "train", np.array_split(mine, rounds))

    def plain(self) -> Iterator[Batch]:
        """Training images without augmentation, in batches as in training of which each is one rank's alone.

        As many batches on every rank, empty ones where they do not come out even.
        """
        numbers = np.arange(len(self.data.train)) if self._trained is None else self._trained
        parts = [numbers[at : at + self.batch_size] for at in range(0, self._images, self.batch_size)]
        parts = [part for part in parts if len(part) == self.batch_size or not self._drop_last]
        parts += [numbers[:0]] * (-len(parts) % self.ranks.size)
        return self._made("train", parts[self.ranks.rank :: self.ranks.size])

    def some(self, count: int) -> Iterator[Any]:
        """So many of the images that are trained on, or all: spread evenly, not augmented, alike on all ranks."""
        numbers = np.arange(len(self.data.train)) if self._trained is None else self._trained
        numbers = numbers[_chosen(len(numbers), min(count, len(numbers)))]
        parts = [numbers[at : at + self.batch_size] for at in range(0, len(numbers), self.batch_size)]
        return (images for images, _ in self._made("train", parts))

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
        self._loaders = {}

    def _made(self, split: str, parts: list[np.ndarray]) -> Iterator[Batch]:
        """Batches of plain images."""
        full = [(split, None, numbers) for numbers in self._numbers(part for part in parts if len(part))]
        yield from self._ready("plain", iter(full), range(0))
        for _ in range(len(parts) - len(full)):
            yield self._samples.nothing(self.device)

    def _numbers(self, parts: Iterable[np.ndarray]) -> Iterable[Tensor | list[int]]:
        """Each part's numbers as samples take them: brought to the device all at once, or lists."""
        if not self._samples.on_device:
            return (part.tolist() for part in parts)
        parts = list(parts)
        together = np.concatenate([np.empty(0, dtype=np.int64), *parts])
        return uploaded(torch.from_numpy(together), self.device).split([len(part) for part in parts])

    def _ready(self, purpose: str, requests: Iterator[Request], places: range) -> Iterator[Batch]:
        samples = self._samples
        made = map(samples.__getitem__, requests) if samples.on_device else self._loaded(purpose, requests, places)
        for batch in made:
            yield samples.ready(batch, self.device)

    def _loaded(self, purpose: str, requests: Iterator[Request], places: range) -> Iterator[Batch]:
        """What loader processes make of each request; there are processes for training and others for what is plain."""
        if purpose not in self._loaders:
            self._loaders[purpose] = _Loader(self._samples, self.workers, self.device.type == "cuda")
        for batch in self._loaders[purpose].batches(requests, places):
            if isinstance(batch, UserError):
                self.close()
                raise batch
            yield batch


class _Loader:
    """Loader processes, which stay from pass to pass.

    Args:
        samples: what they make batches of.
        workers: how many they are; each has two batches in work or waiting.
        pin: the batches are copied into pinned memory.
    """

    def __init__(self, samples: Samples, workers: int, pin: bool):
        self.requests: Iterator[Request] = iter(())
        self._pass, self._begun = object(), range(0)
        self._loader = DataLoader(
            _Answers(samples),
            batch_size=None,
            sampler=_Asked(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin,
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator().manual_seed(0),
        )
        self._coming: Iterator[Batch | UserError] = iter(())

    def batches(self, requests: Iterator[Request], places: range) -> Iterator[Batch | UserError]:
        """The batches that are asked for; some are begun before they are taken.

        Args:
            requests: what is asked for. Not all of the batches need to be taken.
            places: numbers of the requests in a sequence that several passes take. A pass that begins where the one
                before has ended has what was begun for that one, and its requests.
        """
        if not self._begun or self._begun.start != places.start:
            self.requests, self._begun = requests, places
            self._coming = iter(self._loader)
        self._pass = mine = object()
        for batch in self._coming:
            if self._pass is not mine:
                raise RuntimeError("expected one pass over loaded batches at a time, got a second one inside it")
            self._begun = self._begun[1:]
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


class _Asked:
    """The requests of a loader's latest pass, from where they are."""

    def __init__(self, loader: _Loader):
        self._loader = weakref.ref(loader)

    def __iter__(self) -> Iterator[Request]:
        return self._loader().requests


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
