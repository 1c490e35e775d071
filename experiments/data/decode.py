"""Pixels from the bytes of an image file.

By Pillow: torchvision's decoder takes about two thirds of the time for the same pixels, but has been
deprecated since torchvision 0.29 and will be removed.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.data.pixels import UNREADABLE, as_rgb, fault
from runfolder.errors import UserError

Spare = Callable[[int, int], float]


def decode(content: bytes, where: str, spare: Spare | None = None) -> Tensor:
    """An image as (3, height, width), uint8.

    With ``spare``, a JPEG that is at least twice as large as needed is decoded at a half, a quarter
    or an eighth of its size, which leaves out most of the work and gives other pixels.

    Args:
        content: the bytes of an image file.
        where: what to call it in an error.
        spare: gives for (height, width) how many times larger than needed the image is.

    Raises:
        UserError: not an image, or a damaged one.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if spare is not None and image.format == "JPEG":
                factor = spare(image.height, image.width)
                power = next(p for p in (8, 4, 2, 1) if p <= max(1, factor))
                image.draft(None, (image.width // power, image.height // power))
            pixels = np.array(as_rgb(image))
    except UNREADABLE as error:
        raise UserError(
            f"expected a readable image in {where}, got: {fault(error)}; replace or remove the file."
        ) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def decode_file(path: Path, spare: Spare | None = None) -> Tensor:
    """An image file as :func:`decode` gives it.

    Raises:
        UserError: no such file, not an image, or a damaged one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"expected a readable image in {path}, got: {error.strerror}; replace or remove the file."
        ) from None
    return decode(content, str(path), spare)
