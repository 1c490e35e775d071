"""Notice a bad value on the device without making the host wait for it.

On the CPU a check costs nothing and raises at once. On a CUDA device the answer travels
to the host in the background; it is read when it has arrived, at a later check, so the
error may come a step or two after the value that caused it. Until then the bad value
shows as a non-finite weight gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A layer met an input from which no finite update follows."""


# (finished event, answer on the host, message); oldest first.
_underway: deque[tuple[torch.cuda.Event, Tensor, str]] = deque()
_recorded: list[list[tuple[Tensor, str]]] = []  # of captures under way; backward passes are in threads of their own


@contextmanager
def recorded() -> Iterator[list[tuple[Tensor, str]]]:
    """What is required while a CUDA graph is captured, when nothing can be answered: (condition, message) of each.

    A replay computes the conditions anew, in the same tensors; require them after it.
    """
    _recorded.append([])
    try:
        yield _recorded[-1]
    finally:
        _recorded.pop()


def require(condition: Tensor, message: str) -> None:
    """Raise :class:`NonFiniteError` with this message if the condition is (or soon proves) false.

    Args:
        condition: a boolean tensor without dimensions, on any device.
        message: one sentence that names the layer.
    """
    if _is_captured(condition):
        if _recorded:
            _recorded[-1].append((condition, message))
        return
    if condition.device.type != "cuda":
        if not condition:
            raise NonFiniteError(message)
        return
    with torch.cuda.device_of(condition):  # whose stream computes it, whichever device is the current one
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(condition, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    _underway.append((arrived, answer, message))
    while _underway and _underway[0][0].query():
        _, earlier, earlier_message = _underway.popleft()
        if not earlier:
            _underway.clear()
            raise NonFiniteError(earlier_message)


def _is_captured(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    with torch.cuda.device_of(tensor):
        return torch.cuda.is_current_stream_capturing()
