"""X^T X of a convolution whose kernels overlap, from the autocorrelation of its images.

The entry of two kernel positions is a sum of products of two pixels over all output positions. But for
what the borders cut off, it depends on the distance d of the two pixels alone:

    S[i, i'] = C[i' - i] - (pairs whose output position lies outside),   C[d] = sum_p u(p) u(p + d)^T,

where u is zero outside of the padded image. C comes from one Fourier transform per image; the pairs
outside lie in strips along the borders. A 7 x 7 kernel of stride 2 on three channels has rows of n = 147
numbers, but only 12 features a pixel and 49 distances.

Strides: u(t, q) holds the s1 x s2 pixels by which one output position is away from the next, as phi =
c s1 s2 features. Kernel position (i, j) is the feature (i mod s1, j mod s2) at a distance of
(a1, a2) = (i // s1, j // s2) strides, a < A along each axis.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_SPECTRA = 5 * 2**20  # bytes of the sums of cross spectra; more are cut into slabs of output positions
_WORK = 2 * 2**20  # bytes of the images that are transformed together, of their transforms, and of these in order
_STRIPS = 4 * 2**20  # bytes of their borders
_FEWEST = 4  # images; of fewer, complex batched products are several times slower
_IMAGES = 128  # whose spectra are added up in the precision of the products


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a convolution, and the output positions first, ..., first + count - 1 along it."""

    kernel: int
    stride: int
    dilation: int
    padding: int  # before the image
    count: int
    first: int = 0

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(a, r) of each kernel position: how many strides away, and which pixel of a stride."""
        return [divmod(i * self.dilation, self.stride) for i in range(self.kernel)]

    @property
    def reach(self) -> int:
        """A, the number of strides that a kernel touches."""
        return self.steps[-1][0] + 1

    @property
    def length(self) -> int:
        """The number of strides that these output positions touch."""
        return self.count + self.reach - 1

    @property
    def period(self) -> int:
        """Of the Fourier transform: no distance wraps around."""
        return _smooth(self.length + self.reach - 1)

    def slabs(self, number: int) -> Iterator[Axis]:
        """The output positions in so many parts."""
        size = -(-self.count // number)
        for first in range(0, self.count, size):
            yield Axis(
                self.kernel, self.stride, self.dilation, self.padding, min(size, self.count - first), self.first + first
            )

    def places(self, phase: int, size: int) -> tuple[slice, slice]:
        """Where the pixels of this phase stand in an image of this size, and where in u."""
        start = self.first * self.stride + phase - self.padding
        skipped = max(0, -(start // self.stride))
        start += skipped * self.stride
        number = max(0, min(self.length - skipped, -((start - size) // self.stride)))
        return slice(start, start + number * self.stride, self.stride), slice(skipped, skipped + number)


def features(channels: int, groups: int, rows: Axis, columns: Axis) -> int:
    """phi of one group."""
    return channels // groups * rows.stride * columns.stride


def seconds(images: int, channels: int, groups: int, rows: Axis, columns: Axis) -> float:
    """Roughly what this way takes on two cores; see :func:`tract.second_moment.second_moment`."""
    size, phi = rows.period * columns.period, features(channels, groups, rows, columns)
    return 1.5e-3 + images * groups * size * phi * (4e-9 + 1.2e-10 * phi)


def autocorrelated(x: Tensor, rows: Axis, columns: Axis, groups: int, dtype: torch.dtype) -> Tensor:
    """X^T X of a convolution in two dimensions with zero padding.

    Args:
        x: shape (batch, channels, height, width).
        rows: the axis of the height.
        columns: the axis of the width.
        groups: of channels.
        dtype: of the products, float32 or float64.

    Returns:
        float64 tensor of shape (g, n, n); from float32 products within about 1e-7 of the norm.
    """
    phi = features(x.shape[1], groups, rows, columns)
    spectra = 2 * dtype.itemsize * groups * phi**2 * rows.period * (columns.period // 2 + 1)
    edges = 2 * dtype.itemsize * groups * phi * (rows.reach * columns.length + columns.reach * rows.length)
    at_once = max(_FEWEST, min(_IMAGES, _STRIPS // edges))
    total = 0
    for slab in rows.slabs(-(-spectra // _SPECTRA)):
        for images in x.split(at_once):
            total = total + _pairs(images, slab, columns, groups, dtype)
    # (a1, a1', a2, a2', g, phi, phi') as (g, (a1, a2, phi), (a1', a2', phi')), of which S is a part
    size = rows.reach * columns.reach * phi
    total = total.permute(4, 0, 2, 5, 1, 3, 6).reshape(groups, size, size)
    kept = _kernel_positions(x.shape[1] // groups, rows, columns)
    return total[:, kept[:, None], kept]


@functools.lru_cache(32)
def _kernel_positions(channels: int, rows: Axis, columns: Axis) -> Tensor:
    """The place of each kernel element (c, i, j) among (a1, a2, (c, r1, r2))."""
    i, j = (torch.arange(axis.kernel) * axis.dilation for axis in (rows, columns))
    a = (i // rows.stride)[:, None] * columns.reach + j // columns.stride
    r = (i % rows.stride)[:, None] * columns.stride + j % columns.stride
    pixels = rows.stride * columns.stride
    c = torch.arange(channels)[:, None, None]
    return ((a * channels + c) * pixels + r).flatten()


def _pairs(x: Tensor, rows: Axis, columns: Axis, groups: int, dtype: torch.dtype) -> Tensor:
    """Sums of u(t + a1, q + a2) u(t + a1', q + a2')^T over output positions (t, q).

    Float64, shape (a1, a1', a2, a2', g, phi, phi').
    """
    phi, size = features(x.shape[1], groups, rows, columns), (rows.period, columns.period)
    half = columns.period // 2 + 1
    at_once = min(len(x), max(_FEWEST, _WORK // (dtype.itemsize * groups * phi * size[0] * size[1])))
    u = x.new_zeros((at_once, groups, phi, *size), dtype=dtype)
    transformed = u.new_empty((at_once, groups, phi, size[0], half), dtype=dtype.to_complex())
    in_order = transformed.new_empty((size[0] * half, groups, at_once, phi))
    spectra = transformed.new_zeros((size[0] * half * groups, phi, phi))
    strips = _Strips(u, len(x), rows, columns, groups, phi)
    for first in range(0, len(x), at_once):
        images = x[first : first + at_once]
        u, transformed, in_order = u[: len(images)], transformed[: len(images)], in_order[:, :, : len(images)]
        _gather(images, rows, columns, u)
        strips.take(first, u)
        torch.fft.rfft2(u, out=transformed)
        in_order.copy_(transformed.flatten(3).permute(3, 1, 0, 2))
        by_frequency = in_order.flatten(0, 1)
        spectra.baddbmm_(by_frequency.mH, by_frequency)
    del u, transformed, in_order, by_frequency  # their memory is needed
    everywhere = _at_distances(spectra.view(size[0], half, -1), rows, columns).unflatten(-1, (groups, phi, phi))
    return everywhere[_distances(rows)[:, :, None, None], _distances(columns)] - strips.outside()


@functools.lru_cache(32)
def _distances(axis: Axis) -> Tensor:
    """a' - a of each (a, a')."""
    a = torch.arange(axis.reach)
    return a - a[:, None]


def _gather(x: Tensor, rows: Axis, columns: Axis, u: Tensor) -> None:
    """Copy the pixels into u, shape (batch, g, (c, r1, r2), t, q)."""
    u = u.unflatten(2, (-1, rows.stride, columns.stride))
    x = x.unflatten(1, (u.shape[1], -1))
    for r1 in range(rows.stride):
        for r2 in range(columns.stride):
            (y, t), (z, q) = rows.places(r1, x.shape[-2]), columns.places(r2, x.shape[-1])
            u[:, :, :, r1, r2, t, q] = x[..., y, z]


def _at_distances(spectra: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """C[d1, d2] for -A < d < A from sum conj(U) U^T; negative distances stand at the end, where indices find them.

    C[d] = sum_w e^(i w d) conj(U(w)) U(w)^T / period, over the frequencies of a real transform, of which all
    but the first and, at an even period, the last stand for two.
    """
    part = torch.matmul(_waves(columns, True).to(spectra.dtype), spectra)  # (P1, d2, g phi phi)
    return torch.tensordot(_waves(rows, False), part.to(torch.complex128), dims=1).real


@functools.lru_cache(32)
def _waves(axis: Axis, half: bool) -> Tensor:
    """e^(i w d) / period, complex128, shape (d, w); for half of the frequencies, those that stand for two twice."""
    d = torch.cat([torch.arange(axis.reach), torch.arange(1 - axis.reach, 0)])
    w = torch.arange(axis.period // 2 + 1 if half else axis.period)
    angle = (d[:, None] * w % axis.period).double() * (2 * torch.pi / axis.period)
    times = 1 + half * (w * 2 % axis.period != 0)
    return torch.polar((times.double() / axis.period).expand_as(angle), angle)


class _Strips:
    """The first and last A - 1 rows and columns of u, which hold all pairs of pixels whose output position is outside.

    (A pixel is in the image at an output position outside only if (t, q) + a is inside for an a < A.)
    """

    def __init__(self, like: Tensor, images: int, rows: Axis, columns: Axis, groups: int, phi: int):
        self._axes, self._phi = (rows, columns), phi
        self._rows = like.new_empty((2, images, groups, phi, rows.reach - 1, columns.length))
        self._columns = like.new_empty((2, images, groups, phi, columns.reach - 1, rows.length))

    def take(self, first: int, u: Tensor) -> None:
        """Keep the strips of images number ``first`` and following, shape (batch, g, phi, t, q)."""
        rows, columns = self._axes
        images = slice(first, first + len(u))
        for end, (t, q) in enumerate(zip(_ends(rows), _ends(columns), strict=True)):
            self._rows[end, images] = u[..., t, : columns.length]
            self._columns[end, images] = u[..., : rows.length, q].mT

    def outside(self) -> Tensor:
        """Sums over the pairs whose output position is outside, shape (a1, a1', a2, a2', g, phi, phi')."""
        rows, columns = self._axes
        above = self._cut_off(self._rows, rows, columns)[:, :, _distances(columns)]
        beside = self._cut_off(self._columns, columns, rows)[:, :, _distances(rows)].movedim((2, 3), (0, 1))
        return above + beside - self._corners()

    def _cut_off(self, strips: Tensor, axis: Axis, along: Axis) -> Tensor:
        """Shape (a, a', distance along the strip, g, phi, phi')."""
        images = strips.shape[1]
        strips = strips.permute(0, 2, 5, 1, 4, 3).flatten(4).flatten(2, 3)  # (end, g, (place, image), (e, phi))
        last = strips.shape[2]
        pairs = [strips[:, :, : last - d * images].mT @ strips[:, :, d * images :] for d in range(along.reach)]
        pairs += [pair.mT for pair in pairs[:0:-1]]  # (p, p + d) is (p', p' - d) the other way round
        edges = (axis.reach - 1, self._phi)
        pairs = torch.stack(pairs).double().unflatten(-1, edges).unflatten(-3, edges)  # (d, end, g, e, phi, e', phi')
        return _outside(*pairs.permute(1, 3, 5, 0, 2, 4, 6))

    def _corners(self) -> Tensor:
        """Pairs that are cut off along both axes, shape (a1, a1', a2, a2', g, phi, phi')."""
        rows, columns = self._axes
        corners = torch.stack([self._rows[..., q] for q in _ends(columns)], dim=1)  # (end, end, n, g, phi, e1, e2)
        corners = corners.permute(0, 1, 3, 2, 5, 6, 4).flatten(4)
        edges = (rows.reach - 1, columns.reach - 1, self._phi)
        corners = (corners.mT @ corners).double().unflatten(-1, edges).unflatten(-4, edges)
        corners = corners.permute(0, 1, 3, 6, 4, 7, 2, 5, 8)  # (end, end, e1, e1', e2, e2', g, phi, phi')
        corners = torch.stack([_outside(*corners[:, end]) for end in range(2)]).movedim((3, 4), (1, 2))
        return _outside(*corners).movedim((2, 3), (0, 1))


def _ends(axis: Axis) -> tuple[slice, slice]:
    return slice(axis.reach - 1), slice(axis.count, axis.length)


def _outside(start: Tensor, end: Tensor) -> Tensor:
    """Sums along an axis over first pixels before a or after the last output position + a, for each (a, a').

    From those in the first and the last A - 1 places, shape (e, e', ...): sum_{k > 0} start[a - k, a' - k]
    + sum_{k >= 0} end[a + k, a' + k].
    """
    reach = len(start) + 1
    before, after = start.new_zeros((2, reach, reach, *start.shape[2:]))
    for a in range(1, reach):
        before[a, 1:] = before[a - 1, :-1] + start[a - 1]
        after[-a - 1, :-1] = after[-a, 1:] + end[-a]
    return before + after


def _smooth(size: int) -> int:
    """The next length of which Fourier transforms are fast: an even product of 2, 3 and 5."""
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1 and size % 2 == 0:
            return size
        size += 1
