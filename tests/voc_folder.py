"""A small data set in VOC's layout: pictures with pasted things whose boxes are known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data.boxes import BoxData, Voc2007

CLASSES = ("dark", "light")
_OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox>
<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def rectangle(label: int, height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """A noisy plain patch, dark or light."""
    return draw.integers(*((0, 60), (200, 256))[label], (height, width, 3)).astype(np.uint8)


def write_voc(
    root: Path, train: int, test: int, paste: Callable[..., np.ndarray] = rectangle, classes: tuple = CLASSES
) -> Path:
    """``root`` with VOCdevkit/VOC2007: so many pictures, each with one to three things in a row."""
    base, draw = root / "VOCdevkit" / "VOC2007", np.random.default_rng(0)
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (base / name).mkdir(parents=True)
    for part, count in (("trainval", train), ("test", test)):
        names = [f"{part}{number:04d}" for number in range(count)]
        (base / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            _write_image(base, name, draw, paste, classes)
    return root


def _write_image(base: Path, name: str, draw: np.random.Generator, paste: Callable, classes: tuple) -> None:
    height, width = draw.integers(70, 100), draw.integers(100, 140)
    picture, objects = np.full((height, width, 3), 128, dtype=np.uint8), []
    for place in range(draw.integers(1, 4)):
        label, (h, w) = int(draw.integers(len(classes))), draw.integers(20, 30, 2)
        top, left = int(draw.integers(0, height - h + 1)), 32 * place
        picture[top : top + h, left : left + w] = paste(label, h, w, draw)
        difficult = int(draw.random() < 0.2)
        objects.append(_OBJECT.format(classes[label], difficult, left + 1, top + 1, left + w, top + h))
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{''.join(objects)}</annotation>")
    Image.fromarray(picture).save(base / "JPEGImages" / f"{name}.jpg", quality=95)


def voc2007(root: str, flip: bool) -> BoxData:
    """What the harness reads of such a folder."""
    return Voc2007(root=root, flip=flip).load()
