"""ImageNet, or a part of it, as folders or as a sharded copy; checked before anything is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from experiments.data.base import Source
from experiments.data.images import ImageData, Split
from experiments.data.listing import list_folder, list_images
from experiments.data.options import ImageOptions
from experiments.data.shards import INDEX, open_shards
from runfolder.errors import UserError
from runfolder.folder import typed

_SYNSET = re.compile(r"n\d{8}")
_SAMPLES = 4  # images of each split that are decoded at the start
_UNPACKED = "ILSVRC/Data/CLS-LOC"  # where some archives of ImageNet have train/ and val/


@dataclass(frozen=True, kw_only=True)
class ImageNet(ImageOptions, Source):
    """ImageNet's folders ``train/n01440764/`` and ``val/n01440764/``, or a copy by ``tools/shard_images.py``.

    Labels follow the sorted names of the classes. Images are decoded by loader processes.

    Attributes:
        root: the folder with train/ and val/, or with the copy.
        classes: how many there must be; None does not check.
        train_images: the same for the images in train/.
        test_images: the same for the images in val/.
        reduced_decode: see `decode`.
    """

    root: str
    classes: int | None
    train_images: int | None
    test_images: int | None
    reduced_decode: bool

    def __post_init__(self):
        super().__post_init__()
        for key in ("classes", "train_images", "test_images"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"expected data.{key} to be at least 1, got {value}.")

    def load(self) -> ImageData:
        """List the images, and decode some of them.

        Raises:
            UserError: the folders are not ImageNet's, incomplete or unreadable.
        """
        base = typed(self.root).absolute()
        try:
            packed = (base / INDEX).is_file()
            names, train, test = _packed(base) if packed else _folders(base)
        except OSError as error:
            raise UserError(
                f"expected folders that can be read in data.root={base}, got: {error.strerror} ({error.filename})."
            ) from None
        _check_classes(base, names, self.classes)
        _check_count(base, "train", names, train, "train_images", self.train_images)
        _check_count(base, "val", names, test, "test_images", self.test_images)
        for split in (train, test):
            for index in np.unique(np.linspace(0, len(split) - 1, _SAMPLES).astype(int)).tolist():
                split.image(index)
        train, test = (replace(split, reduced_decode=self.reduced_decode) for split in (train, test))
        return ImageData(train, test, names, self)

    def fetch(self) -> None:
        """Nothing: it cannot be downloaded, and to look at it takes long."""


def _packed(base: Path) -> tuple[list[str], Split, Split]:
    about, shards = open_shards(base)
    settings = about["settings"]
    made_by = "" if settings["size"] == 0 else f"shorter side {settings['size']}, quality {settings['quality']}"
    train, test = (
        Split(torch.from_numpy(shards[split].fields["label"]).long(), shards=shards[split], made_by=made_by)
        for split in ("train", "val")
    )
    return about["classes"], train, test


def _folders(base: Path) -> tuple[list[str], Split, Split]:
    inside, others = list_folder(base) if base.is_dir() else ([], ["no such folder"])
    if "train" not in inside or "val" not in inside:
        cure = "give data.root=DIR with both; experiments/tools/shard_images.py makes a sharded copy"
        for deeper in (base / _UNPACKED, *(base / name for name in inside[:20])):
            if (deeper / "train").is_dir() and (deeper / "val").is_dir():
                cure = f"give data.root={deeper}"
        if (base / "parts").is_dir():
            cure = (
                "this is a sharded copy that is not whole: run experiments/tools/shard_images.py again to complete it"
            )
        raise UserError(
            f"expected train/ and val/ with one folder per class, or a sharded copy, in data.root={base}, "
            f"got {_some([*inside, *others])}; {cure}."
        )
    train, val = (_synsets(base / split) for split in ("train", "val"))
    if train != val:
        only = [f"{name} only in {'train' if name in train else 'val'}/" for name in sorted({*train} ^ {*val})]
        raise UserError(
            f"expected the same class folders in train/ and val/ of {base}, got {_some(only)}; complete or remove them."
        )
    listings = (list_images(base / split, train) for split in ("train", "val"))
    return train, *(Split(torch.from_numpy(listing.labels), files=listing) for listing in listings)


def _synsets(folder: Path) -> list[str]:
    """The class folders in train/ or val/, where there is nothing else."""
    inside, others = list_folder(folder)
    images = [name for name in others if name.lower().endswith((".jpeg", ".jpg", ".png"))]
    archives = [name for name in others if name.endswith(".tar")]
    wrong = [name for name in inside if not _SYNSET.fullmatch(name)]
    cure = "give data.root=DIR of ImageNet, or data=imagefolder for other classes"
    dangling = [f"{name} (a link to nothing)" for name in others if not (folder / name).exists()]
    if dangling:
        wrong, cure = dangling, "mend or remove it"
    if archives:
        wrong, cure = archives, "unpack each archive into a folder of its name, then remove it"
    if images:
        wrong = images
        cure = "move each image into the folder of its class"
        if images[0].startswith("ILSVRC2012_val_"):
            cure += (
                " (ImageNet's development kit lists them: ILSVRC2012_validation_ground_truth.txt, one number a line)"
            )
    if wrong or not inside:
        raise UserError(f"expected class folders named like n01440764 in {folder}, got {_some(wrong)}; {cure}.")
    return inside


def _check_classes(base: Path, names: list[str], expected: int | None) -> None:
    wrong = [name for name in names if not _SYNSET.fullmatch(name)]
    if wrong:
        raise UserError(
            f"expected classes named like n01440764 in {base}, got {_some(wrong)}; pack the folders of ImageNet."
        )
    if expected not in (None, len(names)):
        raise UserError(
            f"expected {expected:,} classes in {base}, got {len(names):,}; complete the folders, or give "
            f"data.classes={len(names)} if this is another set."
        )


def _check_count(base: Path, split: str, names: list[str], images: Split, key: str, expected: int | None) -> None:
    counts = torch.bincount(images.labels, minlength=len(names))
    empty = [names[label] for label in (counts == 0).nonzero().flatten().tolist()]
    if empty:
        raise UserError(
            f"expected images in every class of {base / split}, got none in {_some(empty)}; "
            "unpack them again, or remove these classes from train/ and val/."
        )
    if expected not in (None, len(images)):
        least = int(counts.argmin())
        raise UserError(
            f"expected {expected:,} images in {base / split}, got {len(images):,} (fewest, {int(counts[least]):,}, in "
            f"{names[least]}); unpack or copy it again, or give data.{key}={len(images)} if this is another set."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "nothing"
    return f"{shown} and {len(names) - 4:,} more" if len(names) > 4 else shown
