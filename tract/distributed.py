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
        rows: b of this rank, a float64 tensor of shape (1,); 1 for none, where there is no other rank.
        everywhere: False keeps to this rank.

    Returns:
        A, shape (g, n, n), float64; zero where there is no row at all.
    """
    if everywhere and world_size() > 1:
        packed = global_sum(torch.cat([total.reshape(-1), rows]), everywhere)
        total, rows = packed[:-1].view_as(total), packed[-1:].clamp(min=1)
    return total / rows


def global_sum(total: Tensor, everywhere: bool) -> Tensor:
    """The sum over all ranks, each of which makes the call; changes it in place. False keeps to this rank."""
    if everywhere and world_size() > 1:
        dist.all_reduce(total)
    return total


def mean_over_ranks(product: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, each of which makes the call; changes it in place."""
    dist.all_reduce(product)
    return product.div_(world_size())


@torch._disable_dynamo  # the numbers of rows decide what follows; torch.compiler.disable imports torch._dynamo, 1.2 s
def all_rows_if_few(rows: Tensor | None, groups: int, n: int, device: torch.device) -> Tensor | None:
    """The rows of all ranks, (g, n, sum of b), if they are fewer than n; every rank must make the call.

    The host waits for the numbers of rows.

    Args:
        rows: of this rank, shape (g, n, b), float64, b of any size; None says that there are n or more.
        groups: g.
        n: the length of a row.
        device: where the numbers are exchanged.
    """
    own = n if rows is None else rows.shape[-1]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = own
    dist.all_reduce(counts)
    counts = counts.tolist()
    if sum(counts) >= n:
        return None
    padded = rows.new_zeros((groups, n, max(counts)))
    padded[..., :own] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[..., :count] for part, count in zip(parts, counts, strict=True)], dim=-1)


def sharded_like(weight: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, as ``fully_shard`` has cut the weight; else the tensor."""
    if not hasattr(weight, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
