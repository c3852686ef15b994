"""GPTQ (Frantar et al., arXiv:2210.17323): quantization in which later columns compensate for earlier errors."""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = (0.01, 0.1, 1.0, 10.0)  # times the mean of the diagonal; added to it in turn until the inverse is stable
_BLOCK = 128  # columns whose errors are applied to all later columns in one matmul


def gptq(weight: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, size: int, max_level: int) -> Tensor:
    """Quantize a weight column by column, the most important columns first.

    Args:
        weight: float32 [N, K].
        hessian: sum or mean of the outer products of the inputs, float32 [K, K].
        scales: float32 [N, G], one per group of `size` columns; a weight is `scale * (level - zero)`.
        zeros: integers as float32 [N, G].
        size: columns per group.
        max_level: the largest level; the smallest is 0.

    Returns:
        levels as float32 [N, K].
    """
    width = weight.shape[1]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])
    columns = weight.T[order].contiguous()  # [K, N], so that a column is contiguous
    groups = order // size
    column_scales = scales.T[groups]
    column_scales = column_scales.where(column_scales > 0, 1.0)
    column_zeros = zeros.T[groups]
    levels = torch.empty_like(columns)
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        errors = torch.empty_like(columns[start:end])
        for index in range(start, end):
            column, scale, zero = columns[index], column_scales[index], column_zeros[index]
            level = (column / scale + zero).round_().clamp_(0, max_level)
            levels[index] = level
            error = (column - (level - zero) * scale) / factor[index, index]
            errors[index - start] = error
            if index + 1 < end:
                columns[index + 1 : end].addr_(factor[index, index + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    result = torch.empty_like(levels)
    result[order] = levels
    return result.T.contiguous()


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse; columns whose inputs are all zero count as independent.

    If no damping makes the factorization succeed in float32, return the identity, which rounds each weight to its
    nearest level.
    """
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
