"""Packed integers, small floats and scales: the arithmetic that several quantized formats share."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of FP4 (E2M1) by code."""

_CHUNK = 1 << 22  # numbers scaled at a time, which bounds the memory of expanded scales
Shape = tuple[int, ...]


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the unsigned numbers of 1 to 8 bits that fill the words of each row without gaps, lowest bits first.

    Args:
        words: int32 or uint8 [R, W].
        bits: of a number.
        count: numbers of a row; the rest of its last words is padding.

    Returns:
        uint8 [R, count].
    """
    data = words.contiguous().numpy().view(np.uint8)
    if 8 % bits == 0:
        parts = data[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8)
        numbers = parts.reshape(len(data), -1)[:, :count] & np.uint8((1 << bits) - 1)
    else:
        single = np.unpackbits(data, axis=1, count=count * bits, bitorder="little").reshape(len(data), count, bits)
        numbers = np.packbits(single, axis=2, bitorder="little")[:, :, 0]
    return torch.from_numpy(np.ascontiguousarray(numbers))


def float4(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the FP4 values of bytes [..., B], two in each, the low half first: [..., 2 * B]."""
    pairs = torch.tensor([[FLOAT4[byte & 15], FLOAT4[byte >> 4]] for byte in range(256)], dtype=dtype)
    return pairs[packed.int()].flatten(-2)


def exponents(scales: Tensor) -> Tensor:
    """Return scales as float32; bytes are E8M0, powers of two with a bias of 127."""
    if scales.dtype is not torch.uint8:
        return scales.float()
    return torch.ldexp(torch.ones(scales.shape), scales.int() - 127)


def tile_shape(shape: Shape, scale: Shape, block: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Return rows and columns of the part of a matrix [N, K] to which one of its scales applies.

    Args:
        shape: of the matrix.
        scale: shape of its scales: one, one per row, several per row, or one per block.
        block: rows and columns of a block, which may be cut off at the end of the matrix.

    Returns:
        None if the scales do not fit the matrix.
    """
    rows, width = shape
    if math.prod(scale) == 1:
        return rows, width
    if scale in ((rows,), (rows, 1)):
        return 1, width
    if block is not None and scale == (-(-rows // block[0]), -(-width // block[1])):
        return block
    if len(scale) == 2 and scale[0] == rows and scale[1] > 0 and width % scale[1] == 0:
        return 1, width // scale[1]
    return None


def scale_tiles(numbers: Tensor, scales: Tensor, tile: tuple[int, int], zeros: Tensor | None = None) -> Tensor:
    """Return (numbers - zeros) * scales in float32 for a matrix [N, K] whose scales apply to tiles."""
    rows, width = numbers.shape
    grid = -(-rows // tile[0]), -(-width // tile[1])
    scales = scales.float().reshape(grid)
    zeros = None if zeros is None else zeros.float().reshape(grid)
    result = torch.empty(rows, width)
    step, count = max(_CHUNK // max(width, 1), 1), width // tile[1]
    for start in range(0, rows, step):
        part = result[start : start + step].copy_(numbers[start : start + step])
        of_rows = torch.arange(start, start + len(part)) // tile[0]
        whole, rest = part[:, : count * tile[1]].view(len(part), count, tile[1]), part[:, None, count * tile[1] :]
        for columns, tiles in ((whole, slice(count)), (rest, slice(count, count + 1))):
            if columns.shape[2] == 0:  # the last tile is not cut off
                continue
            if zeros is not None:
                columns -= zeros[of_rows, tiles, None]
            columns *= scales[of_rows, tiles, None]
    return result


def scale_groups(numbers: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor) -> Tensor:
    """Return (numbers - zeros) * scales in float32 for a matrix [N, K] whose columns belong to groups [K].

    `scales` and `zeros` are [N, G].
    """
    rows, width = numbers.shape
    result = torch.empty(rows, width)
    step = max(_CHUNK // max(width, 1), 1)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        part = numbers[chunk].float()
        if zeros is not None:
            part -= zeros[chunk].float()[:, groups]
        result[chunk] = part.mul_(scales[chunk].float()[:, groups])
    return result
