"""Which images of a global batch each rank trains on, and which of them are mixed with one another.

Places in a batch are those of the epoch's order, where copies of an image stand side by side. DeiT's sampler gives
place p to GPU p mod GPUs, so that a GPU sees an image once in a step, and mixes what a GPU has. Here as many groups as
DeiT has GPUs take their part; any number of ranks may then share the groups, without a change to what is mixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

import numpy as np


@dataclass(frozen=True)
class Share:
    """A rank's part of a global batch.

    Attributes:
        places: (images,), those of the same group one after the other.
        groups: {number of a group: how many images of it}, in the order of ``places``; within this part of a group,
            the image that is k-th from the front is mixed with the one that is k-th from the back.
    """

    places: np.ndarray
    groups: dict[int, int]


@lru_cache(maxsize=8)
def shares(images: int, ranks: int, repeats: int = 1, group: int | None = None, paired: bool = False) -> list[Share]:
    """The shares of all ranks.

    Args:
        images: of the global batch.
        ranks: who share it.
        repeats: copies of an image that stand side by side; they come into different groups, or far apart in one.
        group: images of a group; None makes one group.
        paired: no pair of images that are mixed with one another is torn between ranks.
    """
    groups = -(-images // group) if group else 1
    apart = np.argsort(np.arange(images) % max(groups, repeats), kind="stable")
    if not paired:
        return [Share(places, {0: len(places)}) for places in np.array_split(apart, ranks)]
    members = np.array_split(apart, groups)
    # Rank r of R gets the groups r, r + R, ...: where R divides their number, images as far apart as DeiT's.
    pairs = [(g, k) for g in sorted(range(groups), key=lambda g: g % ranks) for k in range(-(-len(members[g]) // 2))]
    return [_share(members, part.tolist()) for part in np.array_split(np.array(pairs), ranks)]


def _share(members: list[np.ndarray], pairs: list[list[int]]) -> Share:
    """Pair k of a group is its k-th places from the front and from the back, in the middle perhaps the same place."""
    places, groups = [np.empty(0, dtype=np.int64)], {}
    for g, own in groupby(pairs, key=itemgetter(0)):
        numbers = [k for _, k in own]
        first, end, size = numbers[0], numbers[-1] + 1, len(members[g])
        places += [members[g][first:end], members[g][max(end, size - end) : size - first]]
        groups[g] = sum(map(len, places[-2:]))
    return Share(np.concatenate(places), groups)
