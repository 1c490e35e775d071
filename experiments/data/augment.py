"""Augmentation of uint8 image batches as a pure function of given uniform draws.

The same functions serve a whole batch on a GPU and a single image in a loader process, so a
run's images do not depend on which of the two is used.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class _Erasing:
    """RandAugment's policy, the least area of the crop, and what erased pixels become."""

    policy: str
    area: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


DRAWS = 3  # per image: row of the crop, column of the crop, flip
IN_BATCHES = ("crop_flip", "none")  # what can be done to whole batches on the device
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_ERASED = 0.25  # of the images
_IN_CACHE = 2**20  # floating-point numbers that are changed while a core has them in its cache
# Of OIALR's authors (Helmholtz-AI-Energy/OIALR @ e9e885d), for ImageNet and CIFAR-10.
_ERASING = {
    "rand_augment_erase": _Erasing("rand-m15-mstd0.5-inc1", 0.08, *_IMAGENET),
    "rand_augment_erase_small": _Erasing("rand-m9-mstd0.5-inc1", 0.8, *_CIFAR10),
}
# Of library transforms.
PIPELINES = ("three_augment", "three_augment_simple_crop", "rand_augment", "auto_augment", *_ERASING)
ONE_BY_ONE = ("resized_crop", *PIPELINES)  # in loader processes


@cache
def transforms() -> ModuleType:
    """torchvision's, which take more than a second to import: what changes whole batches does without."""
    from torchvision.transforms import v2

    return v2


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
    batch, channels, height, width = images.shape
    offsets = (draws[:, :2] * (2 * padding + 1)).long()
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)
    straight, mirrored = _places(height, width, width + 2 * padding, images.device)
    places = torch.where(draws[:, 2:3] < 0.5, mirrored, straight) if flip else straight
    places = places + torch.add(offsets[:, 1:2], offsets[:, :1], alpha=width + 2 * padding)
    found = padded.flatten(1, 2).gather(1, places[:, :, None].expand(-1, -1, channels))
    return found.view(batch, height, width, channels).permute(0, 3, 1, 2)


