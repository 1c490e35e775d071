"""Pixels of Pillow's images, and what is wrong with those that have none; without torch."""

from __future__ import annotations

import numpy as np
from PIL import Image, UnidentifiedImageError

UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, MemoryError, Image.DecompressionBombError)
_BITS_PER_SAMPLE = 258  # of TIFF


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any kind with 8 bits for each colour.

    Grey images of more bits, as a PNG, TIFF or PGM has them, are scaled to 8. (Pillow reads colours of 16 bits as 8.)

    Raises:
        ValueError: pixels of which nothing says which value is white.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        grey = np.asarray(image).astype(np.float64) * (255 / (2**bits - 1))
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "signed or 32-bit" if image.mode == "I" else "floating-point"
        raise ValueError(f"{kind} pixels, whose range is not known; save it with 8 or 16 bits")
    return image.convert("RGB")


def fault(error: Exception) -> str:
    """What is wrong with an image, in a few words."""
    if isinstance(error, UnidentifiedImageError):  # it names an object, not a file
        return "something else"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
