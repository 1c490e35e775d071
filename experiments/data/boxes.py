"""Images with boxes around their objects: where they come from, and how they become batches."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor
from torchvision.datasets import VOCDetection

from experiments.data.base import Data, Request, Samples, Source
from experiments.data.decode import decode_file
from experiments.randomness import epoch_draws
from experiments.tasks.detection import Detection
from runfolder.errors import UserError
from runfolder.folder import typed

Target = dict[str, Tensor]
_ARCHIVES = "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar"


@dataclass(frozen=True)
class Objects:
    """What an image shows.

    Attributes:
        boxes: (objects, 4), float32: left, top, right and bottom edge in pixels from the image's
            corner, so that a box around one whole pixel has the sides 1.
        labels: (objects,), class numbers from 1; 0 is the background's.
        difficult: (objects,), bool: neither trained on nor counted.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


@dataclass(frozen=True)
class BoxSplit:
    """Image files and what each one shows."""

    files: list[Path]
    objects: list[Objects]

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> Iterable[bytes]:
        """What tells two splits apart."""
        for path, own in zip(self.files, self.objects, strict=True):
            yield os.fsencode(path.name)
            yield from (part.numpy().tobytes() for part in (own.boxes, own.labels, own.difficult))


@dataclass(frozen=True)
class BoxData(Data):
    """A data set of images of many sizes with boxes; of their shape a network need not know anything."""

    train: BoxSplit
    test: BoxSplit
    classes: list[str]
    flip: bool

    task = Detection

    def samples(self, seed: int, repeats: int, device: torch.device) -> BoxSamples:
        """One by one, by loader processes."""
        return BoxSamples(self, seed, repeats)


class BoxSamples(Samples):
    """Batches of images with boxes: half of them mirrored for an epoch, or plain (None).

    Args:
        data: the data set.
        seed: of the run.
        repeats: copies of each image in an epoch.
    """

    def __init__(self, data: BoxData, seed: int, repeats: int):
        self.data, self.seed, self.repeats = data, seed, repeats
        self._epoch, self._mirrored = None, None

    def __getitem__(self, request: Request) -> tuple[list[Tensor], list[Target]]:
        name, epoch, samples = request
        split = getattr(self.data, name)
        images, targets = zip(*(self._item(split, epoch, sample) for sample in samples), strict=True)
        return list(images), list(targets)

    def _item(self, split: BoxSplit, epoch: int | None, sample: int) -> tuple[Tensor, Target]:
        number = sample % len(split)
        image, own = decode_file(split.files[number]), split.objects[number]
        boxes = own.boxes
        if epoch is not None and self._is_mirrored(epoch, sample, len(split)):
            image, boxes = image.flip(-1), mirrored(boxes, image.shape[-1])
        # Copies: what a loader process sends stays in shared memory, with an open file each.
        target = {"boxes": boxes.clone(), "labels": own.labels.clone(), "difficult": own.difficult.clone()}
        target["trained"] = (~own.difficult).nonzero()[:, 0]  # here, since a device would have to be asked
        return image, target | {"image": torch.tensor(number)}

    def _is_mirrored(self, epoch: int, sample: int, images: int) -> bool:
        if self._epoch != epoch:
            draws = epoch_draws(self.seed, epoch, self.repeats * images, 1)[:, 0]
            self._epoch, self._mirrored = epoch, draws < 0.5 if self.data.flip else draws < 0
        return bool(self._mirrored[sample])

    def ready(self, batch: tuple[list[Tensor], list[Target]], device: torch.device) -> tuple[list, list]:
        """On the device; pixels from 0 to 1, which the network normalises itself."""
        images = [image.to(device, non_blocking=True).float() / 255 for image in batch[0]]
        targets = [{key: part.to(device, non_blocking=True) for key, part in target.items()} for target in batch[1]]
        return images, targets

    def nothing(self, device: torch.device) -> tuple[list, list]:
        """A batch of no image."""
        return [], []


def mirrored(boxes: Tensor, width: int) -> Tensor:
    """Boxes (objects, 4) in an image of this width after it was flipped from left to right."""
    left, top, right, bottom = boxes.unbind(1)
    return torch.stack([width - right, top, width - left, bottom], dim=1)


