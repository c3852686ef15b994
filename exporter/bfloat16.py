"""Matmuls in bfloat16, for calibration: inputs of layers, Hessians and errors need not be exact there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2")


@cache
def matmul_dtype() -> torch.dtype:
    """Return bfloat16 if the processor multiplies it, which takes half the time of float32; otherwise float32."""
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capabilities.get(name) for name in _INSTRUCTIONS) else torch.float32


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two matrices in `matmul_dtype`; float32."""
    dtype = matmul_dtype()
    return (a.to(dtype) @ b.to(dtype)).float()


def fast_projections() -> contextlib.AbstractContextManager[object]:
    """Compute the projections of modules that this thread calls in `matmul_dtype`; all else remains in float32."""
    return _Projections() if matmul_dtype() is torch.bfloat16 else contextlib.nullcontext()


class _Projections(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = F.linear(x.bfloat16(), weight.bfloat16()).float()
    return product if bias is None else product + bias
