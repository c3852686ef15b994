"""GPTQ (Frantar et al., arXiv:2210.17323): quantization in which later columns compensate for earlier errors."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

_DAMPING = (0.01, 0.1, 1.0, 10.0)  # times the mean of the diagonal; added to it in turn until the inverse is stable
_SCALE_DAMPING = 1e-3  # times the diagonal of the normal equations
_SOLVED_ELEMENTS = 1 << 24  # of the normal equations of a few rows: 64 MiB in float32
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
    order, factor = hessian.order, hessian.inverse_factor
    columns = weight.T[order].contiguous()  # [K, N], so that a column is contiguous
    groups = order // size
    column_scales = scales.T[groups]
    column_scales = column_scales.where(column_scales > 0, 1.0)
    column_zeros = zeros.T[groups]
    levels = torch.empty_like(columns)
    errors = torch.empty(min(_BLOCK, width), rows)
    diagonal = factor.diagonal().tolist()
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        for low in range(start, end, _SMALL_BLOCK):
            high = min(low + _SMALL_BLOCK, end)
            block = errors[low - start : high - start]
            for index in range(low, high):
                column, scale, zero = columns[index], column_scales[index], column_zeros[index]
                if index > low:
                    column = torch.addmv(column, block[: index - low].T, factor[low:index, index], alpha=-1)
                level = torch.div(column, scale, out=levels[index]).add_(zero).round_().clamp_(0, max_level)
                rounded = (level - zero).mul_(scale)
                torch.sub(column, rounded, out=block[index - low]).div_(diagonal[index])
            columns[high:end].addmm_(factor[low:high, high:end].T, block, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    result = torch.empty_like(levels)
    result[order] = levels
    return result.T.contiguous()


def refit_scales(weight: Tensor, hessian: Hessian, offsets: Tensor, scales: Tensor, size: int) -> Tensor:
    """Return the scales with the least error of the output for given integers, by least squares.

    Args:
        weight: float32 [N, K].
        hessian: of the inputs.
        offsets: levels minus zero points, as float32 [N, K].
        scales: float32 [N, G], one per group of `size` columns; those that would change by half or more are kept.
        size: columns per group.
    """
    matrix = hessian.matrix
    width, groups = weight.shape[1], scales.shape[1]
    padding = groups * size - width
    rows = max(_SOLVED_ELEMENTS // groups**2, 1)
    found = []
    for part, offset, old in zip(*(torch.split(each, rows) for each in (weight, offsets, scales)), strict=True):

        def sums(x: Tensor, offset: Tensor = offset) -> Tensor:
            """Return the dot products of rows with the offsets by group, [N, G]."""
            return torch.nn.functional.pad(x * offset, (0, padding)).view(len(x), groups, size).sum(-1)

        starts = range(0, width, size)
        products = [sums(offset[:, start : start + size] @ matrix[start : start + size]) for start in starts]
        normal = torch.stack(products, 1)  # [N, G, G]
        damping = _SCALE_DAMPING * normal.diagonal(dim1=1, dim2=2) + 1e-30
        normal += torch.diag_embed(damping)
        solved, _ = torch.linalg.solve_ex(normal, (sums(part @ matrix) + damping * old)[..., None])
        new = solved[..., 0]
        found.append(new.where((new - old).abs() < 0.5 * old, old))  # also where it is NaN
    return torch.cat(found)
