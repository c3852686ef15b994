"""Rounding of a weight into blocks of whole numbers. Knows nothing of graphs, recipes or checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_edge.exporter.quantization.gptq import compensated
from llm_edge.exporter.quantization.recipes import Blocks
from llm_edge.runtime.errors import CheckpointError

_ELEMENTS = 1 << 24  # rounded at a time: 64 MiB as float32
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a block's range that are tried for the least error


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

    def dequantized(self, width: int) -> Tensor:
        """The weight [N, K] as it was rounded, float32."""
        steps = torch.from_numpy(self.levels().astype(np.float32)).view(*self.scales.shape, -1)
        zeros = torch.from_numpy(self.zeros().astype(np.float32))
        whole = (steps - zeros[..., None]) * torch.from_numpy(self.scales)[..., None]
        return whole.flatten(1)[:, :width]


def quantize_blocks(weight: Tensor, form: Blocks, hessian: Tensor | None = None) -> QuantizedBlocks:
    """Round a weight [N, K], block by block; the last block of a row is filled up with zeros.

    The layout is that of onnxruntime's operator documentation (com.microsoft.MatMulNBits). Without a Hessian [K, K]
    of the inputs (see `gptq.compensated`) each weight goes to its nearest level; rows are then rounded a few at a
    time, so that memory holds little more than the weight in its own type and the result.
    """
    if hessian is not None:
        return _compensated_blocks(_finite(weight).float(), form, _seen(hessian))
    rows = max(_ELEMENTS // max(weight.shape[1], 1), 1)
    parts = [_quantize_rows(weight[start : start + rows], form) for start in range(0, len(weight), rows)]
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return QuantizedBlocks(
        data=np.concatenate([part.data for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zero_points=np.concatenate(zero_points) if zero_points else None,
        bits=form.bits,
    )


def quantize_channels(weight: Tensor, hessian: Tensor) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round a weight [N, K] to 8 bits with one scale a row, errors compensated; int8 [N, K] and float32 [N]."""
    weight, hessian = _finite(weight).float(), _seen(hessian)
    width = weight.shape[1]
    scales, zeros = _fitted(weight[:, None], Blocks(8, width, symmetric=True), hessian.diagonal()[None])
    levels = compensated(weight, hessian, scales, zeros, width, 255)
    signed = (levels - 128).clamp(-127, 127).to(torch.int8)  # the integer kernels take 8 bits with a sign
    return signed.numpy(), scales[:, 0].numpy()


def _finite(weight: Tensor) -> Tensor:
    if not weight.isfinite().all():
        raise CheckpointError("a weight holds numbers that are none (NaN, infinity): the checkpoint is damaged")
    return weight


def _seen(hessian: Tensor) -> Tensor:
    if not hessian.isfinite().all():
        raise CheckpointError("its inputs are not numbers on a text: weights before it are damaged, or they overflow")
    return hessian


def _grouped(weight: Tensor, form: Blocks) -> Tensor:
    """Blocks of a float32 weight, [N, K / block, block]."""
    rows, width = weight.shape
    blocks = form.count(width)
    return torch.nn.functional.pad(weight, (0, blocks * form.size - width)).view(rows, blocks, form.size)


def _quantize_rows(weight: Tensor, form: Blocks) -> QuantizedBlocks:
    grouped = _grouped(_finite(weight).float(), form)
    scales, zeros = _scaled(grouped, form, 1.0)
    levels = _levels(grouped, scales, zeros, form)
    return _stored(levels, scales, zeros, form)


def _compensated_blocks(weight: Tensor, form: Blocks, hessian: Tensor) -> QuantizedBlocks:
    importance = _grouped(hessian.diagonal()[None], form)[0]
    scales, zeros = _fitted(_grouped(weight, form), form, importance)
    levels = compensated(weight, hessian, scales, zeros, form.size, 2**form.bits - 1)
    padding = form.count(weight.shape[1]) * form.size - weight.shape[1]
    if padding:
        levels = torch.cat([levels, zeros[:, -1:].expand(-1, padding)], 1)
    return _stored(levels.view(*scales.shape, form.size), scales, zeros, form)


def _scaled(grouped: Tensor, form: Blocks, share: float) -> tuple[Tensor, Tensor]:
    """Scales and zero points [N, K / block] that span a share of each block's range."""
    middle, most = 2 ** (form.bits - 1), 2**form.bits - 1
    if form.symmetric:
        scales = grouped.abs().amax(-1) * share / (middle - 1)
        return scales, torch.full_like(scales, middle)
    low, high = grouped.amin(-1).clamp(max=0) * share, grouped.amax(-1).clamp(min=0) * share
    scales = (high - low) / most
    return scales, (-low / scales.where(scales > 0, 1.0)).round().clamp(max=most)


def _levels(grouped: Tensor, scales: Tensor, zeros: Tensor, form: Blocks) -> Tensor:
    divisors = scales.where(scales > 0, 1.0)  # a block of zeros stays one
    return ((grouped / divisors[..., None]).round() + zeros[..., None]).clamp(0, 2**form.bits - 1)


def _fitted(grouped: Tensor, form: Blocks, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points that leave the least error; `importance` [K / block, block] weighs the columns."""
    importance = importance.clamp(min=importance.mean() * 1e-6 + 1e-30)  # no weight is worth nothing
    scales, zeros = _scaled(grouped, form, 1.0)
    least = torch.full_like(scales, torch.inf)
    for share in _SHARES:
        found, middle = _scaled(grouped, form, share)
        rounded = (_levels(grouped, found, middle, form) - middle[..., None]) * found[..., None]
        error = ((rounded - grouped).square() * importance).sum(-1)
        better = error < least
        scales, zeros, least = found.where(better, scales), middle.where(better, zeros), error.where(better, least)
    return scales, zeros


def _stored(levels: Tensor, scales: Tensor, zeros: Tensor, form: Blocks) -> QuantizedBlocks:
    return QuantizedBlocks(
        data=_pack(levels.byte(), form.bits),
        scales=scales.numpy(),
        zero_points=None if form.symmetric else _pack(zeros.byte(), form.bits),
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
