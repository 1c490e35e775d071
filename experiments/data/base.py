"""What a kind of data is: a source that is read, the data set it gives, and how that becomes batches.

``conf/data/NAME.yaml`` names a :class:`Source` as its target; the other keys of that file are the source's fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from experiments.tasks.base import Batch, Task

# Split, epoch to augment for (or None) and samples of a batch; a tensor where batches are made on the device.
Request = tuple[str, int | None, list[int] | Tensor]


class Source(ABC):
    """Where a data set comes from, with its options: a dataclass with keywords only."""

    @abstractmethod
    def load(self) -> Data:
        """Read the data set.

        Raises:
            UserError: it is not there or not as expected; says what to put where.
        """

    def fetch(self) -> None:
        """Make sure that the data are here before jobs start, whose machines may have no network.

        Raises:
            UserError: they are not, and cannot be brought.
        """
        self.load()


class Part(Protocol):
    """The training or the test part of a data set."""

    def __len__(self) -> int:
        """How many images there are."""

    def identity(self) -> Iterable[bytes]:
        """What tells two parts apart."""


class Data(ABC):
    """A data set.

    Attributes:
        task: what networks are trained for on it.
        train: the training part.
        test: the test part.
        classes: their names.
    """

    task: ClassVar[type[Task]]
    train: Part
    test: Part
    classes: list[str]

    @property
    def shape(self) -> dict[str, int]:
        """What a network must know of the images, as keywords."""
        return {}

    @abstractmethod
    def samples(self, seed: int, repeats: int, device: torch.device) -> Samples:
        """How the images of this data set become batches of a run.

        Args:
            seed: of the run.
            repeats: copies of each image in an epoch.
            device: where the batches go.
        """


class Samples(Dataset, ABC):
    """Batches from the numbers of their samples; sample s is a copy of image s % images.

    Attributes:
        on_device: batches are made where they are used, instead of by loader processes.
    """

    on_device = False

    @abstractmethod
    def __getitem__(self, request: Request) -> Batch:
        """A batch, in whichever process: the same bytes in all of them."""

    @abstractmethod
    def ready(self, batch: Batch, device: torch.device) -> Batch:
        """A batch on the device, as the network takes it."""

    @abstractmethod
    def nothing(self, device: torch.device) -> Batch:
        """A batch of no image."""