@cache
def _places(height: int, width: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of an image's pixels in rows of ``stride`` numbers, and of its mirror image's: (height * width,) each."""
    rows = torch.arange(0, height * stride, stride, device=device)[:, None]
    columns = torch.arange(width, device=device)
    return (rows + columns).flatten(), (rows + columns.flip(0)).flatten()


def turns(draws: Tensor, degrees: float) -> Tensor:
    """Cosine and sine of an angle from [-degrees, degrees) for each draw, as :func:`rotate` takes them.

    Args:
        draws: (n,) uniform numbers in [0, 1), float64, on the CPU: another device's sines may differ in the last bit.
        degrees: the largest angle.

    Returns:
        (n, 2), float64.
    """
    angles = torch.deg2rad((2 * draws - 1) * degrees)
    return torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Counterclockwise about the centre: nearest pixel, black corners.

    Places are sums and products in float64, so that every device looks up the same pixels.

    Args:
        images: (batch, channels, height, width), uint8.
        turns: (batch, 2), from :func:`turns`, on the same device.

    Returns:
        uint8, the same shape.
    """
    _, _, height, width = images.shape
    cosines, sines = turns[:, :, None, None].unbind(1)
    y = (torch.arange(height, dtype=torch.float64, device=images.device) - (height - 1) / 2)[:, None]
    x = torch.arange(width, dtype=torch.float64, device=images.device) - (width - 1) / 2
    columns = (cosines * x - sines * y + width / 2).floor().long()
    rows = (cosines * y + sines * x + height / 2).floor().long()
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    index = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    found = images.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return found.view_as(images) * inside[:, None]


def resized_crop_flip(image: Tensor, draws: Tensor, size: int, interpolation: str = "bilinear") -> Tensor:
    """Inception's random resized crop (area 8-100 %, aspect 3/4-4/3) and flip of one image.

    Args:
        image: (channels, height, width), uint8.
        draws: (3,) uniform numbers in [0, 1), float64, which decide as in :func:`random_box`.
        size: height and width of the result.
        interpolation: bilinear or bicubic.

    Returns:
        (channels, size, size), uint8.
    """
    (top, left, height, width), mirror = random_box(draws, *image.shape[-2:])
    rows = image.permute(1, 2, 0)[top : top + height, left : left + width]
    part = rows.contiguous().permute(2, 0, 1)  # the colours of a pixel together: resized in about half the time
    v2 = transforms()
    mode = v2.InterpolationMode(interpolation)
    part = v2.functional.resize(part, [size, size], interpolation=mode, antialias=True)
    return part.flip(-1) if mirror else part


def random_box(draws: Tensor, height: int, width: int) -> tuple[tuple[int, int, int, int], bool]:
    """What :func:`resized_crop_flip` cuts: (top, left, height, width), and whether it flips.

    torchvision draws from torch's generator, which is seeded here from ``draws`` and put back afterwards.
    """
    generator, image = torch.default_generator, torch.empty(1).expand(height, width)
    before = generator.get_state()
    try:
        generator.manual_seed(int(draws[0].item() * 2**53))
        box = _resized_crop().make_params([image])
        mirror = torch.rand(1).item() < 0.5
    finally:
        generator.set_state(before)
    return (box["top"], box["left"], box["height"], box["width"]), mirror


@cache
def _resized_crop() -> Any:
    return transforms().RandomResizedCrop(1)  # asked for places only


def augment_one(image: Tensor, seed: float, kind: str, size: int, interpolation: str) -> Tensor:
    """One training image through a named pipeline of library transforms.

    They draw from the generators of torch, numpy and Python, which are seeded here and put
    back afterwards.

    Args:
        image: (3, height, width), uint8.
        seed: a uniform number in [0, 1).
        kind: one of ``PIPELINES``; see :func:`pipeline`.
        size: height and width of the result.
        interpolation: bilinear or bicubic; rand_augment_erase and _small take one of them by chance.

    Returns:
        (3, size, size), uint8.
    """
    with _seeded(int(seed * 2**53)):
        return pipeline(kind, size, interpolation)(image)


@cache
def pipeline(kind: str, size: int, interpolation: str) -> Callable[[Tensor], Tensor]:
    """The transforms of one training image, uint8 tensor in and out.

    auto_augment: a crop from four black pixels more on each side, a flip, and AutoAugment's policy for CIFAR-10.
    three_augment: a random resized crop and flip, then one of greyscale, solarise and blur, then colour jitter 0.3:
    DeiT-III's 3-Augment (Touvron et al., arXiv 2204.07118) as timm has it.
    three_augment_simple_crop: 3-Augment after a resize of the shorter side and a crop from
    four reflected pixels more on each side, DeiT-III's for fine-tuning.
    rand_augment: the resized crop and timm's rand-m9-mstd0.5-inc1.
    rand_augment_erase: the resized crop, rand-m15-mstd0.5-inc1, and random erasing (arXiv 1708.04896) of a rectangle in
    a quarter of the images: each of its values becomes a normal one with ImageNet's mean and deviation. Values beyond
    black and white, which timm has after normalisation, are black and white.
    rand_augment_erase_small: the same with crops of 80-100 % of the area, rand-m9-mstd0.5-inc1, CIFAR-10's constants.
    """
    v2 = transforms()
    if kind == "auto_augment":
        from experiments.data.auto_augment import auto_augment

        first, secondary = _simple_crop(size, interpolation, "constant"), auto_augment
    else:
        first, secondary = _timms(kind, size, interpolation)
    if kind == "three_augment_simple_crop":
        first = _simple_crop(size, interpolation, "reflect")
    from_tensor = v2.Lambda(lambda image: Image.fromarray(image.permute(1, 2, 0).numpy()))
    last = [_erasing(_ERASING[kind])] if kind in _ERASING else []
    return v2.Compose([from_tensor, first, secondary, v2.PILToTensor(), *last])


def _simple_crop(size: int, interpolation: str, padding_mode: str) -> Callable[[Image.Image], Image.Image]:
    v2 = transforms()
    resize = v2.Resize(size, interpolation=v2.InterpolationMode(interpolation), antialias=True)
    return v2.Compose([resize, v2.RandomCrop(size, padding=4, padding_mode=padding_mode), v2.RandomHorizontalFlip()])


def _timms(kind: str, size: int, interpolation: str) -> tuple[Callable, Callable]:
    """timm's resized crop and flip, and what follows."""
    from timm.data import create_transform  # takes seconds to import

    policy, area, mean = "rand-m9-mstd0.5-inc1" if kind == "rand_augment" else "3a", 0.08, _IMAGENET[0]
    if (erasing := _ERASING.get(kind)) is not None:
        policy, area, mean, interpolation = erasing.policy, erasing.area, erasing.mean, "random"
    first, secondary, _ = create_transform(
        size,
        is_training=True,
        use_prefetcher=True,
        separate=True,
        auto_augment=policy,
        color_jitter=0.3,
        interpolation=interpolation,
        scale=(area, 1.0),
        mean=mean,
        hflip=0.5,
        re_prob=0.0,
    )
    for change in getattr(secondary.transforms[0], "ops", []):
        if change.name == "PosterizeIncreasing":
            change.aug_fn = _posterize
    return first, secondary


def _erasing(options: _Erasing) -> Callable[[Tensor], Tensor]:
    """timm's random erasing, of uint8."""
    from timm.data.random_erasing import RandomErasing  # takes seconds to import

    erase = RandomErasing(_ERASED, mode="pixel", device="cpu")
    mean, std = (torch.tensor(values)[:, None, None] for values in (options.mean, options.std))

    def change(image: Tensor) -> Tensor:
        normal = erase(torch.full(image.shape, torch.nan))  # numbers where it erases
        pixels = (255 * (mean + std * normal)).round().clamp(0, 255).nan_to_num().to(torch.uint8)
        return torch.where(normal.isnan(), image, pixels)

    return transforms().Lambda(change)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Black for 0 bits, as before Pillow 13, which refuses them: RandAugment asks for them at its highest level."""
    mask = 256 - 2 ** (8 - bits)
    return image.point([value & mask for value in range(256)] * 3)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    python, old = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(old)


def center_crop(image: Tensor, size: int, ratio: float = 0.875, interpolation: str = "bilinear") -> Tensor:
    """Resize the shorter side to size / ratio and cut the centre: ImageNet's evaluation."""
    v2 = transforms()
    mode = v2.InterpolationMode(interpolation)
    resized = v2.functional.resize(image, [resized_side(size, ratio)], interpolation=mode, antialias=True)
    return v2.functional.center_crop(resized, [size, size])


def resized_side(size: int, ratio: float = 0.875) -> int:
    """The shorter side that :func:`center_crop` cuts from."""
    return int(size / ratio)  # rounded down, as DeiT and timm do


def normalise(images: Tensor, mean: Tensor, std: Tensor, into: Tensor | None = None) -> Tensor:
    """(pixel / 255 - mean) / std per channel.

    Args:
        images: (batch, channels, height, width), uint8.
        mean: (channels,), of pixels from 0 to 1.
        std: (channels,), likewise.
        into: the result, of any memory; None: new memory.

    Returns:
        float32, the same shape.
    """
    floats = torch.empty_like(images, dtype=torch.float32) if into is None else into
    some = len(images) if images.is_cuda else max(1, _IN_CACHE * len(images) // max(1, images.numel()))
    for part, result in zip(images.split(some or 1), floats.split(some or 1), strict=True):
        torch.div(part, 255, out=result).sub_(mean[:, None, None]).div_(std[:, None, None])
    return floats
