"""Data sets: where images come from. What is done with them stands in ``data.py``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from experiments.errors import UserError
from experiments.training.augment import IN_BATCHES, ONE_BY_ONE
from experiments.training.decode import Spare, decode, decode_file
from experiments.training.listing import SUFFIXES, Listing
from experiments.training.shards import Shards

_DIGITS = Path(__file__).with_name("digits.npz")
_MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images that are kept in memory without being asked


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
class ImageData:
    """A data set with everything the loop's data pipe needs to know about it."""

    train: Split
    test: Split
    classes: list[str]
    channels: int
    image_size: int
    mean: list[float]
    std: list[float]
    augment: str  # one of augment.IN_BATCHES or augment.ONE_BY_ONE
    padding: int
    flip: bool
    in_memory: bool  # augment whole batches on the device, or single images in loader processes
    rotation: float = 0.0  # largest angle in degrees, after crop and flip
    crop_ratio: float = 0.875  # of the test image's shorter side that is looked at, where sizes differ
    interpolation: str = "bilinear"

    def __post_init__(self):
        known = (*IN_BATCHES, *ONE_BY_ONE)
        if self.augment not in known:
            raise UserError(f"expected data.augment to be one of {', '.join(known)}, got {self.augment!r}.")
        if self.augment in ONE_BY_ONE and self.in_memory:
            raise UserError(f"data.augment={self.augment} is done by loader processes; give data.in_memory=false.")
        if self.augment in ONE_BY_ONE and self.channels != 3:
            raise UserError(f"data.augment={self.augment} is for colour images; give data.augment=crop_flip or none.")
        if not 0 <= self.rotation <= 180:
            raise UserError(f"expected data.rotation to be 0 to 180 degrees, got {self.rotation:g}.")
        if not 0 < self.crop_ratio <= 1:
            raise UserError(f"expected data.crop_ratio to be above 0 and at most 1, got {self.crop_ratio:g}.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"expected data.interpolation to be bilinear or bicubic, got {self.interpolation!r}.")
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std) <= 0:
            raise UserError(
                f"expected data.mean and data.std with {self.channels} numbers (std above 0), "
                f"got {self.mean} and {self.std}."
            )

    @property
    def shape(self) -> dict[str, int]:
        """What a network must know of the images."""
        return {"in_channels": self.channels, "image_size": self.image_size}


def digits(augment: str, padding: int, flip: bool, mean: list | None, std: list | None, in_memory: bool) -> ImageData:
    """1,797 handwritten digits of 8x8 pixels with values from 0 to 16, in a file beside this one: no download.

    They are the test part of the UCI data set "Optical Recognition of Handwritten Digits"
    (Alpaydin and Kaynak, 1998, CC BY 4.0), as scikit-learn's ``load_digits`` gives them. A
    fixed fifth of each class (360 images) is the test set.
    """
    with np.load(_DIGITS) as file:
        train_x, test_x = (
            np.round(file[name] * (255 / 16)).astype(np.uint8)[:, None] for name in ("train_x", "test_x")
        )
        train_x, test_x, train_y, test_y = map(torch.from_numpy, (train_x, test_x, file["train_y"], file["test_y"]))
    train, test = Split(train_y.long(), train_x), Split(test_y.long(), test_x)
    mean, std = _measured_unless_given(train, mean, std)
    return ImageData(train, test, [str(n) for n in range(10)], 1, 8, mean, std, augment, padding, flip, in_memory)


