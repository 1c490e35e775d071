"""CIFAR-10 and CIFAR-100 through torchvision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from experiments.data.augment import IN_BATCHES
from experiments.data.base import Source
from experiments.data.images import ImageData, Split
from experiments.data.options import ImageOptions
from runfolder.errors import UserError

_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Cifar10(ImageOptions, Source):
    """Downloaded once to ``root``, checked by its checksums.

    Images are augmented in batches; those of another ``image_size``, or augmented one by one, by loader processes.

    Attributes:
        root: the folder of the archive.
    """

    root: str
    kind: ClassVar[type[CIFAR10]] = CIFAR10

    def load(self) -> ImageData:
        """Download what is missing, and read it.

        Raises:
            UserError: not there and not to be downloaded, or another size is to be kept in memory.
        """
        keep = self.in_memory
        if keep is None:
            keep = self.image_size in (None, _SIZE) and self.augment in IN_BATCHES
        if keep and self.image_size not in (None, _SIZE):
            raise UserError(f"expected data.image_size to be {_SIZE} with data.in_memory=true, got {self.image_size}.")
        kind, root = self.kind, self.root
        try:
            parts = [kind(root, train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"expected {kind.__name__} in {root} or a way to download it, got: {reason}. Offline: put "
                f"{kind.filename} (md5 {kind.tgz_md5}) there, set runtime.data_dir to where it is, or use "
                "data=imagefolder data.root=DIR."
            ) from None
        train, test = (
            Split(torch.tensor(part.targets), torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous())
            for part in parts
        )
        return ImageData(train, test, parts[0].classes, replace(self, in_memory=keep))

    def fetch(self) -> None:
        """Download it, unless its files are there."""
        folder = Path(self.root) / self.kind.base_folder
        if not all((folder / name).is_file() for name, _ in self.kind.train_list + self.kind.test_list):
            self.load()


@dataclass(frozen=True, kw_only=True)
class Cifar100(Cifar10):
    """The same for CIFAR-100."""

    kind: ClassVar[type[CIFAR10]] = CIFAR100
