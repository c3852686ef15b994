"""Weights that a source holds in blocks already, for those who keep its numbers. Knows no format and no graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

SOURCE_BLOCK = 32
"""Weights a block, along a row."""


@dataclass(frozen=True, slots=True)
class BlockKind:
    """What a block holds: weights of 4 or 8 bits, a scale, and an offset too or not."""

    bits: int
    offsets: bool


@dataclass(frozen=True, slots=True)
class SourceBlocks:
    """A weight [N, K] as its source rounded it: (level - 2 ** (bits - 1)) * scale + offset.

    Attributes:
        levels: uint8 [N, K].
        scales: float32 [N, K / 32].
        offsets: float32 [N, K / 32], or None.
    """

    levels: Tensor
    scales: Tensor
    offsets: Tensor | None

    def moved(self, convert: Callable[[Tensor], Tensor]) -> SourceBlocks:
        """The same behind a conversion that does nothing but move rows."""
        offsets = None if self.offsets is None else convert(self.offsets)
        return SourceBlocks(convert(self.levels), convert(self.scales), offsets)

    @classmethod
    def stacked(cls, parts: list[Self]) -> SourceBlocks:
        """Weights of one kind above each other."""
        offsets = [part.offsets for part in parts if part.offsets is not None]
        return SourceBlocks(
            torch.cat([part.levels for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(offsets) if offsets else None,
        )


class BlockReader(Protocol):
    """A source, some of whose tensors lie in blocks."""

    def block_kind(self, name: str) -> BlockKind | None:
        """Of a tensor, told without reading it; None where it is stored otherwise."""

    def blocks(self, name: str) -> SourceBlocks:
        """A tensor that has a kind."""
