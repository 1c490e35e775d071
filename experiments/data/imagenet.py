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
_VAL = "val"
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

    @property
    def tested(self) -> str:
        """The folder, beside train/, of the images for testing."""
        return _VAL

    def load(self) -> ImageData:
        """List the images, and decode some of them.

        Raises:
            UserError: the folders are not ImageNet's, incomplete or unreadable.
        """
        base = typed(self.root).absolute()
        try:
            packed = (base / INDEX).is_file()
            names, train, test = _packed(base, self.tested) if packed else _folders(base, self.tested)
        except OSError as error:
            raise UserError(
                f"expected folders that can be read in data.root={base}, got: {error.strerror} ({error.filename})."
            ) from None
        _check_classes(base, names, self.classes)
        _check_count(base, "train", names, train, "train_images", self.train_images)
        _check_count(base, self.tested, names, test, "test_images", self.test_images)
        for split in (train, test):
            for index in np.unique(np.linspace(0, len(split) - 1, _SAMPLES).astype(int)).tolist():
                split.image(index)
        train, test = (replace(split, reduced_decode=self.reduced_decode) for split in (train, test))
        return ImageData(train, test, names, self)

    def fetch(self) -> None:
        """Nothing: it cannot be downloaded, and to look at it takes long."""


@dataclass(frozen=True, kw_only=True)
class ImageNetC(ImageNet):
    """ImageNet's images for training, those of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261) for testing.

    ``root`` has train/, or is a copy by ``tools/shard_images.py``; in either there are ImageNet-C's folders
    ``CORRUPTION/SEVERITY/n01440764/`` too.

    Attributes:
        corruption: the name of a folder in ``root``.
        severity: 1 to 5, that of a folder in there.
    """

    corrupted_files = True

    def __post_init__(self):
        super().__post_init__()
        if self.corruption is None or self.severity is None:
            raise UserError(
                "expected data.corruption=NAME and data.severity=NUMBER for a folder of ImageNet-C, got "
                f"{self.corruption} and {self.severity}."
            )

    @property
    def tested(self) -> str:
        """ImageNet-C's folder of this corruption and severity."""
        return f"{self.corruption}/{self.severity}"


def _packed(base: Path, tested: str) -> tuple[list[str], Split, Split]:
    about, shards = open_shards(base)
    settings = about["settings"]
    made_by = "" if settings["size"] == 0 else f"shorter side {settings['size']}, quality {settings['quality']}"
    train, test = (
        Split(torch.from_numpy(shards[split].fields["label"]).long(), shards=shards[split], made_by=made_by)
        for split in ("train", "val")
    )
    return about["classes"], train, test if tested == _VAL else _listed(base, tested, about["classes"])


def _folders(base: Path, tested: str) -> tuple[list[str], Split, Split]:
    inside, others = list_folder(base) if base.is_dir() else ([], ["no such folder"])
    if "train" not in inside or not (base / tested).is_dir():
        cure = "give data.root=DIR with both; experiments/tools/shard_images.py makes a sharded copy"
        for deeper in (base / _UNPACKED, *(base / name for name in inside[:20])):
            if (deeper / "train").is_dir() and (deeper / tested).is_dir():
                cure = f"give data.root={deeper}"
        if (base / "parts").is_dir():
            cure = (
                "this is a sharded copy that is not whole: run experiments/tools/shard_images.py again to complete it"
            )
        raise UserError(
            f"expected train/ and {tested}/ with one folder per class, or a sharded copy, in data.root={base}, "
            f"got {_some([*inside, *others])}; {cure}."
        )
    names = _synsets(base / "train")
    return names, _listed(base, "train", names), _listed(base, tested, names)


def _listed(base: Path, part: str, names: list[str]) -> Split:
    """The images of the classes of train/ in a folder that has these and no others."""
    there = _synsets(base / part)
    if there != names:
        only = [f"{name} only in {'train' if name in names else part}/" for name in sorted({*names} ^ {*there})]
        raise UserError(
            f"expected the same class folders in train/ and {part}/ of {base}, got {_some(only)}; complete or remove "
            "them."
        )
    listing = list_images(base / part, names)
    return Split(torch.from_numpy(listing.labels), files=listing, made_by="" if part in ("train", _VAL) else part)


def _synsets(folder: Path) -> list[str]:
    """The class folders in train/, val/ or the like, where there is nothing else."""
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
            "unpack them again, or remove these classes everywhere."
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
