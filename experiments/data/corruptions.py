"""Corrupted images at five severities, computed for images about as small as CIFAR's.

The kinds are after Hendrycks and Dietterich (arXiv 1903.12261). A number in ``CORRUPTIONS`` that is published is
CIFAR-10-C's; the images are still not the same bytes, as ours come from other draws and are rounded.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.randomness import stream
from runfolder.errors import UserError, nearest

SEVERITIES = 5


def corrupted(images: Tensor, numbers: Sequence[int], name: str, severity: int, seed: int) -> Tensor:
    """Images as a corruption leaves them; each depends on its own pixels and number, not on the batch.

    Args:
        images: (batch, channels, height, width), uint8.
        numbers: of the images in their data set, which together with the seed decide what is drawn.
        name: one of ``CORRUPTIONS``.
        severity: 1 to 5, or 0 for the images as they are. The same numbers are drawn for all severities.
        seed: of the corrupted data set.

    Returns:
        uint8, the same shape.

    Raises:
        UserError: an unknown corruption or severity.
    """
    require_corruption(name, severity)
    if severity == 0:
        return images
    change, degrees = CORRUPTIONS[name]
    found = np.empty(images.shape, np.uint8)
    for place, (image, number) in enumerate(zip(images.cpu().numpy(), numbers, strict=True)):
        draw = stream(seed, f"corruption {name}", number)
        found[place] = _as_bytes(change(image / 255, degrees[severity - 1], draw))
    return torch.from_numpy(found).to(images.device)


def require_corruption(name: str, severity: int | None) -> None:
    """Refuse what :func:`corrupted` does not know.

    Raises:
        UserError: an unknown corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"unknown choice data.corruption={name}; {nearest(name, CORRUPTIONS)}.")
    if severity is None or not 0 <= severity <= SEVERITIES:
        raise UserError(f"expected data.severity to be 0 to {SEVERITIES} with data.corruption={name}, got {severity}.")


def _as_bytes(x: np.ndarray) -> np.ndarray:
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


# Below, x is one image, (channels, height, width), from 0 to 1. What is returned may leave that range.


def _gaussian_noise(x: np.ndarray, deviation: float, draw: np.random.Generator) -> np.ndarray:
    return x + draw.normal(scale=deviation, size=x.shape)


def _shot_noise(x: np.ndarray, photons: float, draw: np.random.Generator) -> np.ndarray:
    """Poisson numbers, of which white has ``photons`` in the mean."""
    return draw.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, share: float, draw: np.random.Generator) -> np.ndarray:
    """A share of all values become 0 or 1."""
    chance = draw.random(x.shape)
    return np.where(chance < share / 2, 0.0, np.where(chance >= 1 - share / 2, 1.0, x))


def _gaussian_blur(x: np.ndarray, deviation: float, draw: np.random.Generator) -> np.ndarray:
    from scipy import ndimage  # takes a tenth of a second to import

    return ndimage.gaussian_filter(x, deviation, mode="nearest", axes=(1, 2))


def _motion_blur(x: np.ndarray, deviation: float, draw: np.random.Generator) -> np.ndarray:
    """Gaussian weights along a line whose angle is uniform from -45 to 45 degrees."""
    from scipy import ndimage

    angle, reach = np.deg2rad(draw.uniform(-45, 45)), int(np.ceil(2 * deviation))
    steps = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (steps / deviation) ** 2)
    places = steps[:, None] * np.array([[np.sin(angle)], [np.cos(angle)]])[:, None]  # (rows or columns, step, 1)
    shares = (1 - np.abs(places - steps)).clip(0)  # each step's weight is shared by the pixels around its place
    kernel = np.einsum("s,si,sj->ij", weights / weights.sum(), *shares)
    return ndimage.correlate(x, kernel[None], mode="nearest")


def _pixelate(x: np.ndarray, share: float, draw: np.random.Generator) -> np.ndarray:
    """Fewer pixels in each direction, and as many as before from these."""
    picture = _picture(x)
    fewer = picture.resize([max(1, int(side * share)) for side in picture.size], Image.Resampling.BOX)
    return _pixels(fewer.resize(picture.size, Image.Resampling.BOX))


def _jpeg_compression(x: np.ndarray, quality: int, draw: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    _picture(x).save(file, "JPEG", quality=quality)
    with Image.open(file) as picture:
        return _pixels(picture)


def _brightness(x: np.ndarray, more: float, draw: np.random.Generator) -> np.ndarray:
    return x + more


def _contrast(x: np.ndarray, share: float, draw: np.random.Generator) -> np.ndarray:
    """What is left of the distance to each channel's mean."""
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + share * (x - mean)


def _haze(x: np.ndarray, density: float, draw: np.random.Generator) -> np.ndarray:
    """Between the image and clouds, no brighter than the image: (x + density clouds) max / (max + density)."""
    brightest = x.max()
    return (x + density * _clouds(*x.shape[1:], draw)) * brightest / (brightest + density)


def _clouds(height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude falls with the 1.5th power of the frequency, from 0 to 1."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    frequency = np.hypot(rows, columns).clip(1 / max(height, width))
    clouds = np.fft.irfft2(np.fft.rfft2(draw.normal(size=(height, width))) / frequency**1.5, (height, width))
    clouds -= clouds.min()
    return clouds / max(clouds.max(), 1e-12)


def _picture(x: np.ndarray) -> Image.Image:
    grey = len(x) == 1
    return Image.fromarray(_as_bytes(x[0] if grey else x.transpose(1, 2, 0)))


def _pixels(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture) / 255
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


Corruption = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
# Published: hendrycks/robustness @ ca36008, make_cifar_c.py.
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),  # published
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),  # published
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),  # published
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),  # published
    "motion_blur": (_motion_blur, (0.6, 0.9, 1.3, 1.8, 2.5)),  # ours, as is the blur
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),  # published
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),  # published
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),  # published for HSV's value; ours adds to every channel
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),  # published
    "haze": (_haze, (0.2, 0.4, 0.7, 1.0, 1.5)),  # ours, as are the clouds: not CIFAR-10-C's fog
}
