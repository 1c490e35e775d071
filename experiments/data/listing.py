"""Images in folders of classes: found without a look at each file, and remembered compactly."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

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


def list_images(folder: Path, classes: list[str]) -> Listing:
    """The images directly in ``folder/CLASS/``; the order of the classes gives the labels."""
    names, counts = [], []
    for name in classes:
        with os.scandir(folder / name) as entries:
            found = [entry.name for entry in entries]
        images = sorted(n for n in found if not n.startswith(".") and n.lower().endswith(SUFFIXES))
        names += map(os.fsencode, images)
        counts.append(len(images))
    labels = np.repeat(np.arange(len(classes)), counts)
    return Listing(folder, classes, labels, np.array(names, dtype=np.bytes_))
