"""What is done with images in classes, whatever they are read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.data.augment import IN_BATCHES, ONE_BY_ONE
from experiments.data.corruptions import require_corruption
from runfolder.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """The keys that files in ``conf/data/`` share; a source adds its own by inheritance.

    Attributes:
        image_size: height and width that the network sees; None is the images' own.
        augment: one of augment.IN_BATCHES or augment.ONE_BY_ONE.
        padding: of crop_flip.
        flip: of crop_flip; the others always flip.
        rotation: largest angle in degrees, after crop and flip.
        crop_ratio: of the test image's shorter side that is looked at, where sizes differ.
        interpolation: bilinear or bicubic.
        mean: per channel; None is measured on the training images.
        std: likewise.
        in_memory: augment whole batches on the device, or single images in loader processes; None lets the source
            decide.
        label_noise: share of the training images whose labels are drawn at random.
        label_noise_seed: decides which images, and their labels.
        corruption: of the test images, see `corruptions.py`; None leaves them as they are.
        severity: of the corruption, 1 to 5 (0 leaves them as they are).
    """

    # Whether the source's test images are corrupted already, so that corruption and severity only say which these are.
    corrupted_files: ClassVar[bool] = False

    image_size: int | None = None
    augment: str
    padding: int = 0
    flip: bool = True
    rotation: float = 0.0
    crop_ratio: float = 1.0
    interpolation: str = "bilinear"
    mean: list | None
    std: list | None
    in_memory: bool | None = None
    label_noise: float = 0.0
    label_noise_seed: int = 0
    corruption: str | None = None
    severity: int | None = None

    def __post_init__(self):
        known = (*IN_BATCHES, *ONE_BY_ONE)
        if self.augment not in known:
            raise UserError(f"expected data.augment to be one of {', '.join(known)}, got {self.augment!r}.")
        if self.augment in ONE_BY_ONE and self.in_memory:
            raise UserError(f"data.augment={self.augment} is done by loader processes; give data.in_memory=false.")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"expected data.image_size to be at least 1 or null, got {self.image_size}.")
        if not 0 <= self.rotation <= 180:
            raise UserError(f"expected data.rotation to be 0 to 180 degrees, got {self.rotation:g}.")
        if not 0 < self.crop_ratio <= 1:
            raise UserError(f"expected data.crop_ratio to be above 0 and at most 1, got {self.crop_ratio:g}.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"expected data.interpolation to be bilinear or bicubic, got {self.interpolation!r}.")
        if not 0 <= self.label_noise <= 1:
            raise UserError(f"expected data.label_noise to be 0 to 1, got {self.label_noise:g}.")
        if self.label_noise_seed < 0:
            raise UserError(f"expected data.label_noise_seed to be 0 or more, got {self.label_noise_seed}.")
        if self.corrupted_files:
            return
        if self.corruption is not None:
            require_corruption(self.corruption, self.severity)
        elif self.severity is not None:
            raise UserError(f"expected data.corruption=NAME with data.severity={self.severity}, got null.")
