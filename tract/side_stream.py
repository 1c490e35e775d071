"""Work beside the stream that calls the layer.

The Cholesky factor of A + lambda I is a chain of small steps that leave a GPU idle, and nothing needs it before the
weight gradient is solved with it. So it is made on a stream of its own, while the forward and backward pass of the
rest of the network run, and the current stream waits for it in the backward pass, before that solve.

What orders what:

- X^T X itself stays on the current stream. Read from elsewhere, the input could be overwritten (autograd notices where
  the layer has saved this very tensor; under autocast, with padding modes other than zeros, with hooks on saved tensors
  it has not, and writing is allowed), and its memory could be used again, while it is still read.
- The side stream begins with waiting for all that the current stream has been given, so X^T X is there. What it reads
  was allocated for the current stream and may be freed at once; what it makes is used on the current one: both are told
  to the allocator (``record_stream``). They are n x n numbers, never the input.
- Hooks on saved tensors may read what is saved at once (``save_on_cpu``): under them nothing goes beside.
- If there is no backward pass, nobody waits, and what the side stream has made is memory of its own.
- Ranks call their collectives in the order of the program, whichever stream it is on.
- Inside a graph capture everything stays on the current stream: a captured stream has to join again within the same
  capture, and forward and backward pass may be captured apart. So it does in compiled code, which plans memory itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def is_allowed() -> bool:
    """Whether what is begun here may be beside the current stream until the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@contextmanager
def beside(source: Tensor, wanted: bool) -> Iterator[None]:
    """Inside, operations on a GPU go to the side stream of this tensor's device.

    Args:
        source: what they begin with.
        wanted: False leaves them where they are, as does any other device.
    """
    if not (wanted and _is_free(source)):
        yield
        return
    side = _side_stream(source.device)
    side.wait_stream(torch.cuda.current_stream(source.device))
    source.record_stream(side)
    with torch.cuda.stream(side):
        yield


def join(result: Tensor, wanted: bool) -> None:
    """Let the current stream wait for what has gone to the side stream, of which this is a result."""
    if wanted and _is_free(result):
        current = torch.cuda.current_stream(result.device)
        current.wait_stream(_side_stream(result.device))
        result.record_stream(current)


def _is_free(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    with torch.cuda.device_of(tensor):
        return not torch.cuda.is_current_stream_capturing()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
