"""Rounding that lets the weights not yet rounded make up for the errors of those that are.

GPTQ (Frantar et al., arXiv:2210.17323). Knows nothing of models, of formats on disk or of graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = (0.01, 0.1, 1.0, 10.0)  # of the mean of the diagonal, added to it until the inverse is stable
_BLOCK = 128  # columns whose errors reach the columns behind them in one product


def compensated(weight: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, size: int, levels: int) -> Tensor:
    """Whole numbers for a weight, rounded column by column in the order of the columns' importance.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], sum or mean of the outer products of the inputs that the weight sees.
        scales: float32 [N, G], of a group of `size` columns each; a weight is `scale * (level - zero)`.
        zeros: float32 [N, G], whole numbers.
        size: columns a group.
        levels: the largest level; the smallest is 0.

    Returns:
        levels as float32 [N, K].
    """
    width = weight.shape[1]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])
    columns = weight.T[order].contiguous()  # [K, N]: a column lies together
    groups = order // size
    column_scales = scales.T[groups]
    column_scales = column_scales.where(column_scales > 0, 1.0)
    column_zeros = zeros.T[groups]
    found = torch.empty_like(columns)
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        errors = torch.empty_like(columns[start:end])
        for index in range(start, end):
            column, scale, zero = columns[index], column_scales[index], column_zeros[index]
            level = (column / scale + zero).round_().clamp_(0, levels)
            found[index] = level
            error = (column - (level - zero) * scale) / factor[index, index]
            errors[index - start] = error
            if index + 1 < end:
                columns[index + 1 : end].addr_(factor[index, index + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    result = torch.empty_like(found)
    result[order] = found
    return result.T.contiguous()


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse; columns that no input ever touched count as independent.

    Where float32 finds no factor whatever is added, all columns do: each weight then goes to its nearest level.
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
