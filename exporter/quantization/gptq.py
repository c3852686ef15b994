"""GPTQ (Frantar et al., arXiv:2210.17323): quantization in which columns compensate for errors of others.

In the form of LDLQ (Chee et al., arXiv:2307.13304), which is equivalent and does not need the inverse of the Hessian.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llm_edge.exporter.bfloat16 import matmul_dtype
from llm_edge.exporter.quantization.hessian import Hessian

_BLOCK = 128  # columns that one matmul moves for the errors of all columns after them
_SMALL_BLOCK = 16  # columns that one matmul moves for the errors in the same block; they fit into the cache


def gptq(weight: Tensor, hessian: Hessian, scales: Tensor, zeros: Tensor, size: int, max_level: int) -> Tensor:
    """Quantize a weight column by column, the most important columns first.

    Args:
        weight: float32 [N, K].
        hessian: of the inputs.
        scales: float32 [N, G], one per group of `size` columns; a weight is `scale * (level - zero)`.
        zeros: integers as float32 [N, G].
        size: columns per group.
        max_level: the largest level; the smallest is 0.

    Returns:
        levels as float32 [N, K].
    """
    rows, width = weight.shape
    feedback = hessian.feedback
    errors = weight.T.contiguous().index_select(0, hessian.order)  # [K, N]; weights that are not quantized yet
    scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    scales = scales.where(scales > 0, 1.0)
    rounded_errors = torch.empty(width, rows, dtype=matmul_dtype())  # of the blocks that are quantized
    levels = torch.empty(width, rows)  # relative to the zeros
    # Calls of NumPy cost less than those of torch, above all in several threads.
    all_errors, all_levels, all_scales = errors.numpy(), levels.numpy(), scales.numpy()
    least, most, factors = (-zeros).numpy(), (max_level - zeros).numpy(), feedback.numpy()
    moved = np.empty(rows, np.float32)
    order = hessian.order.tolist()
    for end in range(width, 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        targets = errors[start:end] + feedback[start:end, end:].to(rounded_errors.dtype) @ rounded_errors[end:]
        for high in range(end, start, -_SMALL_BLOCK):
            low = max(high - _SMALL_BLOCK, start)
            targets[low - start : high - start].addmm_(feedback[low:high, high:end], errors[high:end])
            for index in reversed(range(low, high)):
                target, level, group = targets[index - start].numpy(), all_levels[order[index]], order[index] // size
                np.dot(factors[index, index + 1 : high], all_errors[index + 1 : high], out=moved)
                target += moved
                np.divide(target, all_scales[group], out=level)
                np.rint(level, out=level)
                np.maximum(level, least[group], out=level)
                np.minimum(level, most[group], out=level)
                np.multiply(level, all_scales[group], out=moved)
                all_errors[index] -= moved
        rounded_errors[start:end] = errors[start:end]
    return levels.add_(zeros[torch.arange(width) // size]).T.contiguous()