def _cifar(
    kind: type[CIFAR10 | CIFAR100],
    root: str,
    augment: str,
    padding: int,
    flip: bool,
    mean: list,
    std: list,
    in_memory: bool | None,
    rotation: float = 0.0,
    image_size: int = 32,
    interpolation: str = "bilinear",
) -> ImageData:
    """CIFAR-10 or CIFAR-100 through torchvision: downloaded once to ``root``, checked by its checksums.

    ``in_memory`` None keeps images in memory; those of another ``image_size`` are made by loader processes.
    """
    keep = image_size == 32 if in_memory is None else in_memory
    if keep and image_size != 32:
        raise UserError(f"expected data.image_size to be 32 with data.in_memory=true, got {image_size}.")
    try:
        parts = [kind(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"expected {kind.__name__} in {root} or a way to download it, got: {reason}. Offline: put {kind.filename} "
            f"(md5 {kind.tgz_md5}) there, set runtime.data_dir to where it is, or use data=imagefolder data.root=DIR."
        ) from None
    train, test = (
        Split(torch.tensor(part.targets), torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous())
        for part in parts
    )
    shape = (rotation, 1.0, interpolation)
    return ImageData(train, test, parts[0].classes, 3, image_size, mean, std, augment, padding, flip, keep, *shape)


cifar10, cifar100 = partial(_cifar, CIFAR10), partial(_cifar, CIFAR100)


def imagefolder(
    root: str,
    image_size: int | None,
    augment: str,
    padding: int,
    flip: bool,
    mean: list | None,
    std: list | None,
    in_memory: bool | None,
    rotation: float = 0.0,
    crop_ratio: float = 0.875,
    interpolation: str = "bilinear",
) -> ImageData:
    """Any folder with train/CLASS/*.jpg and test/CLASS/*.jpg (or val/ instead of test/).

    Images that all have one size and fit in memory are decoded once; others are decoded by
    loader processes and need ``image_size``.

    Raises:
        UserError: missing folders, no images, different classes in the two splits.
    """
    base = Path(root).expanduser()
    if image_size is not None and image_size < 1:
        raise UserError(f"expected data.image_size to be at least 1 or null, got {image_size}.")
    train_files, train_labels, classes = _list_images(base, ("train",))
    test_files, test_labels, test_classes = _list_images(base, ("test", "val"))
    if classes != test_classes:
        only = sorted(set(classes) ^ set(test_classes))[:5]
        raise UserError(
            f"expected the same classes for training and testing in {base}, got differences: {', '.join(only)}."
        )
    first = decode_file(train_files[0])
    size = image_size or first.shape[-1]
    keep, fits = in_memory, first.shape[1:] == (size, size)
    if keep is None:
        bytes_needed = first.numel() * (len(train_files) + len(test_files))
        keep = augment in IN_BATCHES and fits and bytes_needed < _MEMORY_LIMIT
    elif keep and not fits:
        raise UserError(
            f"expected images of {size}x{size} for data.in_memory=true, got {tuple(first.shape[1:])} in "
            f"{train_files[0]}; give data.in_memory=false."
        )
    train, test = (
        Split(labels, _decode_all(files, name)) if keep else Split(labels, files=files)
        for files, labels, name in ((train_files, train_labels, "train"), (test_files, test_labels, "test"))
    )
    mean, std = _measured_unless_given(train, mean, std)
    shape = (rotation, crop_ratio, interpolation)
    return ImageData(train, test, classes, 3, size, mean, std, augment, padding, flip, keep, *shape)


def _list_images(base: Path, names: tuple[str, ...]) -> tuple[list[Path], Tensor, list[str]]:
    folder = next((base / name for name in names if (base / name).is_dir()), None)
    if folder is None:
        found = ", ".join(sorted(p.name for p in base.iterdir())[:5]) if base.is_dir() else "no such folder"
        raise UserError(
            f"expected {' or '.join(f'{name}/' for name in names)} with one folder per class "
            f"in data.root={base}, got {found}."
        )
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files, labels, others = [], [], []
    for label, name in enumerate(classes):
        found = _visible_files(folder / name)
        images = [path for path in found if path.suffix.lower() in SUFFIXES]
        others += [path for path in found if path.suffix.lower() not in SUFFIXES]
        if not images:
            raise UserError(f"expected images in {folder / name}, got none; remove the folder or fill it.")
        files += images
        labels += [label] * len(images)
    if others:
        tqdm.write(f"{folder}: {len(others)} files that are no images are left out, such as {others[0]}")
    if not files:
        raise UserError(f"expected folders of classes with images in {folder}, got none; give data.root=DIR.")
    return files, torch.tensor(labels), classes


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _decode_all(files: list[Path], name: str) -> Tensor:
    first = decode_file(files[0])
    images = first.new_empty((len(files), *first.shape))

    def place(item: tuple[int, Path]) -> None:
        index, path = item
        image = decode_file(path)
        if image.shape != first.shape:
            raise UserError(
                f"expected images of one size, got {tuple(first.shape[1:])} in {files[0].name} and "
                f"{tuple(image.shape[1:])} in {path}; give data.image_size and data.in_memory=false."
            )
        images[index] = image

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(
            pool.map(place, enumerate(files)), total=len(files), desc=f"reading {name}", leave=False, disable=None
        ):
            pass
    return images


def _measured_unless_given(train: Split, mean: list | None, std: list | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the training pixels per channel, where not given."""
    if mean is not None and std is not None:
        return list(mean), list(std)
    if train.images is None:
        raise UserError(
            "expected data.mean and data.std for images that are not kept in memory, got null; ImageNet's are "
            "data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225]."
        )
    count = train.images.numel() // train.images.shape[1]
    total = train.images.sum(dim=(0, 2, 3), dtype=torch.float64)
    squares = torch.stack([(channel.double() ** 2).sum() for channel in train.images.unbind(1)])
    measured = total / count / 255
    spread = (squares / count / 255**2 - measured**2).clamp(min=0).sqrt()
    return (measured.tolist() if mean is None else list(mean)), (spread.tolist() if std is None else list(std))
