"""MXFP4: 4-bit floats with a power of two as the scale of each 32 (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llm_edge.checkpoint.huggingface.weight_files import WeightFiles
from llm_edge.checkpoint.quantized.numbers import exponents, float4
from llm_edge.checkpoint.quantized.stored import QuantizedWeight, StoredWeight
from llm_edge.model.config_reader import ConfigReader

_BYTES = (torch.uint8,)


def read_mxfp4(_config: ConfigReader, files: WeightFiles) -> Iterator[QuantizedWeight]:
    """Yield the experts of a gpt-oss checkpoint as transformers names and stores them: [E, K, N].

    gate_up_proj_blocks uint8 [E, N, K / 32, 16], two numbers in a byte, the low half first; gate_up_proj_scales uint8
    [E, N, K / 32], exponents of 2 with a bias of 127 (transformers' `convert_moe_packed_tensors`).
    """
    for name in [name for name in files.tensors if name.endswith("_blocks")]:
        stored = StoredWeight(files, name.removesuffix("_blocks"))
        *outer, count, size = stored.info("_blocks", _BYTES).shape or (0, 0)
        if len(outer) < 2 or size != 16:
            stored.fail("_blocks", f"has shape {files.tensors[name].shape}, not blocks of 16 bytes")
        stored.info("_scales", _BYTES, (*outer, count))
        yield _experts(stored, (*outer[:-1], count * 32, outer[-1]))


def _experts(stored: StoredWeight, shape: tuple[int, ...]) -> QuantizedWeight:
    def load() -> Tensor:
        blocks, scales = stored.load("_blocks"), exponents(stored.load("_scales")).bfloat16()
        weight = torch.empty(shape, dtype=torch.bfloat16)
        for expert, result in enumerate(weight.view(-1, *shape[-2:])):  # one at a time, to bound the memory
            numbers = float4(blocks.flatten(0, -4)[expert], torch.bfloat16)  # [N, K / 32, 32]
            numbers *= scales.flatten(0, -3)[expert, ..., None]
            result.copy_(numbers.flatten(1).T)
        return weight

    # A 4-bit float times a power of two is exact in bfloat16.
    return QuantizedWeight(stored.prefix, shape, stored.parts, "MXFP4", load, torch.bfloat16)
