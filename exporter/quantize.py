"""Rounding of a weight into blocks of whole numbers. Knows nothing of graphs, recipes or checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_edge.exporter.recipes import Blocks


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

    The layout is that of onnxruntime's operator documentation (com.microsoft.MatMulNBits).
    """
    rows, width = weight.shape
    blocks = form.count(width)
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
