"""The mean outer product of a projection's inputs, which says how columns can compensate errors of each other."""

from __future__ import annotations

import itertools
from concurrent.futures import Executor
from functools import cached_property

import torch
from torch import Tensor

from llm_edge.exporter.bfloat16 import matmul_dtype

_DAMPING = (0.01, 0.1, 1.0, 10.0)  # times the mean of the diagonal; the first that makes the factorization succeed
_TILE = 512  # rows and columns that are computed at once
_TOKENS = 512  # whose sum is rounded to bfloat16
_OUTLIERS = 64  # tokens that are not rounded


class Hessian:
    """The mean outer product of the inputs of a projection, factorized once for all formats.

    Attributes:
        matrix: float32 [K, K].
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @staticmethod
    def of(inputs: Tensor, threads: Executor) -> Hessian:
        """Compute the Hessian of inputs [tokens, K]."""
        addends = _addends(inputs, threads)
        width = inputs.shape[1]
        matrix = torch.empty(width, width)

        def compute(tile: tuple[slice, slice]) -> None:
            rows, columns = tile
            product = torch.zeros(rows.stop - rows.start, columns.stop - columns.start)
            for each in addends:
                product += each[:, rows].T @ each[:, columns]
            matrix[rows, columns] = product.div_(len(inputs))
            matrix[columns, rows] = product.T

        slices = [slice(start, min(start + _TILE, width)) for start in range(0, width, _TILE)]
        list(threads.map(compute, itertools.combinations_with_replacement(slices, 2)))
        return Hessian(matrix)

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
        """The columns from the least to the most important one, int64 [K]."""
        return self.diagonal.argsort(descending=True, stable=True).flip(0)

    @cached_property
    def feedback(self) -> Tensor:
        """How far a column moves for the errors of later ones in `order`: strictly upper triangular [K, K].

        The matrix in this order is `(1 + feedback)^T D (1 + feedback)` with a diagonal `D`. Columns whose inputs are
        all zero count as independent. If no damping makes the factorization succeed in float32, zero, which rounds
        each weight to its nearest level; so too for numbers too small to be normal, which processors treat differently.
        """
        if self.diagonal.mean() < torch.finfo(torch.float32).tiny:
            return torch.zeros_like(self.matrix)
        for damping in _DAMPING:
            factor = self._ordered()
            diagonal = factor.diagonal()
            diagonal[diagonal == 0] = 1.0
            diagonal += damping * diagonal.mean()
            lower, failed = factor.T, torch.empty((), dtype=torch.int32)
            torch.linalg.cholesky_ex(lower, out=(lower, failed))  # in place: the matrix may take hundreds of megabytes
            if not failed:
                factor /= diagonal.clone()[:, None]
                if factor.sum().isfinite():
                    diagonal.zero_()
                    return factor
        return torch.zeros_like(self.matrix)

    def _ordered(self) -> Tensor:
        """Return a copy of the matrix with rows and columns in `order`."""
        ordered = torch.empty_like(self.matrix)
        for rows, numbers in zip(torch.split(ordered, _TILE), torch.split(self.order, _TILE), strict=True):
            rows.copy_(self.matrix[numbers][:, self.order])
        return ordered


def _addends(inputs: Tensor, threads: Executor) -> list[Tensor]:
    """Return matrices whose products with themselves add up to that of the inputs [tokens, K].

    torch rounds products of bfloat16 to bfloat16. Errors relative to what all tokens have in common, or to a few tokens
    with huge activations, would leave a matrix that is not positive definite. These are therefore kept in float32.
    """
    if matmul_dtype() is not torch.bfloat16:
        return [inputs.float()]
    parts = torch.split(inputs, _TOKENS)
    # Ten times as fast as the mean of all at once.
    mean = torch.stack([part.sum(0, dtype=torch.float32) for part in parts]).sum(0) / len(inputs)

    def center(part: Tensor) -> tuple[Tensor, Tensor]:
        centered = part - mean
        return centered.bfloat16(), centered.norm(dim=1)

    centered = list(threads.map(center, parts))
    outliers = torch.cat([norms for _, norms in centered]).argsort(descending=True, stable=True)[:_OUTLIERS]
    for number in outliers.tolist():
        centered[number // _TOKENS][0][number % _TOKENS] = 0
    exact = torch.cat([inputs[outliers] - mean, mean[None] * len(inputs) ** 0.5])
    return [exact, *(rounded for rounded, _ in centered)]
