"""Quantizes weights to integers in blocks along the input axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_edge.exporter.quantization.gptq import gptq
from llm_edge.exporter.quantization.hessian import Hessian
from llm_edge.runtime.errors import CheckpointError

_CHUNK_ELEMENTS = 1 << 24  # quantized at a time: 64 MiB in float32
_CACHED_ELEMENTS = 1 << 18  # whose scales are searched at a time: 1 MiB in float32
_RANGE_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # tried as the clipping range of a block


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Integer blocks along the input axis of a weight.

    Attributes:
        bits: 4 or 8 per weight.
        size: weights per block, a power of two of at least 16.
        symmetric: zero is in the middle of the range; otherwise each block has a zero point.
    """

    bits: int
    size: int
    symmetric: bool

    def num_blocks(self, width: int) -> int:
        """Return the number of blocks in a row of `width` weights; the last one may be padded."""
        return -(-width // self.size)


@dataclass(frozen=True, slots=True)
class QuantizedBlocks:
    """A weight [N, K] in the layout of MatMulNBits.

    Attributes:
        data: uint8 [N, K / block, block * bits / 8]; of two 4-bit weights in a byte, the first is the low half.
        scales: float32 [N, K / block].
        zero_points: uint8 [N, ceil(K / block * bits / 8)], packed like `data`; None for symmetric blocks, whose zero
            is 2 ** (bits - 1).
        bits: 4 or 8 per weight.
    """

    data: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None
    bits: int

    def levels(self) -> npt.NDArray[np.uint8]:
        """Return the integers of all weights, [N, K] with K padded to whole blocks."""
        return _unpack(self.data, self.bits).reshape(len(self.data), -1)

    def zeros(self) -> npt.NDArray[np.uint8]:
        """Return the zero points of all blocks, [N, K / block]."""
        if self.zero_points is None:
            return np.full(self.scales.shape, 1 << (self.bits - 1), dtype=np.uint8)
        return _unpack(self.zero_points, self.bits)[:, : self.scales.shape[1]]

    def dequantized(self, width: int) -> Tensor:
        """Return the quantized weight as float32 [N, width]."""
        levels = torch.from_numpy(self.levels().astype(np.float32)).view(*self.scales.shape, -1)
        zeros = torch.from_numpy(self.zeros().astype(np.float32))
        blocks = (levels - zeros[..., None]) * torch.from_numpy(self.scales)[..., None]
        return blocks.flatten(1)[:, :width]

    def with_levels(self, levels: Tensor) -> QuantizedBlocks:
        """Return the same blocks with other integers [N, K], given as floating-point numbers."""
        zeros = torch.from_numpy(self.zeros()).float()
        padding = self.levels().shape[1] - levels.shape[1]
        padded = torch.cat([levels, zeros[:, -1:].expand(-1, padding)], 1)
        return replace(self, data=pack(padded.view(*self.scales.shape, -1).byte(), self.bits))

    def rows(self, numbers: Tensor) -> QuantizedBlocks:
        """Return rows of the weight by number, int64."""
        index = numbers.numpy()
        zero_points = None if self.zero_points is None else self.zero_points[index]
        return replace(self, data=self.data[index], scales=self.scales[index], zero_points=zero_points)

    def factors(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs [rows, K] rounded to 8 bits block by block, and the quantized weight."""
        size = self.data.shape[2] * 8 // self.bits
        return round_inputs(inputs, size), self.dequantized(inputs.shape[1])


def round_inputs(inputs: Tensor, size: int) -> Tensor:
    """Return inputs [rows, K] rounded to 8 bits in blocks of a size, as MatMulNBits rounds them."""
    width = inputs.shape[1]
    padded = torch.nn.functional.pad(inputs, (0, -width % size)).view(len(inputs), -1, size)
    scales = padded.abs().amax(-1, keepdim=True).div_(127).clamp_(min=1e-30)
    return (padded / scales).round_().mul_(scales).view(len(inputs), -1)[:, :width]


def quantize_blocks(weight: Tensor, layout: BlockLayout, hessian: Hessian | None = None) -> QuantizedBlocks:
    """Quantize a weight [N, K] block by block; the last block of a row is padded with zeros.

    Without a Hessian, rows are quantized a few at a time, so that memory holds little more than the weight in its own
    dtype and the result.

    Args:
        weight: of any floating-point dtype.
        layout: of the blocks.
        hessian: of the inputs, for GPTQ (see `gptq`); None rounds each weight to the nearest level.

    Raises:
        CheckpointError: the weight or the Hessian holds NaN or infinity.
    """
    if hessian is not None:
        return _gptq_blocks(_check_weight(weight).float(), layout, _check_hessian(hessian))
    rows = max(_CHUNK_ELEMENTS // max(weight.shape[1], 1), 1)
    return concatenate([_round_to_nearest(part, layout) for part in torch.split(weight, rows)])


def concatenate(parts: Sequence[QuantizedBlocks]) -> QuantizedBlocks:
    """Return a weight from its rows, in parts of the same layout."""
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return QuantizedBlocks(
        data=np.concatenate([part.data for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zero_points=np.concatenate(zero_points) if zero_points else None,
        bits=parts[0].bits,
    )


def quantize_channels(
    weight: Tensor, hessians: Sequence[Hessian]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantize a weight [N, K] to 8 bits with GPTQ and one scale per row: int8 [N, K] and scales, float32 [N].

    `hessians` are those of its columns, in parts.

    Raises:
        CheckpointError: the weight or a Hessian holds NaN or infinity.
    """
    weight, hessians = _check_weight(weight).float(), [_check_hessian(hessian) for hessian in hessians]
    width = weight.shape[1]
    layout = BlockLayout(8, width, symmetric=True)
    scales, zeros = _search_scales(weight[:, None], layout, torch.cat([each.diagonal for each in hessians])[None])
    parts = torch.split(weight, [len(hessian.matrix) for hessian in hessians], 1)
    levels = torch.cat([gptq(*pair, scales, zeros, width, 255) for pair in zip(parts, hessians, strict=True)], 1)
    signed = (levels - 128).clamp(-127, 127).to(torch.int8)  # the kernels take signed 8-bit weights
    return signed.numpy(), scales[:, 0].numpy()


def _check_weight(weight: Tensor) -> Tensor:
    if not weight.isfinite().all():
        raise CheckpointError("a weight is NaN or infinity: the checkpoint is damaged")
    return weight


def _check_hessian(hessian: Hessian) -> Hessian:
    if not hessian.matrix.isfinite().all():
        raise CheckpointError(
            "its inputs are NaN or infinity on the calibration text: weights before it are damaged, or they overflow"
        )
    return hessian


def _to_blocks(weight: Tensor, layout: BlockLayout) -> Tensor:
    """Reshape a float32 weight [N, K] to [N, K / block, block]."""
    rows, width = weight.shape
    blocks = layout.num_blocks(width)
    return torch.nn.functional.pad(weight, (0, blocks * layout.size - width)).view(rows, blocks, layout.size)


def _round_to_nearest(weight: Tensor, layout: BlockLayout) -> QuantizedBlocks:
    blocks = _to_blocks(_check_weight(weight).float(), layout)
    scales, zeros = _scales_for(_ranges(blocks, layout), layout, 1.0)
    return _pack_blocks(_levels(blocks, scales, zeros, layout), scales, zeros, layout)


def _gptq_blocks(weight: Tensor, layout: BlockLayout, hessian: Hessian) -> QuantizedBlocks:
    importance = _to_blocks(hessian.diagonal[None], layout)[0]
    scales, zeros = _search_scales(_to_blocks(weight, layout), layout, importance)
    levels = gptq(weight, hessian, scales, zeros, layout.size, 2**layout.bits - 1)
    padding = layout.num_blocks(weight.shape[1]) * layout.size - weight.shape[1]
    if padding:
        levels = torch.cat([levels, zeros[:, -1:].expand(-1, padding)], 1)
    return _pack_blocks(levels.view(*scales.shape, layout.size), scales, zeros, layout)


def _ranges(blocks: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest number [N, K / block] that each block has to represent; 0 is in between."""
    if layout.symmetric:
        largest = blocks.abs().amax(-1)
        return -largest, largest
    return blocks.amin(-1).clamp_(max=0), blocks.amax(-1).clamp_(min=0)


def _scales_for(ranges: tuple[Tensor, Tensor], layout: BlockLayout, fraction: float) -> tuple[Tensor, Tensor]:
    """Return scales and zero points [N, K / block] that cover a fraction of the range of each block."""
    low, high = (bound * fraction for bound in ranges)
    middle, max_level = 2 ** (layout.bits - 1), 2**layout.bits - 1
    if layout.symmetric:
        return high / (middle - 1), torch.full_like(high, middle)
    scales = (high - low) / max_level
    return scales, (-low / scales.where(scales > 0, 1.0)).round_().clamp_(max=max_level)


def _levels(blocks: Tensor, scales: Tensor, zeros: Tensor, layout: BlockLayout) -> Tensor:
    divisors = scales.where(scales > 0, 1.0)  # keeps blocks of zeros at zero
    return (blocks / divisors[..., None]).round_().add_(zeros[..., None]).clamp_(0, 2**layout.bits - 1)


def _search_scales(blocks: Tensor, layout: BlockLayout, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points with the least error, weighted by `importance` [K / block, block]."""
    importance = importance.clamp(min=importance.mean() * 1e-6 + 1e-30)  # no column counts nothing
    rows = max(_CACHED_ELEMENTS // importance.numel(), 1)
    parts = torch.split(blocks, rows)
    found = [_search_rows(part, layout, importance) for part in parts]
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


def _search_rows(blocks: Tensor, layout: BlockLayout, importance: Tensor) -> tuple[Tensor, Tensor]:
    ranges = _ranges(blocks, layout)
    scales, zeros = _scales_for(ranges, layout, 1.0)
    best_error = torch.full_like(scales, torch.inf)
    for fraction in _RANGE_FRACTIONS:
        scale, zero = _scales_for(ranges, layout, fraction)
        rounded = _levels(blocks, scale, zero, layout).sub_(zero[..., None]).mul_(scale[..., None])
        error = rounded.sub_(blocks).square_().mul_(importance).sum(-1)
        better = error < best_error
        scales, zeros = scale.where(better, scales), zero.where(better, zeros)
        best_error = error.where(better, best_error)
    return scales, zeros


def _pack_blocks(levels: Tensor, scales: Tensor, zeros: Tensor, layout: BlockLayout) -> QuantizedBlocks:
    return QuantizedBlocks(
        data=pack(levels.byte(), layout.bits),
        scales=scales.numpy(),
        zero_points=None if layout.symmetric else pack(zeros.byte(), layout.bits),
        bits=layout.bits,
    )


def pack(values: Tensor, bits: int) -> npt.NDArray[np.uint8]:
    """Pack two 4-bit numbers per byte along the last axis, padded with zero; return 8-bit numbers unchanged."""
    if bits == 4:
        if values.shape[-1] % 2:
            values = torch.nn.functional.pad(values, (0, 1))
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    return values.contiguous().numpy()


def _unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Reverse `pack`; the padding of an odd row is kept."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
