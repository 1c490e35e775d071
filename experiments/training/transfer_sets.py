"""Data sets that pre-trained networks are fine-tuned on, through torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torchvision.datasets import Flowers102, StanfordCars

from experiments.errors import UserError
from experiments.training.datasets import ImageData, Split

_FLOWERS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"


def flowers102(
    root: str, image_size: int, augment: str, mean: list, std: list, crop_ratio: float, interpolation: str
) -> ImageData:
    """Oxford Flowers-102 (Nilsback and Zisserman, 2008): 2,040 training images (its train and val), 6,149 for testing.

    Raises:
        UserError: not there, and not to be downloaded; says what to put where.
    """

    def read(split: str) -> list[tuple[Path, int]]:
        part = Flowers102(root, split=split, download=True)
        return list(zip(part._image_files, part._labels, strict=True))

    cure = f"put 102flowers.tgz (unpacked), imagelabels.mat and setid.mat from {_FLOWERS} into {root}/flowers-102"
    train, test = _read(root, "Flowers-102", cure, lambda: (read("train") + read("val"), read("test")))
    classes = [str(number) for number in range(102)]
    return _folderless(train, test, classes, image_size, augment, mean, std, crop_ratio, interpolation)


def stanford_cars(
    root: str, image_size: int, augment: str, mean: list, std: list, crop_ratio: float, interpolation: str
) -> ImageData:
    """Stanford Cars (Krause et al., 2013): 8,144 training and 8,041 test images of 196 models.

    Its original address is gone, so it has to be put into ``root`` by hand.

    Raises:
        UserError: not there; says what to put where.
    """

    def read() -> tuple[list, list]:
        parts = [StanfordCars(root, split=split) for split in ("train", "test")]
        classes[:] = parts[0].classes
        train, test = ([(Path(path), label) for path, label in part._samples] for part in parts)
        return train, test

    classes: list[str] = []
    cure = (
        "it cannot be downloaded any more from its authors: put cars_train/, cars_test/, devkit/ and "
        f"cars_test_annos_withlabels.mat from a copy into {root}/stanford_cars"
    )
    train, test = _read(root, "Stanford Cars", cure, read)
    return _folderless(train, test, classes, image_size, augment, mean, std, crop_ratio, interpolation)


def _read(root: str, name: str, cure: str, read: Callable[[], tuple[list, list]]) -> tuple[list, list]:
    try:
        return read()
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"expected {name} in {root}, got: {reason}; {cure}, or set runtime.data_dir.") from None


def _folderless(
    train: list, test: list, classes: list[str], size: int, augment: str, mean: list, std: list, ratio: float, how: str
) -> ImageData:
    splits = [
        Split(torch.tensor([label for _, label in part]), files=[path for path, _ in part]) for part in (train, test)
    ]
    return ImageData(*splits, classes, 3, size, mean, std, augment, 0, True, False, 0.0, ratio, how)
