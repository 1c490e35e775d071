"""Statistics over the global batch: all ranks of the default process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks that share a batch; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_mean(total: Tensor, rows: Tensor, everywhere: bool) -> Tensor:
    """sum over ranks of ``total``, divided by the sum over ranks of ``rows``.

    A = sum_r X_r^T X_r / sum_r b_r: ranks weigh by their rows, so they may hold different
    numbers of images, or none. One collective call; every rank must make it.

    Args:
        total: X^T X of this rank, shape (g, n, n), float64.
        rows: b of this rank, a float64 tensor of shape (1,).
        everywhere: False keeps to this rank.

    Returns:
        A, shape (g, n, n), float64; zero where there is no row at all.
    """
    if everywhere and world_size() > 1:
        packed = torch.cat([total.reshape(-1), rows])
        dist.all_reduce(packed)
        total, rows = packed[:-1].view_as(total), packed[-1:]
    return total / rows.clamp(min=1)
