"""Block-quantized weights as a checkpoint stores them, for exports that keep the stored values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

BLOCK_TYPES = (
    *("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"),
    *("IQ4_NL", "IQ4_XS"),
)
"""Names of the storage types, those of GGUF, whose blocks an export can keep."""


@dataclass(frozen=True, slots=True)
class BlockKind:
    """Layout of a block.

    Attributes:
        bits: of a weight, 4 or 8.
        size: weights per block, along a row.
        offsets: a block has an offset in addition to the scale.
        zeros: a block has a zero point in addition to the scale. Never set together with `offsets`.
    """

    bits: int
    size: int
    offsets: bool
    zeros: bool = False

    @classmethod
    def common(cls, kinds: Iterable[BlockKind]) -> BlockKind:
        """Return the smallest layout that can hold the numbers of all these layouts."""
        found = list(kinds)
        offsets = any(kind.offsets for kind in found)
        zeros = not offsets and any(kind.zeros for kind in found)
        return cls(max(kind.bits for kind in found), math.gcd(*(kind.size for kind in found)), offsets, zeros)


@dataclass(frozen=True, slots=True)
class SourceBlocks:
    """A quantized weight [N, K]; its values are (level - zero) * scale + offset.

    Attributes:
        levels: uint8 [N, K].
        scales: float32 [N, K / block].
        offsets: float32 [N, K / block], or None.
        zeros: uint8 [N, K / block], or None if all are 2 ** (bits - 1).
    """

    levels: Tensor
    scales: Tensor
    offsets: Tensor | None
    zeros: Tensor | None = None

    def map(self, convert: Callable[[Tensor], Tensor]) -> SourceBlocks:
        """Apply a conversion that only reorders rows."""
        offsets, zeros = (None if part is None else convert(part) for part in (self.offsets, self.zeros))
        return SourceBlocks(convert(self.levels), convert(self.scales), offsets, zeros)

    def converted(self, own: BlockKind, wanted: BlockKind) -> SourceBlocks:
        """Return the same numbers in another layout, which `BlockKind.common` derived from `own` and others."""
        if own == wanted:
            return self

        def expand(part: Tensor) -> Tensor:
            return part.repeat_interleave(own.size // wanted.size, dim=1)

        middle, shift = 1 << own.bits - 1, (1 << wanted.bits - 1) - (1 << own.bits - 1)
        zeros = torch.full(self.scales.shape, middle, dtype=torch.uint8) if self.zeros is None else self.zeros
        offsets = None
        if wanted.offsets:
            offsets = (middle - zeros.float()) * self.scales if self.offsets is None else self.offsets
        return SourceBlocks(
            self.levels + shift,
            expand(self.scales),
            None if offsets is None else expand(offsets),
            expand(zeros + shift) if wanted.zeros else None,
        )

    @classmethod
    def concatenate(cls, weights: list[Self]) -> SourceBlocks:
        """Concatenate weights of one `BlockKind` along the first axis."""
        offsets = [weight.offsets for weight in weights if weight.offsets is not None]
        zeros = [weight.zeros for weight in weights if weight.zeros is not None]
        return SourceBlocks(
            torch.cat([weight.levels for weight in weights]),
            torch.cat([weight.scales for weight in weights]),
            torch.cat(offsets) if offsets else None,
            torch.cat(zeros) if zeros else None,
        )


class BlockReader(Protocol):
    """A checkpoint that stores some of its tensors in blocks."""

    def block_kind(self, name: str) -> BlockKind | None:
        """Return the block layout of a tensor without reading it, or None if it is stored in another way."""

    def blocks(self, name: str) -> SourceBlocks:
        """Read the blocks of a tensor for which `block_kind` is not None."""
