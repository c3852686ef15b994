"""GPTQ (Frantar et al., arXiv:2210.17323): quantization in which later columns compensate for earlier errors."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_DAMPING = (0.01, 0.1, 1.0, 10.0)  # times the mean of the diagonal; added to it in turn until the inverse is stable
_BLOCK = 128  # columns whose errors are applied to all later columns in one matmul
_SMALL_BLOCK = 16  # columns whose errors are applied to the later columns of a block; they fit into the cache


class Hessian:
    """The mean outer product of the inputs of a projection, factorized once for all formats.

    Attributes:
        matrix: float32 [K, K].
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @property
    def diagonal(self) -> Tensor:
        """Mean square of each input channel, [K]."""
        return self.matrix.diagonal()

    @cached_property
    def order(self) -> Tensor:
        """The columns by importance, int64 [K]."""
        return self.diagonal.argsort(descending=True, stable=True)

    @cached_property
    def inverse_factor(self) -> Tensor:
        """Upper Cholesky factor of the inverse in `order`; columns whose inputs are all zero count as independent.

        If no damping makes the factorization succeed in float32, the identity, which rounds each weight to its nearest
        level.
        """
        hessian = self.matrix[self.order][:, self.order]
        diagonal = hessian.diagonal()
        diagonal[diagonal == 0] = 1.0
        mean = diagonal.mean()
        for damping in _DAMPING:
            diagonal += damping * mean
            lower, failed = torch.linalg.cholesky_ex(hessian)
            if not failed:
                upper: Tensor
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not failed and upper.isfinite().all():
                    return upper
        return torch.eye(len(hessian))


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
    factor = hessian.inverse_factor
    columns = weight.T.contiguous().index_select(0, hessian.order)  # [K, N], so that a column is contiguous
    scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    scales = scales.where(scales > 0, 1.0)
    levels = torch.empty(width, rows)  # relative to the zeros
    errors = torch.empty(min(_BLOCK, width), rows)
    # Calls of NumPy cost less than those of torch, above all in several threads.
    views = (columns, levels, errors, scales, -zeros, max_level - zeros, factor.T.contiguous())
    all_columns, all_levels, all_errors, all_scales, least, most, weights = (view.numpy() for view in views)
    product = np.empty(rows, np.float32)
    order, diagonal = hessian.order.tolist(), factor.diagonal().tolist()
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        for low in range(start, end, _SMALL_BLOCK):
            high = min(low + _SMALL_BLOCK, end)
            for index in range(low, high):
                column, level, error = all_columns[index], all_levels[order[index]], all_errors[index - start]
                group = order[index] // size
                if index > low:
                    np.dot(weights[index, low:index], all_errors[low - start : index - start], out=product)
                    column -= product
                np.divide(column, all_scales[group], out=level)
                np.rint(level, out=level)
                np.maximum(level, least[group], out=level)
                np.minimum(level, most[group], out=level)
                np.multiply(level, all_scales[group], out=product)
                np.subtract(column, product, out=error)
                error /= diagonal[index]
            columns[high:end].addmm_(factor[low:high, high:end].T, errors[low - start : high - start], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    return levels.add_(zeros[torch.arange(width) // size]).T.contiguous()
