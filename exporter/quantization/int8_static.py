"""Quantizes weights to 8 bits per channel and fixes the scales of their activations.

The emitters in `graph/emitters/int8_static.py` write the same computation as operators.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_edge.exporter.quantization.blocks import quantize_channels
from llm_edge.exporter.quantization.hadamard import hadamard_matrix
from llm_edge.exporter.quantization.hessian import Hessian

EPSILON = 1e-12  # added to the mean square of a token's inputs
_SMOOTHING = 0.5  # power of a channel's root mean square that moves from activations into weights
_CLIP_FRACTIONS = tuple(2 ** (-step / 8) for step in range(17))  # of the largest activation, tried as clipping range
_MAX_COLUMNS = 2048  # with a Hessian of their own, which is quickly factorized; a multiple of all Hadamard blocks
_HEADROOM = 2.0  # of 16-bit activations, relative to the largest activation of the calibration text


@dataclass(frozen=True, slots=True)
class QuantizedInt8:
    """A projection with quantized activations: `y = norm * scale * sum_t (q_t - 128) 256^t W^T`.

    Attributes:
        data: int8 [N, K], for inputs as `_prepare` returns them.
        scales: float32 [N].
        activation_scale: scale of the (lower) 8 bits of an activation.
        smooth: divisors of the channels, float32 [K]; None if activations are not normalized.
        hadamard_block: see `Int8Static`.
        activation_bits: 8 or 16.
    """

    data: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    activation_scale: float
    smooth: npt.NDArray[np.float32] | None
    hadamard_block: int
    activation_bits: int

    def with_activation_bits(self, bits: int, samples: Tensor) -> QuantizedInt8:
        """Return the projection with activations of 8 or 16 bits, in the range of samples [rows, K]."""
        prepared, _ = _prepare(samples, self._smooth, _hadamard(samples.shape[1], self.hadamard_block))
        return dataclasses.replace(self, activation_scale=_activation_scale(prepared, bits), activation_bits=bits)

    @property
    def _smooth(self) -> Tensor | None:
        return None if self.smooth is None else torch.from_numpy(self.smooth)

    def factors(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs [rows, K] and weight [N, K] with the rounding of the graph, in the basis of the model."""
        hadamard = _hadamard(inputs.shape[1], self.hadamard_block)
        prepared, norms = _prepare(inputs, self._smooth, hadamard)
        rounded = _round(prepared, self.activation_scale, self.activation_bits)
        weight = torch.from_numpy(self.data).float() * torch.from_numpy(self.scales)[:, None]
        if hadamard is not None:
            rounded, weight = (_multiply_blocks(each, hadamard.T) for each in (rounded, weight))
        if self._smooth is not None:
            rounded, weight = rounded * norms * self._smooth, weight / self._smooth
        return rounded, weight


def quantize_int8(weight: Tensor, hadamard_block: int, hessian: Hessian, samples: Tensor) -> QuantizedInt8:
    """Quantize the weight [N, K] of a projection and fix the scale of its 8-bit inputs; see `Int8Static`.

    `hessian` is that of the inputs, `samples` are some of them, float32 [samples, K].
    """
    smooth = None
    hadamard = _hadamard(weight.shape[1], hadamard_block)
    hessians = [hessian] if hadamard is None else hessian.parts(_MAX_COLUMNS)
    if hadamard_block:
        power = hessian.diagonal.clamp(min=0).sqrt()
        smooth = power.clamp(min=power.mean() * 1e-4 + 1e-12) ** _SMOOTHING
        smooth = smooth / smooth.mean()
        weight = weight * smooth
        divisors = torch.split(smooth, len(hessians[0].matrix))
        hessians = [
            Hessian(part.matrix / (each[:, None] * each)) for part, each in zip(hessians, divisors, strict=True)
        ]
    if hadamard is not None:
        weight = _multiply_blocks(weight, hadamard)
        hessians = [Hessian(_multiply_blocks(_multiply_blocks(part.matrix, hadamard).T, hadamard)) for part in hessians]
    prepared, _ = _prepare(samples, smooth, hadamard)
    data, scales = quantize_channels(weight, hessians)
    return QuantizedInt8(
        data=data,
        scales=scales,
        activation_scale=_activation_scale(prepared, 8),
        smooth=None if smooth is None else smooth.numpy(),
        hadamard_block=hadamard_block,
        activation_bits=8,
    )


def _prepare(inputs: Tensor, smooth: Tensor | None, hadamard: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the inputs as they are quantized, and the factor of each row's product, [rows, 1]."""
    if smooth is None:
        return inputs, torch.ones(1, 1)
    norms = (inputs.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    prepared = inputs / norms / smooth
    return prepared if hadamard is None else _multiply_blocks(prepared, hadamard), norms


def _hadamard(width: int, block: int) -> Tensor | None:
    """Return the matrix [b, b] that multiplies blocks of channels; None if there is none."""
    return hadamard_matrix(width, block) if block > 1 else None


def _multiply_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    return (x.reshape(-1, len(matrix)) @ matrix).reshape(x.shape)


def _round(prepared: Tensor, scale: float, bits: int) -> Tensor:
    """Quantize and dequantize activations; of 16 bits, the low byte holds the remainder of the high byte."""
    high = 0.0 if bits == 8 else (prepared / (256 * scale)).round().clamp(-128, 127) * (256 * scale)
    return high + ((prepared - high) / scale).round().clamp(-128, 127) * scale


def _activation_scale(prepared: Tensor, bits: int) -> float:
    """Return the 8-bit scale with the least error, or the 16-bit scale with headroom for larger activations."""
    largest = max(prepared.abs().max().item(), 1e-6)
    if bits == 16:
        return largest * _HEADROOM / 32767
    errors = {}
    error = torch.empty_like(prepared)  # reused: allocating it each time would dominate the run time
    for fraction in _CLIP_FRACTIONS:
        scale = largest * fraction / 127
        torch.div(prepared, scale, out=error).round_().clamp_(-128, 127).mul_(scale).sub_(prepared).square_()
        errors[scale] = error.mean().item()
    return min(errors, key=errors.__getitem__)
