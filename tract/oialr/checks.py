"""When which layer is looked at, as a function of the step alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Checks:
    """The steps at which layers are checked, and which of them.

    Checks come before the forward passes ``delay``, ``delay + frequency``, ... of training, counted from 1. The
    first check looks at the last int((L - 1) ``layer_share``) of L layers, each further one at as many more,
    until it is all; a share that gives none means all at once. A layer that was looked at is passed over by the
    next ``pause - 1`` checks.

    Args:
        delay: forward passes before the first check; with 0 there is none before the first step either, and the
            first comes ``frequency`` steps later.
        frequency: forward passes from one check to the next, >= 1.
        layer_share: from 0 to 1.
        pause: N >= 1; 0, as the authors' configurations have it, is 1.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> [Checks(delay=3, frequency=2, layer_share=0.5, pause=1).due(step, 4) for step in (3, 4, 5, 7, 9)]
        [[3], [], [2, 3], [1, 2, 3], [0, 1, 2, 3]]
    """

    delay: int
    frequency: int
    layer_share: float
    pause: int

    def __post_init__(self):
        if self.delay < 0 or self.frequency < 1 or not 0 <= self.layer_share <= 1 or self.pause < 0:
            raise ValueError(
                "expected delay and stable_update_delay of 0 or more, stability_frequency of 1 or more, and "
                f"network_layer_perc_step from 0 to 1, got {self.delay}, {self.pause}, {self.frequency} and "
                f"{self.layer_share}."
            )

    def number(self, step: int) -> int:
        """Which check comes before forward pass ``step`` (from 1), counted from 1; 0 for none."""
        if step < max(1, self.delay) or (step - self.delay) % self.frequency:
            return 0
        return (step - self.delay) // self.frequency + (self.delay > 0)

    def due(self, step: int, count: int) -> list[int]:
        """The numbers, from 0, of those of ``count`` layers that are checked before forward pass ``step`` (from 1)."""
        number = self.number(step)
        if not number:
            return []
        each, pause = int((count - 1) * self.layer_share) or count, max(1, self.pause)
        first = [(count - 1 - index) // each + 1 for index in range(count)]  # check of each layer
        return [index for index in range(count) if number >= first[index] and not (number - first[index]) % pause]
