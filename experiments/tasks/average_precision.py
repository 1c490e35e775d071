"""Mean average precision as PASCAL VOC 2007 defines it (Everingham et al., 2010, section 4.2).

The libraries' metrics follow COCO: there a detection may take the second-best object where the
best one is taken already, and objects marked as difficult have no counterpart of the same
meaning. So VOC's own definition is written out here; where the two agree, the tests compare
it with a library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RECALLS = np.arange(11) / 10  # the nearest numbers to 0.1, 0.2, ...; those of linspace are not


@dataclass(frozen=True)
class ImageResult:
    """What was found in one image, and what there is; boxes (n, 4) as left, top, right, bottom."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    true_boxes: np.ndarray
    true_labels: np.ndarray
    difficult: np.ndarray


def mean_average_precision(results: Sequence[ImageResult], classes: int, overlap: float = 0.5) -> float:
    """The mean of :func:`average_precision` over the classes 1 to ``classes``, 0 to 1.

    A class without an object that counts has none and is left out; nan where that is every class.
    """
    found = [class_average_precision(results, label, overlap) for label in range(1, classes + 1)]
    return float(np.mean([value for value in found if value is not None] or [np.nan]))


def class_average_precision(results: Sequence[ImageResult], label: int, overlap: float) -> float | None:
    """Average precision of one class; None where no object of it counts.

    Detections are taken by falling score. Each belongs to the object of its class and image that it
    overlaps most, if by at least ``overlap`` (area of the intersection over that of the union). The
    first one of an object is right; further ones, and those without an object, are wrong; those
    of a difficult object count as neither.
    """
    objects = sum(int((~image.difficult[image.true_labels == label]).sum()) for image in results)
    if objects == 0:
        return None
    judged = [_judged(image, label, overlap) for image in results]
    scores, owners, counts = (np.concatenate(parts) for parts in zip(*judged, strict=True))
    order = np.argsort(-scores, kind="stable")
    image_of = np.repeat(np.arange(len(judged)), [len(own) for own, _, _ in judged])
    right = _first_of_each(image_of[order], owners[order])
    return average_precision(right[counts[order]], objects)


def average_precision(right: np.ndarray, objects: int) -> float:
    """The mean, over the recalls 0, 0.1, ..., 1, of the highest precision at that recall or a higher one.

    Args:
        right: (detections,), bool, by falling score.
        objects: how many there are to find.
    """
    hits = np.cumsum(right)
    recall, precision = hits / objects, hits / np.arange(1, len(hits) + 1)
    return float(np.mean([precision[recall >= least].max(initial=0.0) for least in RECALLS]))


def _judged(image: ImageResult, label: int, overlap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, object of each detection or -1, whether it counts) of one class in one image."""
    own, there = image.labels == label, image.true_labels == label
    scores, truth, difficult = image.scores[own], image.true_boxes[there], image.difficult[there]
    if not len(truth):
        return scores, np.full(len(scores), -1), np.full(len(scores), True)
    overlaps = intersection_over_union(image.boxes[own], truth)
    best = overlaps.argmax(1)
    matched = overlaps[np.arange(len(best)), best] >= overlap
    return scores, np.where(matched, best, -1), ~(matched & difficult[best])


def _first_of_each(images: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Whether a detection is the first of its object, in the given order."""
    seen: set[tuple[int, int]] = set()
    first = []
    for place in zip(images.tolist(), owners.tolist(), strict=True):
        first.append(place[1] >= 0 and place not in seen)
        seen.add(place)
    return np.array(first, dtype=bool)


def intersection_over_union(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, m) shares of the common area in the united one, of boxes (n, 4) and (m, 4)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(sides[:, 2:] - sides[:, :2], axis=1) for sides in (boxes, others)]
    return common / (areas[0][:, None] + areas[1][None, :] - common)
