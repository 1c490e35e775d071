"""The Triton kernels of :mod:`tract.gpu_moment`, which alone imports them."""

import triton
import triton.language as tl


@triton.jit
def _block_of(number):
    """(i, j) of a block of the lower triangle, j <= i; they are counted line by line.

    i = floor((sqrt(8 number + 1) - 1) / 2); 3 in place of 1 keeps the root so far from whole numbers that its
    rounding does not matter below 200,000 blocks, n = 40,000.
    """
    i = ((tl.sqrt(8.0 * number + 3.0) - 1.0) * 0.5).to(tl.int32)
    return i, number - i * (i + 1) // 2


@triton.jit
def _tf32(value):
    """The nearest number that tensor cores take whole as tf32: 11 bits, of 24."""
    return ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _rows_under(
    feature, pointer, y, x, is_row, n, size_y, size_x, stride_channel, stride_y, stride_x,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    PADDED: tl.constexpr, ALONG_ROWS: tl.constexpr,
):  # fmt: skip
    """These features of these rows, (B, K): X^T. Neighbouring threads read along the rows, or across them."""
    channel = feature // (KERNEL_Y * KERNEL_X)
    down, right = feature // KERNEL_X % KERNEL_Y * DILATION_Y, feature % KERNEL_X * DILATION_X
    offset = channel.to(tl.int64) * stride_channel + down.to(tl.int64) * stride_y + right.to(tl.int64) * stride_x
    f: tl.constexpr = 0 if ALONG_ROWS else 1  # the axis that features lack, and
    r: tl.constexpr = 1 - f  # the one that rows lack
    there = tl.expand_dims(is_row, r) & tl.expand_dims(feature < n, f)
    if PADDED:
        y, x = tl.expand_dims(y, r) + tl.expand_dims(down, f), tl.expand_dims(x, r) + tl.expand_dims(right, f)
        there = there & (y >= 0) & (y < size_y) & (x >= 0) & (x < size_x)
    values = tl.load(tl.expand_dims(pointer, r) + tl.expand_dims(offset, f), mask=there, other=0.0).to(tl.float32)
    return tl.trans(values) if ALONG_ROWS else values


# What changes with the batch or the image is not specialised on, so that it does not compile anew.
@triton.jit(do_not_specialize=["rows", "rows_of_a_split", "positions", "width", "size_y", "size_x"])
def partial_moments(
    x, partials, rows, rows_of_a_split, positions, width, n, channels, size_y, size_x,
    stride_image, stride_channel, stride_y, stride_x,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr,
    PADDED: tl.constexpr, HALF: tl.constexpr, ALONG_ROWS: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """partials[split, g, block]: B x B numbers of X^T X over one split of the rows, X read straight from the image.

    K rows at a time are multiplied on tensor cores; what they give is added by two-sum to a pair of float32 numbers.
    """
    block, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, j = _block_of(block)
    left, right = i * B + tl.arange(0, B), j * B + tl.arange(0, B)
    x += (group * channels).to(tl.int64) * stride_channel
    total, rest = tl.zeros((B, B), dtype=tl.float32), tl.zeros((B, B), dtype=tl.float32)
    first = split * rows_of_a_split
    for start in range(first, tl.minimum(first + rows_of_a_split, rows), K):
        row = start + tl.arange(0, K)
        image, position = row // positions, row % positions
        top, side = position // width * STEP_Y - PADDING_Y, position % width * STEP_X - PADDING_X
        pointer = x + image.to(tl.int64) * stride_image + top.to(tl.int64) * stride_y + side.to(tl.int64) * stride_x
        a = _rows_under(
            left, pointer, top, side, row < rows, n, size_y, size_x, stride_channel, stride_y, stride_x,
            KERNEL_Y, KERNEL_X, DILATION_Y, DILATION_X, PADDED, ALONG_ROWS,
        )  # fmt: skip
        b = _rows_under(
            right, pointer, top, side, row < rows, n, size_y, size_x, stride_channel, stride_y, stride_x,
            KERNEL_Y, KERNEL_X, DILATION_Y, DILATION_X, PADDED, ALONG_ROWS,
        ).trans()  # fmt: skip
        if HALF:  # fits in tf32
            part = tl.dot(a, b, input_precision="tf32")
        else:
            a_high, b_high = _tf32(a), _tf32(b)
            part = tl.dot(_tf32(a - a_high), b_high, input_precision="tf32")
            part = tl.dot(a_high, _tf32(b - b_high), part, input_precision="tf32")
            part = tl.dot(a_high, b_high, part, input_precision="tf32")
        # two-sum: total + part without rounding is the new total + what is added to the rest
        before, total = total, total + part
        added = total - before
        rest += (before - (total - added)) + (part - added)
    place = ((split * tl.num_programs(2) + group) * tl.num_programs(0) + block).to(tl.int64) * B * B
    inside = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    tl.store(partials + place + inside, total.to(tl.float64) + rest.to(tl.float64))


@triton.jit
def sum_of_partials(partials, moment, splits, n, B: tl.constexpr, SPLITS: tl.constexpr, E: tl.constexpr):
    """moment[g] (n, n) from partials[split, g, block]: E numbers of a block, added in a fixed order, and mirrored."""
    block, part, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    element = part * E + tl.arange(0, E)
    blocks = tl.num_programs(0)
    total = tl.zeros((SPLITS, E), dtype=tl.float64)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        place = ((split * tl.num_programs(2) + group) * blocks + block).to(tl.int64) * B * B
        total += tl.load(partials + place[:, None] + element[None, :], mask=(split < splits)[:, None], other=0.0)
    i, j = _block_of(block)
    row, column = (i * B + element // B).to(tl.int64), (j * B + element % B).to(tl.int64)
    values, lower = tl.sum(total, axis=0), (row < n) & (column <= row)
    moment += group.to(tl.int64) * n * n
    tl.store(moment + row * n + column, values, mask=lower)
    tl.store(moment + column * n + row, values, mask=lower)
