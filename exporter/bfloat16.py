"""Matmuls in bfloat16, for calibration: the inputs of layers need not be exact there."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2")


def matmul_dtype() -> torch.dtype:
    """Return bfloat16 if the processor multiplies it, which takes half the time of float32; otherwise float32."""
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capabilities.get(name) for name in _INSTRUCTIONS) else torch.float32


def fast_matmuls() -> AbstractContextManager[object]:
    """Compute the matmuls of this thread in `matmul_dtype`; results of layers remain float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=matmul_dtype() is torch.bfloat16)
