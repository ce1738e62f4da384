"""Per-sample gradient tiles of weights that are shared over positions, on any device, by ATen alone.

A tile is the slice `rows` of a weight's first dimension: G [N, rows, ...], with N = n c kernel rows (index
i c + j). Tiles of several uses of one parameter may be summed before they go to `jacobian_accumulate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

__all__ = ["CONV_CHANNELS", "TILE_BYTES", "conv_tile", "conv_tiles", "token_tile", "token_tiles"]

# Small enough to stay in the last-level cache between its making and its use, large enough that the
# calls do not count.
TILE_BYTES = 8 << 20


# What the CPU's grouped weight-gradient convolution wants the output channels of a group to be a multiple of: at
# 16 input channels and more, other numbers take 4 times as long, and less than this many up to 30 times.
CONV_CHANNELS = 8


def _rows_per_tile(bytes_per_row: int, tile_bytes: int) -> int:
    return max(1, tile_bytes // max(1, bytes_per_row))


def token_tile(a: Tensor, b: Tensor, rows: slice, scale: float = 1.0) -> Tensor:
    """Per-sample gradients of the weight rows of a Linear layer over T positions: scale sum_t b_t a_t^T.

    Args:
        a: layer input [n, T, in].
        b: d output_j / d (layer output) [n, c, T, out].
        rows: slice (with start and stop) of the weight's first dimension.
        scale: factor of the tile.

    Returns:
        [n c, rows, in], contiguous. 2 n c T rows in FLOP.
    """
    n, c, positions, _ = b.shape
    count = rows.stop - rows.start
    # The outputs of one sample share its input: they are rows of the same product.
    left = b[..., rows].transpose(2, 3).reshape(n, c * count, positions)  # [n, c rows, T]
    tile = torch.bmm(left, a)  # [n, c rows, in]
    if scale != 1.0:
        tile.mul_(scale)
    return tile.view(n * c, count, a.shape[2])


def token_tiles(
    a: Tensor, b: Tensor, scale: float = 1.0, tile_bytes: int = TILE_BYTES
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, `token_tile`) over the whole weight; a tile takes at most `tile_bytes`, or one row."""
    n, c, _, width = b.shape
    step = _rows_per_tile(n * c * a.shape[2] * b.element_size(), tile_bytes)
    for first in range(0, width, step):
        rows = slice(first, min(width, first + step))
        yield rows, token_tile(a, b, rows, scale)


def conv_tile(
    input: Tensor,
    b: Tensor,
    rows: slice,
    scale: float = 1.0,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """Per-sample gradients of the output channels `rows` of a convolution over maps of two or three dimensions.

    One grouped weight-gradient convolution in which every sample is a group of its own: on the CPU this runs
    near peak, where unfolding the input runs at a third of it.

    Args:
        input: layer input [n, C, ...].
        b: d output_j / d (layer output) [n, c, O, ...].
        rows: slice (with start and stop) of the O output channels.
        scale: factor of the tile.
        kernel_size: taps of the weight [O, C / groups, *kernel_size] in each dimension.
        stride: as in `torch.nn.functional.conv2d`, one number for each dimension; ones when None.
        padding: as there, zeros.
        dilation: as there; ones when None.
        groups: as there.

    Returns:
        [n c, rows, C / groups, *kernel_size], contiguous. 2 n c rows (C / groups) FLOP for each tap and position.
    """
    ones = [1] * len(kernel_size)
    stride, dilation = stride or ones, dilation or ones
    padding = padding or [0] * len(kernel_size)
    n, c, channels_out = b.shape[:3]
    if c > 1:  # one output at a time: a fifth faster than all of them as channels of one convolution
        geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
        parts = [conv_tile(input, b[:, j : j + 1], rows, scale, groups=groups, **geometry) for j in range(c)]
        return torch.stack(parts, 1).flatten(0, 1)
    per_group = channels_out // groups
    first, last = rows.start // per_group, (rows.stop - 1) // per_group
    if first != last and (rows.start % per_group or rows.stop % per_group):
        cuts = [rows.start, *range((first + 1) * per_group, rows.stop, per_group), rows.stop]
        parts = [
            conv_tile(
                input, b, slice(start, stop), scale, kernel_size=kernel_size, stride=stride, padding=padding,
                dilation=dilation, groups=groups,
            )
            for start, stop in pairwise(cuts)
        ]  # fmt: skip
        return torch.cat(parts, 1)

    used = last - first + 1  # whole groups, or a part of one
    depth = input.shape[1] // groups
    count = rows.stop - rows.start
    source = input[:, first * depth : (last + 1) * depth]  # [n, used depth, H, W]
    source = source.reshape(1, n * used * depth, *input.shape[2:])
    # Channels of group (i, g) are its c outputs: [n, used, c, count / used, Ho, Wo]
    sensitivity = b[:, :, rows].unflatten(2, (used, count // used)).transpose(1, 2)
    sensitivity = sensitivity.reshape(1, n * c * count, *b.shape[3:])
    weight = b.new_empty(1).expand(n * c * count, depth, *kernel_size)  # only its shape is read
    tile = torch.ops.aten.convolution_backward(
        sensitivity, source, weight, None, stride, padding, dilation, False, [0] * len(stride), n * used,
        [False, True, False],
    )[1]  # fmt: skip
    if scale != 1.0:
        tile.mul_(scale)
    tile = tile.view(n, used, c, count // used, depth, *kernel_size).transpose(1, 2)
    return tile.reshape(n * c, count, depth, *kernel_size)


def conv_tiles(
    input: Tensor,
    b: Tensor,
    scale: float = 1.0,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
    tile_bytes: int = TILE_BYTES,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, `conv_tile`) over the weight; a tile takes at most `tile_bytes`, or is one channel."""
    n, c, channels_out = b.shape[:3]
    per_group = channels_out // groups
    row_bytes = n * c * (input.shape[1] // groups) * prod(kernel_size) * b.element_size()
    step = _rows_per_tile(row_bytes, tile_bytes)
    if step >= per_group:  # whole groups at a time
        step -= step % per_group
    elif step > CONV_CHANNELS:
        step -= step % CONV_CHANNELS
    first = 0
    while first < channels_out:
        stop = min(channels_out, first + step)
        if step < per_group:  # a tile smaller than a group stays inside it
            stop = min(stop, (first // per_group + 1) * per_group)
        rows = slice(first, stop)
        yield (
            rows,
            conv_tile(
                input, b, rows, scale, kernel_size=kernel_size, stride=stride, padding=padding,
                dilation=dilation, groups=groups,
            ),
        )  # fmt: skip
        first = stop
