"""Rounding of a weight into blocks of whole numbers. Knows nothing of graphs, recipes or checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_edge.exporter.recipes import Blocks
from llm_edge.runtime.errors import CheckpointError

_ELEMENTS = 1 << 24  # rounded at a time: 64 MiB as float32


@dataclass(frozen=True, slots=True)
class QuantizedBlocks:
    """A weight [N, K] in the layout of MatMulNBits.

    Attributes:
        data: uint8 [N, K / block, block * bits / 8]; of two 4-bit weights a byte, the first is the low half.
        scales: float32 [N, K / block].
        zero_points: uint8 [N, ceil(K / block * bits / 8)], packed like `data`; None for symmetric blocks,
            whose zero is 2 ** (bits - 1).
        bits: 4 or 8 a weight.
    """

    data: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None
    bits: int

    def levels(self) -> npt.NDArray[np.uint8]:
        """Whole numbers of all weights, [N, K] with K filled up to whole blocks."""
        return _unpack(self.data, self.bits).reshape(len(self.data), -1)

    def zeros(self) -> npt.NDArray[np.uint8]:
        """Zero points of all blocks, [N, K / block]."""
        if self.zero_points is None:
            return np.full(self.scales.shape, 1 << (self.bits - 1), dtype=np.uint8)
        return _unpack(self.zero_points, self.bits)[:, : self.scales.shape[1]]


def quantize_blocks(weight: Tensor, form: Blocks) -> QuantizedBlocks:
    """Round a weight [N, K] to nearest, block by block; the last block of a row is filled up with zeros.

    The layout is that of onnxruntime's operator documentation (com.microsoft.MatMulNBits). Rows are rounded a few at a
    time, so that memory holds little more than the weight in its own type and the result.
    """
    rows = max(_ELEMENTS // max(weight.shape[1], 1), 1)
    parts = [_quantize_rows(weight[start : start + rows], form) for start in range(0, len(weight), rows)]
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return QuantizedBlocks(
        data=np.concatenate([part.data for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zero_points=np.concatenate(zero_points) if zero_points else None,
        bits=form.bits,
    )


def _quantize_rows(weight: Tensor, form: Blocks) -> QuantizedBlocks:
    rows, width = weight.shape
    blocks = form.count(width)
    if not weight.isfinite().all():
        raise CheckpointError("a weight holds numbers that are none (NaN, infinity): the checkpoint is damaged")
    padded = torch.nn.functional.pad(weight.float(), (0, blocks * form.size - width))
    grouped = padded.view(rows, blocks, form.size)
    middle, levels = 2 ** (form.bits - 1), 2**form.bits - 1
    if form.symmetric:
        scales = grouped.abs().amax(-1) / (middle - 1)
        zero_points = torch.full_like(scales, middle)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = (high - low) / levels
        zero_points = (-low / scales.where(scales > 0, 1.0)).round()
    divisors = scales.where(scales > 0, 1.0)  # a block of zeros stays one
    levels_of = ((grouped / divisors[..., None]).round() + zero_points[..., None]).clamp(0, levels)
    return QuantizedBlocks(
        data=_pack(levels_of.byte(), form.bits),
        scales=scales.numpy(),
        zero_points=None if form.symmetric else _pack(zero_points.byte(), form.bits),
        bits=form.bits,
    )


def _pack(values: Tensor, bits: int) -> npt.NDArray[np.uint8]:
    """Two 4-bit numbers a byte along the last axis, an odd one filled up with zero; 8-bit ones as they are."""
    if bits == 4:
        if values.shape[-1] % 2:
            values = torch.nn.functional.pad(values, (0, 1))
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    return values.contiguous().numpy()


def _unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """The reverse of `_pack`; a number that filled up an odd row stays."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
