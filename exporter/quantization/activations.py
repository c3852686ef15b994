"""8-bit activations of a fixed scale: how an input is made ready for `recipes.Integer`, and what weights it then meets.

Knows nothing of graphs; `integer_forms.py` writes the same steps as operators.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_edge.exporter.quantization.blocks import quantize_channels
from llm_edge.exporter.quantization.hadamard import hadamard_block
from llm_edge.exporter.quantization.recipes import Integer

EPSILON = 1e-12  # of the root mean square of a token's input
_SMOOTHING = 0.5  # power of a channel's root mean square that moves from activations into weights
_CLIPS = tuple(2 ** (-step / 8) for step in range(17))  # shares of the largest activation that are tried as the range
_HEADROOM = 2.0  # of 16 bits, beyond the largest activation of the calibration


@dataclass(frozen=True, slots=True)
class QuantizedInteger:
    """A projection whose inputs are rounded too: `y = norm * scale * sum_t (q_t - 128) 256^t W^T`.

    Attributes:
        data: int8 [N, K], for inputs as `prepared` makes them.
        scales: float32 [N].
        activation_scale: a step of the (lowest) 8 bits of an activation.
        smooth: float32 [K], what channels are divided by beside their norm; None where activations are not spread.
        spread: see `Integer`.
        terms: of 8 bits each.
    """

    data: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    activation_scale: float
    smooth: npt.NDArray[np.float32] | None
    spread: int
    terms: int


def quantize_integer(weight: Tensor, form: Integer, hessian: Tensor, inputs: Tensor) -> QuantizedInteger:
    """Round a projection and fix the scale of its inputs.

    Args:
        weight: float32 [N, K].
        form: see `Integer`.
        hessian: float32 [K, K], of the projection's inputs.
        inputs: float32 [rows, K], some of them.
    """
    smooth = None
    mixing = _mixing(weight.shape[1], form.spread)
    if form.spread:
        power = hessian.diagonal().clamp(min=0).sqrt()
        smooth = power.clamp(min=power.mean() * 1e-4 + 1e-12) ** _SMOOTHING
        smooth = smooth / smooth.mean()
        weight = weight * smooth
        hessian = hessian / (smooth[:, None] * smooth)
    if mixing is not None:
        weight = _mixed(weight, mixing)
        hessian = _mixed(_mixed(hessian, mixing).T, mixing)
    ready, _ = _prepared(inputs, smooth, mixing)
    data, scales = quantize_channels(weight, hessian)
    return QuantizedInteger(
        data=data,
        scales=scales,
        activation_scale=_step(ready, form.terms),
        smooth=None if smooth is None else smooth.numpy(),
        spread=form.spread,
        terms=form.terms,
    )


def product(inputs: Tensor, quantized: QuantizedInteger) -> Tensor:
    """What the graph computes for inputs [rows, K]: float32 [rows, N]."""
    smooth = None if quantized.smooth is None else torch.from_numpy(quantized.smooth)
    ready, norms = _prepared(inputs, smooth, _mixing(inputs.shape[1], quantized.spread))
    weight = torch.from_numpy(quantized.data).float() * torch.from_numpy(quantized.scales)[:, None]
    return _rounded(ready, quantized.activation_scale, quantized.terms) @ weight.T * norms


def _prepared(inputs: Tensor, smooth: Tensor | None, mixing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Inputs as they are rounded, and what each row's product is multiplied by, [rows, 1]."""
    if smooth is None:
        return inputs, torch.ones(1, 1)
    norms = (inputs.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    ready = inputs / norms / smooth
    return ready if mixing is None else _mixed(ready, mixing), norms


def _mixing(width: int, spread: int) -> Tensor | None:
    """What blocks of channels are multiplied by, [b, b]; None where they are not mixed."""
    return hadamard_block(width, spread) if spread > 1 else None


def _mixed(x: Tensor, mixing: Tensor) -> Tensor:
    return (x.reshape(-1, len(mixing)) @ mixing).reshape(x.shape)


def _rounded(ready: Tensor, step: float, terms: int) -> Tensor:
    """Activations on their grid; the higher byte takes what the lower one's range leaves."""
    high = 0.0 if terms == 1 else (ready / (256 * step)).round().clamp(-128, 127) * (256 * step)
    return high + ((ready - high) / step).round().clamp(-128, 127) * step


def _step(ready: Tensor, terms: int) -> float:
    """The step with the least error; of 16 bits, the one that leaves room for larger activations."""
    most = max(ready.abs().max().item(), 1e-6)
    if terms > 1:
        return most * _HEADROOM / 32767
    errors = {}
    error = torch.empty_like(ready)  # one for all: fresh memory would take most of the time
    for clip in _CLIPS:
        step = most * clip / 127
        torch.div(ready, step, out=error).round_().clamp_(-128, 127).mul_(step).sub_(ready).square_()
        errors[step] = error.mean().item()
    return min(errors, key=errors.__getitem__)
