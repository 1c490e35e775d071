"""Wrong labels on purpose, to see what a method does with them."""

from __future__ import annotations

from typing import Any

import numpy as np


def noisy_labels(labels: np.ndarray, rate: float, classes: int, generator: Any) -> np.ndarray:
    """A copy of the labels with a share of them drawn anew.

    The first int(n rate) places of a random permutation get a label that is uniform over all classes, the
    right one among them, so that about rate (1 - 1/classes) of the labels are wrong.

    Args:
        labels: of shape (n,), integers from 0 to classes - 1.
        rate: in [0, 1].
        classes: how many there are.
        generator: a numpy Generator, such as ``stream(seed, "label noise")`` gives.

    Raises:
        ValueError: a rate outside of [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"expected a rate of wrong labels in [0, 1], got {rate}.")
    labels = np.array(labels)
    places = generator.permutation(len(labels))[: int(len(labels) * rate)]
    labels[places] = generator.integers(classes, size=len(places))
    return labels
