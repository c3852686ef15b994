"""GPTQ (Frantar et al., arXiv:2210.17323): quantization in which later columns compensate for earlier errors.

In the form of LDLQ (Chee et al., arXiv:2307.13304), which is equivalent and does not need the inverse of the Hessian.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from llm_edge.exporter.bfloat16 import multiply

_DAMPING = (0.01, 0.1, 1.0, 10.0)  # times the mean of the diagonal; added to it until the factorization succeeds
_BLOCK = 128  # columns that one matmul moves for the errors of all columns before them
_SMALL_BLOCK = 16  # columns that one matmul moves for the errors in the same block; they fit into the cache


class Hessian:
    """The mean outer product of the inputs of a projection, factorized once for all formats.

    Attributes:
        matrix: float32 [K, K].
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def parts(self, size: int) -> list[Hessian]:
        """Return the blocks on the diagonal, of up to `size` columns: errors in one do not move columns of another."""
        starts = range(0, len(self.matrix), size)
        return [Hessian(self.matrix[start : start + size, start : start + size]) for start in starts]

    @property
    def diagonal(self) -> Tensor:
        """Mean square of each input channel, [K]."""
        return self.matrix.diagonal()

    @cached_property
    def order(self) -> Tensor:
        """The columns by importance, int64 [K]."""
        return self.diagonal.argsort(descending=True, stable=True)

    @cached_property
    def feedback(self) -> Tensor:
        """How far a column moves for the errors of earlier ones in `order`: strictly lower triangular [K, K].

        The matrix is `(1 + feedback)^T D (1 + feedback)` with a diagonal `D`. Columns whose inputs are all zero count
        as independent. If no damping makes the factorization succeed in float32, zero, which rounds each weight to its
        nearest level.
        """
        backwards = self.order.flip(0)
        hessian = self.matrix[backwards][:, backwards]
        diagonal = hessian.diagonal()
        diagonal[diagonal == 0] = 1.0
        mean = diagonal.mean()
        for damping in _DAMPING:
            diagonal += damping * mean
            lower, failed = torch.linalg.cholesky_ex(hessian)
            if not failed:
                lower /= lower.diagonal().clone()
                if lower.isfinite().all():
                    lower.fill_diagonal_(0)
                    found: Tensor = lower.T.flip(0, 1).contiguous()
                    return found
        return torch.zeros_like(hessian)


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
    levels = torch.empty(width, rows)  # relative to the zeros
    # Calls of NumPy cost less than those of torch, above all in several threads.
    all_errors, all_levels, all_scales = errors.numpy(), levels.numpy(), scales.numpy()
    least, most, factors = (-zeros).numpy(), (max_level - zeros).numpy(), feedback.numpy()
    moved = np.empty(rows, np.float32)
    order = hessian.order.tolist()
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        targets = errors[start:end] + multiply(feedback[start:end, :start], errors[:start])
        for low in range(start, end, _SMALL_BLOCK):
            high = min(low + _SMALL_BLOCK, end)
            targets[low - start : high - start].addmm_(feedback[low:high, start:low], errors[start:low])
            for index in range(low, high):
                target, level, group = targets[index - start].numpy(), all_levels[order[index]], order[index] // size
                if index > low:
                    np.dot(factors[index, low:index], all_errors[low:index], out=moved)
                    target += moved
                np.divide(target, all_scales[group], out=level)
                np.rint(level, out=level)
                np.maximum(level, least[group], out=level)
                np.minimum(level, most[group], out=level)
                np.multiply(level, all_scales[group], out=moved)
                all_errors[index] -= moved
    return levels.add_(zeros[torch.arange(width) // size]).T.contiguous()
