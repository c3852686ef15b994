"""Hadamard matrices, and rotations built from them, which spread outliers over all channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SEED = 505
_ROWS = 1024  # rotated at a time


@dataclass(frozen=True, slots=True)
class Rotation:
    """An orthogonal matrix Q [n, n]: signs times the Kronecker product of two small orthogonal matrices.

    Multiplying a row by it takes `n * (a + b)` steps instead of `n * n`.

    Attributes:
        signs: float32 [n] of 1 and -1.
        left: float32 [a, a].
        right: float32 [b, b]; n = a * b.
    """

    signs: Tensor
    left: Tensor
    right: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return `x Q` along the last axis as float32, computed in chunks since `x` may be a whole embedding."""
        flat = x.reshape(-1, x.shape[-1])
        rotated = torch.empty(flat.shape)
        for start in range(0, len(flat), _ROWS):
            rows = flat[start : start + _ROWS].float() * self.signs
            split = rows.reshape(-1, len(self.left), len(self.right))
            rotated[start : start + _ROWS] = (self.left.T @ split @ self.right).reshape(rows.shape)
        return rotated.reshape(x.shape)

    def apply_to_columns(self, x: Tensor) -> Tensor:
        """Return `Q^T x` as float32, x [n, K]: the same for its columns, without transposing x."""
        rows = x.float() * self.signs[:, None]
        within = self.right.T @ rows.reshape(len(self.left), len(self.right), -1)
        return (self.left.T @ within.reshape(len(self.left), -1)).reshape(x.shape)

    def matrix(self) -> Tensor:
        """Return Q, [n, n]."""
        return self.apply(torch.eye(len(self.signs)))


def rotation(size: int) -> Rotation:
    """Return the rotation of a size; the same one on each call.

    Its factors are Hadamard matrices if they exist, so that all elements have the same magnitude; a remaining odd
    factor is a random orthogonal matrix.
    """
    generator = torch.Generator().manual_seed(_SEED + size)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0
    left, right = _factors(size)
    return Rotation(signs, _orthogonal(left, generator), _orthogonal(right, generator))


def hadamard_matrix(width: int, max_size: int) -> Tensor:
    """Return the largest orthonormal Hadamard matrix, float32 [n, n], with n <= `max_size` that divides `width`."""
    size = max(n for n in range(1, min(max_size, width) + 1) if width % n == 0 and _has_hadamard(n))
    return (_hadamard(size) / math.sqrt(size)).float()


def _factors(size: int) -> tuple[int, int]:
    """Return two close factors that both have a Hadamard matrix, or else a power of two and the remaining factor."""
    known = [n for n in range(1, size + 1) if size % n == 0 and _has_hadamard(n) and _has_hadamard(size // n)]
    if known:
        left = min(known, key=lambda n: abs(n - size // n))
        return left, size // left
    power = size & -size
    return size // power, power


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    if _has_hadamard(size):
        return (_hadamard(size) / math.sqrt(size)).float()
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal: Tensor = torch.linalg.qr(normal).Q
    return orthogonal.float()


def _has_hadamard(size: int) -> bool:
    return size in (1, 2) or (size % 2 == 0 and _has_hadamard(size // 2)) or _paley(size) is not None


def _hadamard(size: int) -> Tensor:
    """Return a Hadamard matrix by Sylvester's or Paley's construction (https://doi.org/10.1002/sapm1933121311)."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    matrix = _paley(size)
    if matrix is not None:
        return matrix
    half = _hadamard(size // 2)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def _paley(size: int) -> Tensor | None:
    """Return Paley's matrix of order p + 1 (prime p = 3 mod 4) or 2 (p + 1) (p = 1 mod 4); None for other sizes."""
    if size % 4 == 0 and _is_prime(size - 1):
        return _bordered(size - 1, -1.0) + torch.eye(size, dtype=torch.float64)
    if size % 4 == 0 and _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        symmetric = _bordered(size // 2 - 1, 1.0)
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zeros = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, signs) + torch.kron(torch.eye(size // 2, dtype=torch.float64), zeros)
    return None


def _bordered(prime: int, border: float) -> Tensor:
    """Return the Jacobsthal matrix with a border of ones whose left column has the sign `border`."""
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[torch.arange(1, prime) ** 2 % prime] = 1.0
    residues[0] = 0.0
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = border
    matrix[1:, 1:] = residues[(index[:, None] - index) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
