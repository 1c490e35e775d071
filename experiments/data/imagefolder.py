"""Any folder of images in classes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.data.augment import IN_BATCHES
from experiments.data.base import Source
from experiments.data.decode import decode_file
from experiments.data.images import ImageData, Split
from experiments.data.listing import SUFFIXES, images_in, list_folder, name_left_out
from experiments.data.options import ImageOptions
from runfolder.errors import UserError
from runfolder.folder import typed

_MEMORY_LIMIT = 4 * 2**30  # bytes of decoded images that are kept in memory without being asked


@dataclass(frozen=True, kw_only=True)
class ImageFolder(ImageOptions, Source):
    """Any folder with train/CLASS/*.jpg and test/CLASS/*.jpg (or val/ instead of test/).

    Images that all have one size and fit in memory are decoded once; others are decoded by
    loader processes and need ``image_size``.

    Attributes:
        root: the folder with train/.
    """

    root: str

    def load(self) -> ImageData:
        """Find the images, and decode them if they are kept in memory.

        Raises:
            UserError: missing folders, no images, different classes in the two splits.
        """
        base = typed(self.root).absolute()
        train_files, train_labels, classes = _list_images(base, ("train",))
        test_files, test_labels, test_classes = _list_images(base, ("test", "val"))
        if classes != test_classes:
            only = sorted(set(classes) ^ set(test_classes))[:5]
            raise UserError(
                f"expected the same classes for training and testing in {base}, got differences: {', '.join(only)}."
            )
        first = decode_file(train_files[0])
        size = self.image_size or first.shape[-1]
        keep = self._kept(train_files[0], first, size, len(train_files) + len(test_files))
        train, test = (
            Split(labels, _decode_all(files, name)) if keep else Split(labels, files=files)
            for files, labels, name in ((train_files, train_labels, "train"), (test_files, test_labels, "test"))
        )
        return ImageData(train, test, classes, replace(self, image_size=size, in_memory=keep))

    def fetch(self) -> None:
        """See whether its folders are there."""
        base = typed(self.root).absolute()
        splits = [name for name in ("train", "test", "val") if (base / name).is_dir()]
        if "train" not in splits or len(splits) < 2:
            found = ", ".join(splits) or ("neither" if base.is_dir() else "no such folder")
            raise UserError(
                f"expected train/ and test/ (or val/) in data.root={base}, got {found}; give data.root=DIR."
            )

    def _kept(self, path: Path, first: Tensor, size: int, count: int) -> bool:
        """Whether ``count`` images like the first one are kept in memory."""
        fits = first.shape[1:] == (size, size)
        if self.in_memory is None:
            return self.augment in IN_BATCHES and fits and first.numel() * count < _MEMORY_LIMIT
        if self.in_memory and not fits:
            raise UserError(
                f"expected images of {size}x{size} for data.in_memory=true, got {tuple(first.shape[1:])} in "
                f"{path}; give data.in_memory=false."
            )
        return self.in_memory


def _list_images(base: Path, names: tuple[str, ...]) -> tuple[list[Path], Tensor, list[str]]:
    folder = next((base / name for name in names if (base / name).is_dir()), None)
    if folder is None:
        found = ", ".join(sorted(p.name for p in base.iterdir())[:5]) if base.is_dir() else "no such folder"
        raise UserError(
            f"expected {' or '.join(f'{name}/' for name in names)} with one folder per class "
            f"in data.root={base}, got {found}."
        )
    try:
        classes, beside = list_folder(folder)
        found = [images_in(folder / name, deep=True) for name in classes]
    except OSError as error:
        raise UserError(
            f"expected folders that can be read in data.root={base}, got: {error.strerror} ({error.filename})."
        ) from None
    others = [f"{name} (not in a class)" for name in beside if name.lower().endswith(SUFFIXES)]
    others += [f"{name} (a link to nothing)" for name in beside if not (folder / name).exists()]
    files, labels = [], []
    for label, (name, (images, rest)) in enumerate(zip(classes, found, strict=True)):
        others += [f"{name}/{other}" for other in rest]
        if not images:
            left_out = f" but {rest[0]}" if rest else ""
            raise UserError(f"expected images in {folder / name}, got none{left_out}; remove the folder or fill it.")
        files += [folder / name / image for image in images]
        labels += [label] * len(images)
    name_left_out(folder, others)
    if not files:
        raise UserError(f"expected folders of classes with images in {folder}, got none; give data.root=DIR.")
    return files, torch.tensor(labels), classes


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
