"""Images in folders of classes: found without a look at each file, and remembered compactly."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

# torchvision's own list, without the seconds that its import takes.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Listing(Sequence):
    """The paths of the images in ``folder/CLASS/``, class by class, by name.

    A million paths are one array of names, which loader processes share with the trainer.
    """

    def __init__(self, folder: Path, classes: list[str], labels: np.ndarray, names: np.ndarray):
        self.folder, self.classes, self.labels, self.names = folder, classes, labels, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return self.folder / self.classes[self.labels[index]] / os.fsdecode(bytes(self.names[index]))


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the other entries in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    return sorted(name for name, inside in found if inside), sorted(name for name, inside in found if not inside)


def images_in(folder: Path, deep: bool) -> tuple[list[str], list[str]]:
    """The images in a folder of a class, and what else is there, as paths below the folder, sorted.

    Links are followed. Hidden entries are nobody's. What else is there has a remark: a link to
    nothing, a folder (of a flat one), a folder that a link leads back into, no image.

    Args:
        folder: the class.
        deep: whether the images in folders inside count too.

    Raises:
        OSError: a folder that cannot be read.
    """
    images, others = [], []
    waiting, seen = [(folder, "")], set()
    while waiting:
        place, below = waiting.pop()
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in seen:
            others.append(f"{below.rstrip('/')} (a link back)")
            continue
        seen.add((about.st_dev, about.st_ino))
        with os.scandir(place) as entries:
            for entry in entries:
                name = below + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if deep:
                        waiting.append((place / entry.name, f"{name}/"))
                    else:
                        others.append(f"{name}/ (a folder)")
                elif not entry.is_file():
                    others.append(f"{name} (a link to nothing)" if entry.is_symlink() else f"{name} (no file)")
                elif entry.name.lower().endswith(SUFFIXES):
                    images.append(name)
                else:
                    others.append(f"{name} (no image)")
    return sorted(images), sorted(others)


def name_left_out(folder: Path, others: list[str]) -> None:
    """Say what of a folder of classes is left out, and why."""
    if others:
        more = f" and {len(others) - 5:,} more" if len(others) > 5 else ""
        tqdm.write(f"{folder}: {len(others):,} entries are left out: {', '.join(others[:5])}{more}")


def list_images(folder: Path, classes: list[str]) -> Listing:
    """The images directly in ``folder/CLASS/``; the order of the classes gives the labels.

    Raises:
        OSError: a folder that cannot be read.
    """
    names, counts, others = [], [], []
    for name in classes:
        images, rest = images_in(folder / name, deep=False)
        names += map(os.fsencode, images)
        counts.append(len(images))
        others += [f"{name}/{other}" for other in rest]
    name_left_out(folder, others)
    labels = np.repeat(np.arange(len(classes)), counts)
    return Listing(folder, classes, labels, np.array(names, dtype=np.bytes_))
