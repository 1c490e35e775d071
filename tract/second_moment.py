"""The second moment of a layer's input rows, without ever holding all unfolded rows at once.

A layer multiplies its weight with *rows*. For a Linear layer on an input of shape
(..., n) every leading position is one row. For a convolution every output position of
every image is one row: the n = channels/groups * kernel elements that its kernel covers.
Letters used throughout: g groups, b rows, n row length, m outputs per group.

A :class:`Geometry` tells how rows are cut out of an input. A Linear layer is the case
without spatial dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tract.autocorrelation import Axis, autocorrelated, seconds
from tract.whole_float32 import whole_float32

_BUFFER_ELEMENTS = 2**20  # of a block of rows: 4 MiB in float32
_SUMMED_ROWS = 1024  # whose products are added up in the precision of the products
_UNCUT, _TILE = 192, 128  # longer rows are multiplied in tiles, of which the lower ones are enough
_LARGEST_TRACE = 2**17  # of X^T X / b, in multiples of lambda, for which float32 products are exact enough
# Ranks exchange X^T X, which is n x n, up to this n (512 MiB of float64). For longer rows they ask each other whether
# there are fewer than n, and exchange the rows themselves.
SHARED_ROW_LENGTH = 8192
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Geometry:
    """How a layer cuts rows out of its input of shape (batch, channels, *spatial).

    ``padding`` holds (before, after) for each spatial dimension, in their own order;
    ``padding_mode`` is torch's: zeros, reflect, replicate or circular. ``ones`` puts a one at
    the end of each row, which multiplies the bias.
    """

    channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    padding_mode: str = "zeros"
    groups: int = 1
    ones: bool = False

    def numbers(self) -> list[int]:
        """The same as whole numbers, which is what a custom operator can take; see :meth:`of`."""
        sizes = (self.kernel, self.stride, self.dilation, *self.padding)
        mode = _PADDING_MODES.index(self.padding_mode)
        return [self.channels, self.groups, mode, int(self.ones), *(number for size in sizes for number in size)]

    @staticmethod
    def of(numbers: Sequence[int]) -> Geometry:
        """The geometry of these :meth:`numbers`."""
        channels, groups, mode, ones, *rest = numbers
        d = len(rest) // 5
        sizes = (tuple(rest[i * d : (i + 1) * d]) for i in range(3))
        padding = tuple(zip(rest[3 * d :: 2], rest[3 * d + 1 :: 2], strict=True))
        return Geometry(channels, *sizes, padding, _PADDING_MODES[mode], groups, bool(ones))

    @property
    def row_length(self) -> int:
        """n, the length of one row of one group."""
        return self.channels // self.groups * math.prod(self.kernel) + self.ones

    @property
    def is_long(self) -> bool:
        """Whether n x n numbers are too many to exchange without asking whether there are fewer rows."""
        return self.row_length > SHARED_ROW_LENGTH

    def with_rows(self) -> Geometry:
        """A convolution of one dimension as one of two, for inputs of height one."""
        one = (1,)
        sizes = {name: one + getattr(self, name) for name in ("kernel", "stride", "dilation")}
        return replace(self, **sizes, padding=((0, 0), *self.padding))

    def output_size(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Output positions along each spatial dimension, as torch's convolutions count them."""
        sizes = zip(spatial, self.kernel, self.stride, self.dilation, self.padding, strict=True)
        return tuple(
            (size + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation, pad in sizes
        )

    def fits(self, x: Tensor) -> bool:
        """Whether the layer accepts an input of this shape."""
        if not self.kernel:
            return x.dim() >= 1 and x.shape[-1] == self.channels
        spatial = len(self.kernel)
        if x.dim() not in (spatial + 1, spatial + 2) or x.shape[-spatial - 1] != self.channels:
            return False
        return all(size > 0 for size in self.output_size(tuple(x.shape[-spatial:])))

    def batched(self, x: Tensor) -> Tensor:
        """The same input as (batch, channels, *spatial)."""
        if not self.kernel:
            return x.reshape(-1, self.channels)
        return x.unsqueeze(0) if x.dim() == len(self.kernel) + 1 else x

    def count_rows(self, x: Tensor) -> int:
        """b, the number of rows in this input."""
        if not self.kernel:
            return math.prod(x.shape[:-1])
        spatial = len(self.kernel)
        batch = x.shape[0] if x.dim() == spatial + 2 else 1
        return batch * math.prod(self.output_size(tuple(x.shape[-spatial:])))


def second_moment(x: Tensor, geometry: Geometry, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sum over all rows of the outer product of a row with itself.

    S[g] = sum_b X[g, b, :]^T X[g, b, :]  =  X^T X.

    Equation: the matrix x x^T of the TrAct closed form (arXiv 2410.23970, section 3), before the
    division by b. Which way it goes is a matter of speed alone: kernels that overlap by far go
    through :mod:`tract.autocorrelation` on a CPU, all else through blocks of rows.

    Args:
        x: the layer's input, any floating dtype and memory format.
        geometry: how the layer cuts rows out of it.
        dtype: of the products. In float64 they are exact for float32 inputs, and S is positive semi-definite up
            to float64 rounding even for raw pixel values; in float32 sums of about a thousand rows
            are rounded, S is within 1e-6 of its norm, and it takes half the time or less.

    Returns:
        float64 tensor of shape (g, n, n).
    """
    x = geometry.batched(x.detach()) if geometry.kernel else torch.atleast_2d(x.detach())
    dtype = torch.float64 if x.dtype == torch.float64 else dtype
    axes = _overlapping_axes(x, geometry)
    with torch.autocast(x.device.type, enabled=False), whole_float32():
        return _from_rows(x, geometry, dtype) if axes is None else _from_lags(x, geometry, axes, dtype)


def second_moment_for(x: Tensor, geometry: Geometry, damping: float) -> Tensor:
    """X^T X as exact as (X^T X / b + damping I)^-1 needs it, otherwise as :func:`second_moment`.

    Float32 products do, but on a CPU they are made in float64 where

    - there are few rows, b < 4 n: the smallest eigenvalues are then nearly zero, and it takes no time;
    - the trace of X^T X / b is too large beside damping, so that roundings of it would show: raw pixel
      values, a tiny damping, squares beyond float32 (whose trace is infinite or no number).
    """
    rows = geometry.count_rows(x)
    if x.device.type != "cpu":
        return second_moment(x, geometry, torch.float32)
    if rows >= 4 * geometry.row_length and x.dtype != torch.float64:
        total = second_moment(x, geometry, torch.float32)
        if total.diagonal(dim1=-2, dim2=-1).sum(-1).max() <= _LARGEST_TRACE * damping * rows:
            return total
    return second_moment(x, geometry)


def _overlapping_axes(x: Tensor, geometry: Geometry) -> tuple[Axis, Axis] | None:
    """The axes of a convolution of one or two dimensions for which its lags are faster than its rows."""
    dimensions = len(geometry.kernel)
    if dimensions not in (1, 2) or geometry.ones or x.device.type != "cpu":
        return None
    out = geometry.output_size(tuple(x.shape[2:]))
    if 0 in (*out, len(x)):
        return None
    sizes = zip(geometry.kernel, geometry.stride, geometry.dilation, geometry.padding, out, strict=True)
    zeros = geometry.padding_mode == "zeros"
    axes = [Axis(kernel, stride, dilation, pad[0] * zeros, count) for kernel, stride, dilation, pad, count in sizes]
    rows, columns = axes if dimensions == 2 else (Axis(1, 1, 1, 0, 1), axes[0])
    n = geometry.row_length
    by_rows = geometry.groups * geometry.count_rows(x) * n * (3e-10 + 1.1e-11 * (n + 64))
    return (rows, columns) if seconds(len(x), x.shape[1], geometry.groups, rows, columns) < by_rows else None


def _from_lags(x: Tensor, geometry: Geometry, axes: tuple[Axis, Axis], dtype: torch.dtype) -> Tensor:
    if len(geometry.kernel) == 1:
        x, geometry = x.unsqueeze(-2), geometry.with_rows()
    if dtype == torch.float32 and _is_flat(x):
        dtype = torch.float64
    if geometry.padding_mode == "zeros":
        return autocorrelated(x, *axes, geometry.groups, dtype)
    at_once = max(1, _BUFFER_ELEMENTS // 2 // x[0].numel())
    return sum(autocorrelated(_pad(some, geometry), *axes, geometry.groups, dtype) for some in x.split(at_once))


def _is_flat(x: Tensor) -> bool:
    """Whether neighbouring pixels are equal, in a sample of the lines: X^T X is singular then, and roundings show."""
    lines = x[..., ::16, :]
    return bool(lines.diff().square().sum() <= 1e-4 * lines.square().sum())


def _from_rows(x: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    n = geometry.row_length
    total = None
    size = n if n <= _UNCUT else _TILE
    for rows in _row_blocks(x, geometry, dtype):
        total = _with_products(total, rows, size)
    for low in range(size, n, size):
        total[:, :low, low : low + size] = total[:, low : low + size, :low].mT
    return total


def _with_products(total: Tensor | None, rows: Tensor, size: int) -> Tensor:
    """The total (None is zero), changed in place, and the lower tiles of rows^T rows, for rows (g, b, n).

    Sums of at most a thousand rows are added up in float64.
    """
    count, n = rows.shape[1:]
    whole = count // _SUMMED_ROWS * _SUMMED_ROWS
    if n <= size and len(rows) == 1 and whole:  # all sums at once
        sums = rows[0, :whole].unflatten(0, (-1, _SUMMED_ROWS))
        products = (sums.mT @ sums).sum(0, keepdim=True, dtype=torch.float64)
        total = products if total is None else total.add_(products)
        rows = rows[:, whole:]
    if total is None:
        total = rows.new_zeros((len(rows), n, n), dtype=torch.float64)
    for some in rows.split(_SUMMED_ROWS, dim=1) if rows.shape[1] else ():
        for low in range(0, n, size):
            high = min(low + size, n)
            total[:, low:high, :high] += some[:, :, low:high].mT @ some[:, :, :high]
    return total


def unfold(x: Tensor, geometry: Geometry, dtype: torch.dtype = torch.float64) -> Tensor:
    """All rows at once, shape (g, n, b): only for inputs with few rows."""
    x = geometry.batched(x.detach())
    out = geometry.output_size(tuple(x.shape[2:]))
    windows = _windows(_pad(x.to(dtype), geometry), geometry, out)
    return _with_ones(windows.reshape(geometry.groups, geometry.row_length - geometry.ones, -1).mT, geometry).mT


def output_columns(z: Tensor, geometry: Geometry) -> Tensor:
    """A layer's output, or its gradient, as (g, m, b), with b in the order of :func:`unfold`."""
    if not geometry.kernel:
        return z.reshape(-1, z.shape[-1]).T[None]
    z = z if z.dim() == len(geometry.kernel) + 2 else z.unsqueeze(0)
    return z.movedim(0, 2).reshape(geometry.groups, z.shape[1] // geometry.groups, -1)


def _row_blocks(x: Tensor, geometry: Geometry, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of x in blocks of shape (g, rows in the block, n); a block is gone when the next one comes."""
    n, groups = geometry.row_length, geometry.groups
    rows_at_once = max(1, _BUFFER_ELEMENTS // (n * groups))
    if not geometry.kernel:
        samples = max(1, rows_at_once // max(1, math.prod(x.shape[1:-1])))
        for some in x.split(samples):
            yield _with_ones(some.reshape(1, -1, geometry.channels).to(dtype), geometry)
        return
    out = geometry.output_size(tuple(x.shape[2:]))
    samples = max(1, rows_at_once // max(1, math.prod(out)))
    # One large sample is cut along its first spatial dimension.
    slab = max(1, min(out[0], rows_at_once // max(1, math.prod(out[1:])))) if samples == 1 else out[0]
    # The innermost loop of the copy should read memory in order: along positions, or along the kernel.
    along_kernel = geometry.stride[-1] > 1
    buffer = x.new_empty(0, dtype=dtype)
    for some in x.split(samples):
        for windows in _windows(_pad(some, geometry), geometry, out).split(slab, dim=1 + len(out)):
            rows = windows.unflatten(0, (groups, -1))
            elements = 2 + len(out)  # dimensions before the positions
            if along_kernel:
                rows = rows.permute(0, *range(elements, rows.dim()), *range(1, elements))
            if buffer.numel() < rows.numel():
                buffer = buffer.new_empty(rows.numel())
            copied = buffer[: rows.numel()].view(rows.shape).copy_(rows)
            shape = (groups, -1, n - geometry.ones)
            yield _with_ones(copied.view(shape) if along_kernel else copied.view(groups, shape[2], -1).mT, geometry)


def _with_ones(rows: Tensor, geometry: Geometry) -> Tensor:
    return torch.cat([rows, rows.new_ones((*rows.shape[:2], 1))], dim=2) if geometry.ones else rows


def _pad(x: Tensor, geometry: Geometry) -> Tensor:
    pads = [size for pair in reversed(geometry.padding) for size in pair]
    if not any(pads):
        return x
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, pads, mode=mode)


def _windows(x: Tensor, geometry: Geometry, out: tuple[int, ...]) -> Tensor:
    """All rows of a padded input as a view of shape (c, *kernel, o1, batch, o2, ...).

    The first output dimension stands before the batch so that one large image can be cut
    into slabs; the last one stays innermost, where memory is read in order.
    """
    if not out:
        return x.T
    batch, channel, *space = x.stride()
    kernel = [s * d for s, d in zip(space, geometry.dilation, strict=True)]
    first, *rest = (s * t for s, t in zip(space, geometry.stride, strict=True))
    size = (x.shape[1], *geometry.kernel, out[0], x.shape[0], *out[1:])
    return x.as_strided(size, (channel, *kernel, first, batch, *rest), x.storage_offset())
