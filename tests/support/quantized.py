"""Writes weights in quantized formats, number by number from their definitions, with the values that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = Mapping[str, Tensor]
Written = tuple[Parts, Tensor]
"""Tensors by their names after that of the module, and the weight that they stand for."""

FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [R, C] as int32 words [ceil(R * bits / 32), C], bit by bit along the first axis, lowest first."""
    words = torch.zeros(-(-len(numbers) * bits // 32), numbers.shape[1], dtype=torch.int64)
    for row, values in enumerate(numbers.long()):
        for bit in range(bits):
            position = row * bits + bit
            words[position // 32] |= (values >> bit & 1) << position % 32
    return (words - (words >> 31 << 32)).int()


def grid(weight: Tensor, bits: int, group: int, *, symmetric: bool, order: Tensor | None = None) -> list[Tensor]:
    """Levels [N, K], zero points and scales [N, G] of a weight, and the group of each input."""
    width = weight.shape[1]
    group_of = torch.arange(width) // group
    if order is not None:
        group_of = group_of[order]
    largest, middle = (1 << bits) - 1, 1 << bits - 1
    scales, zeros = [], []
    for number in range(-(-width // group)):
        part = weight[:, group_of == number].float()
        if symmetric:
            scales.append((part.abs().amax(1) / (middle - 1 if bits > 2 else 1)).clamp(min=1e-4))
            zeros.append(torch.full_like(scales[-1], middle))
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales.append(((high - low) / largest).clamp(min=1e-4))
            zeros.append((-low / scales[-1]).round().clamp(0, largest))
    scale, zero = torch.stack(scales, 1).half(), torch.stack(zeros, 1)
    levels = (weight / scale.float()[:, group_of] + zero[:, group_of]).round().clamp(0, largest)
    return [levels, zero, scale, group_of]


def values(levels: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor) -> Tensor:
    return (levels - zeros[:, group_of]) * scales.float()[:, group_of]


def gptq(
    weight: Tensor,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = False,
    order: Tensor | None = None,
    version: int = 1,
    index: bool = True,
) -> Written:
    levels, zeros, scales, group_of = grid(weight, bits, group, symmetric=symmetric, order=order)
    if version == 1:  # a zero point of 0 would borrow from the next; see the test of it
        zeros = zeros.clamp(min=1)
    parts = {
        "qweight": pack(levels.T, bits),
        "qzeros": pack(zeros - (2 - version), bits).T.contiguous(),
        "scales": scales.T.contiguous(),
    }
    if index:
        parts["g_idx"] = group_of.int()
    return parts, values(levels, zeros, scales, group_of)


def awq(weight: Tensor, group: int = 32) -> Written:
    levels, zeros, scales, group_of = grid(weight, 4, group, symmetric=False)
    order = torch.tensor([8 * word + column for word in range(len(weight) // 8) for column in (0, 2, 4, 6, 1, 3, 5, 7)])
    parts = {
        "qweight": pack(levels[order], 4).T.contiguous(),
        "qzeros": pack(zeros[order], 4).T.contiguous(),
        "scales": scales.T.contiguous(),
    }
    return parts, values(levels, zeros, scales, group_of)


def fp8(weight: Tensor, scales: Tensor, name: str, block: tuple[int, int]) -> Written:
    """float8 with a scale for each block of a shape."""
    rows, width = weight.shape
    expanded = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :width]
    stored = (weight / expanded).to(torch.float8_e4m3fn)
    return {"weight": stored, name: scales}, stored.float() * expanded


def fp8_blocks(weight: Tensor) -> Written:
    scales = torch.rand(-(-weight.shape[0] // 48), -(-weight.shape[1] // 40)) * 1e-3 + 1e-3
    return fp8(weight, scales, "weight_scale_inv", (48, 40))


def fp8_tensor(weight: Tensor) -> Written:
    scale = (weight.abs().max() / 448).bfloat16().view(1, 1)
    parts, expected = fp8(weight, scale, "weight_scale_inv", (len(weight), weight.shape[1]))
    activations = {"activation_scale": torch.tensor(0.5)}
    return {**parts, "weight_scale_inv": scale.view(()), **activations}, expected


def fp8_rows(weight: Tensor) -> Written:
    return fp8(weight, weight.abs().amax(1, keepdim=True) / 448, "weight_scale", (1, weight.shape[1]))


def four_bit_codes(weight: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes of the nearest values in a table, and the absolute maximum of each block."""
    blocks = weight.reshape(-1, size)
    absmax = blocks.abs().amax(1)
    return ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1), absmax


def quantize_folder(
    folder: Path,
    config: Mapping[str, Any],
    write: Callable[[Tensor], Written],
    *,
    select: Callable[[str], bool] = lambda name: name.endswith("_proj.weight"),
    whole_name: bool = False,
) -> dict[str, Tensor]:
    """Replace the selected weights of a folder by quantized ones; returns what all tensors of the model now are.

    With `whole_name`, names of parts follow that of the weight instead of the module's.
    """
    path = folder / "model.safetensors"
    stored, model = {}, load_file(path)
    for name, weight in list(model.items()):
        if select(name):
            parts, model[name] = write(weight.float())
            prefix = name if whole_name else name.removesuffix("weight")
            stored |= {prefix + part: tensor.contiguous() for part, tensor in parts.items()}
        else:
            stored[name] = weight
    save_file(stored, path, {"format": "pt"})
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": dict(config)}
    (folder / "config.json").write_text(json.dumps(content))
    return model