@dataclass(frozen=True, kw_only=True)
class Voc2007(Source):
    """PASCAL VOC 2007 (Everingham et al., 2010): 5,011 images for training (trainval), 4,952 for testing, 20 classes.

    Downloaded to ``root`` by torchvision, where it is not there yet. Any data set in VOC's
    layout under ``root/VOCdevkit/VOC2007`` is read; its classes are those of its training objects.

    Attributes:
        root: the folder with VOCdevkit/.
        flip: mirror half of the training images.
    """

    root: str
    flip: bool

    def load(self) -> BoxData:
        """Download what is missing, and read the annotations.

        Raises:
            UserError: not there and not to be downloaded, images that are missing, or annotations that cannot be read.
        """
        root = str(typed(self.root))
        try:
            parts = [_listed(root, name) for name in ("trainval", "test")]
        except (OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"expected VOC 2007 in {root} or a way to download it, got: {reason}. Offline: unpack {_ARCHIVES} in "
                f"{root}, or set runtime.data_dir."
            ) from None
        _require_images(root, [name for part in parts for name in part.images])
        found = [[_objects_in(Path(path)) for path in part.annotations] for part in parts]
        classes = sorted({name for image in found[0] for name, _, _ in image})
        unknown = sorted({name for image in found[1] for name, _, _ in image} - set(classes))
        if unknown:
            raise UserError(
                f"expected the same classes for training and testing in {root}, got only in test: {unknown}."
            )
        train, test = (
            BoxSplit([Path(path) for path in part.images], [_as_tensors(image, classes) for image in images])
            for part, images in zip(parts, found, strict=True)
        )
        for name, split in (("trainval", train), ("test", test)):
            if not len(split):
                raise UserError(f"expected images in {root}/VOCdevkit/VOC2007/ImageSets/Main/{name}.txt, got none.")
        return BoxData(train, test, classes, self.flip)


def _listed(root: str, part: str) -> VOCDetection:
    """One part, downloaded only where its list is missing: torchvision would unpack it at every start."""
    there = Path(root, "VOCdevkit", "VOC2007", "ImageSets", "Main", f"{part}.txt").exists()
    return VOCDetection(root, year="2007", image_set=part, download=not there)


def _require_images(root: str, paths: list[str]) -> None:
    """An unpacking that was cut off leaves lists without pictures."""
    there = {entry.name for entry in os.scandir(os.path.dirname(paths[0]))} if paths else set()
    missing = [path for path in paths if os.path.basename(path) not in there]
    if missing:
        raise UserError(
            f"expected all {len(paths)} listed images in {os.path.dirname(paths[0])}, {len(missing)} are missing, such "
            f"as {os.path.basename(missing[0])}; unpack {_ARCHIVES} in {root} again."
        )


def _objects_in(path: Path) -> list[tuple[str, list[float], bool]]:
    """(class, box, whether difficult) of each object in an annotation; there pixels count from 1."""
    try:
        tree = ElementTree.parse(path)
        found = []
        for node in tree.iter("object"):
            sides = {key: node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")}
            name, absent = node.findtext("name"), [key for key, value in sides.items() if value is None]
            if absent or not name:
                raise ValueError(f"an object without {absent[0] if absent else 'name'}")
            left, top, right, bottom = map(float, sides.values())
            box = [left - 1, top - 1, right, bottom]
            if not (0 <= box[0] < right and 0 <= box[1] < bottom):
                raise ValueError(f"the box {left:g} {top:g} {right:g} {bottom:g}")
            found.append((name.strip(), box, node.findtext("difficult", "0").strip() == "1"))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"expected an annotation of VOC in {path}, got: {error}; unpack the data set again.") from None
    return found


def _as_tensors(image: list[tuple[str, list[float], bool]], classes: list[str]) -> Objects:
    boxes = torch.tensor([box for _, box, _ in image]).reshape(-1, 4)
    labels = torch.tensor([classes.index(name) + 1 for name, _, _ in image], dtype=torch.int64)
    return Objects(boxes, labels, torch.tensor([difficult for _, _, difficult in image], dtype=torch.bool))
