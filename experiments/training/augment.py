"""Augmentation of uint8 image batches as a pure function of given uniform draws.

The same functions serve a whole batch on a GPU and a single image in a loader process, so a
run's images do not depend on which of the two is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

DRAWS = 3  # per image: row of the crop, column of the crop, flip


def crop_flip(images: Tensor, draws: Tensor, padding: int, flip: bool) -> Tensor:
    """Random crop after zero padding, then a random horizontal flip.

    Args:
        images: (batch, channels, height, width), uint8.
        draws: (batch, 3) uniform numbers in [0, 1), float64, on the same device.
        padding: black pixels added on each side; crops are as large as the image.
        flip: whether to mirror half of the images.

    Returns:
        uint8, the same shape.
    """
    batch, _, height, width = images.shape
    offsets = (draws[:, :2] * (2 * padding + 1)).long()
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    if flip:
        columns = torch.where(draws[:, 2:3] < 0.5, columns.flip(1), columns)
    columns = columns + offsets[:, 1:2]
    padded = F.pad(images, [padding] * 4)
    index = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resized_crop_flip(image: Tensor, draws: Tensor, size: int) -> Tensor:
    """Inception's random resized crop (area 8-100 %, aspect 3/4-4/3) and flip of one image.

    torchvision draws from torch's generator, which is seeded here from ``draws`` and put
    back afterwards.

    Args:
        image: (channels, height, width), uint8.
        draws: (3,) uniform numbers in [0, 1), float64.
        size: height and width of the result.

    Returns:
        (channels, size, size), uint8.
    """
    transform = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(draws[0].item() * 2**53))
        return transform(image)


def center_crop(image: Tensor, size: int, ratio: float = 0.875) -> Tensor:
    """Resize the shorter side to size / ratio and cut the centre: ImageNet's evaluation."""
    resized = v2.functional.resize(image, [round(size / ratio)], antialias=True)
    return v2.functional.center_crop(resized, [size, size])


def normalise(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(pixel / 255 - mean) / std per channel; uint8 in, floating point out."""
    scaled = images.to(dtype) / 255
    return (scaled - mean[:, None, None]) / std[:, None, None]
