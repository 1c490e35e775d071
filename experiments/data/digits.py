"""Handwritten digits, in a file beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments.data.base import Source
from experiments.data.images import ImageData, Split
from experiments.data.options import ImageOptions

_FILE = Path(__file__).with_name("digits.npz")


@dataclass(frozen=True, kw_only=True)
class Digits(ImageOptions, Source):
    """1,797 handwritten digits of 8x8 pixels with values from 0 to 16: no download.

    They are the test part of the UCI data set "Optical Recognition of Handwritten Digits"
    (Alpaydin and Kaynak, 1998, CC BY 4.0), as scikit-learn's ``load_digits`` gives them. A
    fixed fifth of each class (360 images) is the test set.
    """

    def load(self) -> ImageData:
        """Read the file."""
        with np.load(_FILE) as file:
            train, test = (_split(file[f"{part}_x"], file[f"{part}_y"]) for part in ("train", "test"))
        return ImageData(train, test, [str(n) for n in range(10)], self)


def _split(pixels: np.ndarray, labels: np.ndarray) -> Split:
    images = np.round(pixels * (255 / 16)).astype(np.uint8)[:, None]
    return Split(torch.from_numpy(labels).long(), torch.from_numpy(images))
