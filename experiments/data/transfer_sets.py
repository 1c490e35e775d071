"""Data sets that pre-trained networks are fine-tuned on, through torchvision."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torchvision.datasets import Flowers102, StanfordCars

from experiments.data.base import Source
from experiments.data.images import ImageData, Split
from experiments.data.options import ImageOptions
from runfolder.errors import UserError

_FLOWERS_AT = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
Labelled = list[tuple[Path, int]]


@dataclass(frozen=True, kw_only=True)
class _TransferSet(ImageOptions, Source):
    """Files of many sizes, with their labels in files of their own.

    Attributes:
        root: the folder that torchvision makes its own in.
    """

    root: str
    title: ClassVar[str]
    cure: ClassVar[str]  # what to do where it cannot be read; {root} is filled in

    def load(self) -> ImageData:
        """Download it if possible, and list the images.

        Raises:
            UserError: not there, and not to be downloaded; says what to put where.
        """
        try:
            train, test, classes = self._read()
        except (OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            cure = self.cure.format(root=self.root)
            raise UserError(
                f"expected {self.title} in {self.root}, got: {reason}; {cure}, or set runtime.data_dir."
            ) from None
        return ImageData(_split(train), _split(test), classes, self)

    @abstractmethod
    def _read(self) -> tuple[Labelled, Labelled, list[str]]:
        """Training images, test images, and the names of the classes."""


@dataclass(frozen=True, kw_only=True)
class Flowers(_TransferSet):
    """Oxford Flowers-102 (Nilsback and Zisserman, 2008).

    2,040 training images (its train and val), 6,149 for testing.
    """

    title = "Flowers-102"
    cure = f"put 102flowers.tgz (unpacked), imagelabels.mat and setid.mat from {_FLOWERS_AT} into {{root}}/flowers-102"

    def _read(self) -> tuple[Labelled, Labelled, list[str]]:
        parts = [Flowers102(self.root, split=name, download=True) for name in ("train", "val", "test")]
        train, val, test = (list(zip(part._image_files, part._labels, strict=True)) for part in parts)
        return train + val, test, [str(number) for number in range(102)]


@dataclass(frozen=True, kw_only=True)
class Cars(_TransferSet):
    """Stanford Cars (Krause et al., 2013): 8,144 training and 8,041 test images of 196 models.

    Its original address is gone, so it has to be put into ``root`` by hand.
    """

    title = "Stanford Cars"
    cure = (
        "it cannot be downloaded any more from its authors: put cars_train/, cars_test/, devkit/ and "
        "cars_test_annos_withlabels.mat from a copy into {root}/stanford_cars"
    )

    def _read(self) -> tuple[Labelled, Labelled, list[str]]:
        parts = [StanfordCars(self.root, split=name) for name in ("train", "test")]
        train, test = ([(Path(path), label) for path, label in part._samples] for part in parts)
        return train, test, parts[0].classes


def _split(images: Labelled) -> Split:
    return Split(torch.tensor([label for _, label in images]), files=[path for path, _ in images])
