"""Training labels of which some are drawn at random."""

from __future__ import annotations

import numpy as np


def noisy_labels(labels: np.ndarray, rate: float, classes: int, generator: np.random.Generator) -> np.ndarray:
    """Uniform labels for the first int(n * rate) of n images in a random order; the true class is one of the choices.

    As in "Learning Neural Network Subspaces" (Wortsman et al., arXiv 2102.10472). A larger rate from the same generator
    keeps what a smaller one changes, and the new labels do not depend on the old ones.

    Args:
        labels: (n,) whole numbers.
        rate: 0 to 1.
        classes: new labels are 0 to classes - 1.
        generator: draws the order, then a label for each place in it.

    Returns:
        A new array, (n,), of the same type.

    Raises:
        ValueError: another rate.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"expected a rate of wrong labels in [0, 1], got {rate}.")
    order = generator.permutation(len(labels))
    drawn = generator.integers(classes, size=len(labels))
    count = int(len(labels) * rate)
    noisy = np.array(labels)
    noisy[order[:count]] = drawn[:count]
    return noisy
