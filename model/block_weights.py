"""Block-quantized weights as a checkpoint stores them, for exports that keep the stored values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

SOURCE_BLOCK = 32
"""Weights per block, along a row."""


@dataclass(frozen=True, slots=True)
class BlockKind:
    """Layout of a block: bits per weight (4 or 8), and whether it has an offset in addition to the scale."""

    bits: int
    offsets: bool


@dataclass(frozen=True, slots=True)
class SourceBlocks:
    """A quantized weight [N, K]; its values are (level - 2 ** (bits - 1)) * scale + offset.

    Attributes:
        levels: uint8 [N, K].
        scales: float32 [N, K / 32].
        offsets: float32 [N, K / 32], or None.
    """

    levels: Tensor
    scales: Tensor
    offsets: Tensor | None

    def map(self, convert: Callable[[Tensor], Tensor]) -> SourceBlocks:
        """Apply a conversion that only reorders rows."""
        offsets = None if self.offsets is None else convert(self.offsets)
        return SourceBlocks(convert(self.levels), convert(self.scales), offsets)

    @classmethod
    def concatenate(cls, weights: list[Self]) -> SourceBlocks:
        """Concatenate weights of one `BlockKind` along the first axis."""
        offsets = [weight.offsets for weight in weights if weight.offsets is not None]
        return SourceBlocks(
            torch.cat([weight.levels for weight in weights]),
            torch.cat([weight.scales for weight in weights]),
            torch.cat(offsets) if offsets else None,
        )


class BlockReader(Protocol):
    """A checkpoint that stores some of its tensors in blocks."""

    def block_kind(self, name: str) -> BlockKind | None:
        """Return the block layout of a tensor without reading it, or None if it is stored in another way."""

    def blocks(self, name: str) -> SourceBlocks:
        """Read the blocks of a tensor for which `block_kind` is not None."""
