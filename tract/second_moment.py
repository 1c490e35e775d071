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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the float64 work buffer: 32 MiB on the CPU, 256 MiB elsewhere.
_BUFFER_ELEMENTS = {"cpu": 2**22}
_BUFFER_ELEMENTS_ACCELERATOR = 2**25
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


def second_moment(x: Tensor, geometry: Geometry) -> Tensor:
    """Sum over all rows of the outer product of a row with itself.

    S[g] = sum_b X[g, b, :]^T X[g, b, :]  =  X^T X, in float64.

    Equation: the matrix x x^T of the TrAct closed form (arXiv 2410.23970, section 3),
    before the division by b. Products of float32 numbers are exact in float64, so S is
    positive semi-definite up to float64 rounding even for raw pixel values.

    Args:
        x: the layer's input, any floating dtype and memory format.
        geometry: how the layer cuts rows out of it.

    Returns:
        float64 tensor of shape (g, n, n).
    """
    n = geometry.row_length
    total = x.new_zeros((geometry.groups, n, n), dtype=torch.float64)
    for block in _row_blocks(x, geometry):
        total.baddbmm_(block, block.mT)
    return total


def unfold(x: Tensor, geometry: Geometry) -> Tensor:
    """All rows at once, float64, shape (g, n, b): only for inputs with few rows."""
    x = geometry.batched(x.detach())
    out = geometry.output_size(tuple(x.shape[2:]))
    return _as_rows(_windows(_pad(x.to(torch.float64), geometry), geometry, out), geometry)


def output_columns(z: Tensor, geometry: Geometry) -> Tensor:
    """A layer's output, or its gradient, as (g, m, b), with b in the order of :func:`unfold`."""
    if not geometry.kernel:
        return z.reshape(-1, z.shape[-1]).T[None]
    z = z if z.dim() == len(geometry.kernel) + 2 else z.unsqueeze(0)
    return z.movedim(0, 2).reshape(geometry.groups, z.shape[1] // geometry.groups, -1)


def _row_blocks(x: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """The rows of x in blocks of shape (g, n, rows in the block), float64."""
    x = geometry.batched(x.detach())
    n, groups = geometry.row_length, geometry.groups
    out = geometry.output_size(tuple(x.shape[2:]))
    limit = _BUFFER_ELEMENTS.get(x.device.type, _BUFFER_ELEMENTS_ACCELERATOR)
    rows_at_once = max(1, limit // (n * groups))
    samples = max(1, rows_at_once // max(1, math.prod(out)))
    # One large sample is cut along its first spatial dimension.
    slab = out[0] if out else 1
    if samples == 1 and out:
        slab = max(1, min(slab, rows_at_once // max(1, math.prod(out[1:]))))
    for chunk in x.split(samples):
        windows = _windows(_pad(chunk.to(torch.float64), geometry), geometry, out)
        for part in windows.split(slab, dim=1 + len(out)) if out else (windows,):
            yield _as_rows(part, geometry)


def _as_rows(windows: Tensor, geometry: Geometry) -> Tensor:
    """Windows as (g, n, b)."""
    groups, n = geometry.groups, geometry.row_length
    rows = windows.reshape(groups, n - geometry.ones, -1)
    return torch.cat([rows, rows.new_ones((groups, 1, rows.shape[-1]))], dim=1) if geometry.ones else rows


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
