"""AutoAugment's policy for CIFAR-10 (Cubuk et al., arXiv 1805.09501), on Pillow images, as ViT-CIFAR applies it.

torchvision has the same 25 pairs of changes, but rotates both ways, fills with black, shears by the nearest pixel and
moves by whole pixels.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import v2

_GREY = (128, 128, 128)
_LEVELS = 10
_ENHANCED = ("Brightness", "Color", "Contrast", "Sharpness")
# name -> the magnitudes of levels 0 and 9
_RANGES = {
    "ShearX": (0, 0.3), "ShearY": (0, 0.3), "TranslateX": (0, 150 / 331), "TranslateY": (0, 150 / 331),
    "Rotate": (0, 30), "Posterize": (8, 4), "Solarize": (256, 0), **dict.fromkeys(_ENHANCED, (0, 0.9)),
}  # fmt: skip
_BOTH_WAYS = ("ShearX", "ShearY", "TranslateX", "TranslateY", *_ENHANCED)
_PAIRS = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)._policies


def auto_augment(image: Image.Image) -> Image.Image:
    """One of the 25 pairs, each change with its probability; draws from Python's generator."""
    for name, probability, level in random.choice(_PAIRS):
        if random.random() < probability:
            image = changed(image, name, level, random.choice((-1, 1)))
    return image


def changed(image: Image.Image, name: str, level: int | None, sign: int) -> Image.Image:
    """One change.

    Args:
        image: RGB.
        name: of the change, as in the paper.
        level: 0 to 9; None for changes without a magnitude.
        sign: 1 or -1, its direction; rotations go counterclockwise, whatever it is.
    """
    size = 0.0 if level is None else np.linspace(*_RANGES[name], _LEVELS)[level].item()
    if name in _BOTH_WAYS:
        size *= sign
    match name:
        case "ShearX":
            return _moved(image, (1, size, 0, 0, 1, 0), Image.Resampling.BICUBIC)
        case "ShearY":
            return _moved(image, (1, 0, 0, size, 1, 0), Image.Resampling.BICUBIC)
        case "TranslateX":
            return _moved(image, (1, 0, size * image.width, 0, 1, 0), Image.Resampling.NEAREST)
        case "TranslateY":
            return _moved(image, (1, 0, 0, 0, 1, size * image.height), Image.Resampling.NEAREST)
        case "Rotate":
            return image.rotate(size, fillcolor=_GREY)
        case "Posterize":
            return ImageOps.posterize(image, round(size))
        case "Solarize":
            return ImageOps.solarize(image, size)
        case "AutoContrast" | "Equalize" | "Invert":
            return getattr(ImageOps, name.lower())(image)
    return getattr(ImageEnhance, name)(image).enhance(1 + size)


def _moved(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    """The pixel at (x, y) is that at (ax + by + c, dx + ey + f), grey outside."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=_GREY)
