"""`GroupedWeight`: a matrix of integers with a scale and perhaps a zero point for each group of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
from torch import Tensor

from llm_edge.checkpoint.quantized.numbers import scale_groups, scale_tiles
from llm_edge.checkpoint.quantized.stored import QuantizedWeight, StoredWeight
from llm_edge.model.block_weights import BlockKind, SourceBlocks

_MIN_BLOCK, _MAX_BLOCK = 16, 128  # of MatMulNBits; larger groups are split, because its fast kernels support up to 128


@dataclass(frozen=True, slots=True)
class Groups:
    """Which group each of the inputs of a matrix belongs to.

    Attributes:
        width: number of inputs.
        count: number of groups.
        size: inputs of a group, which are adjacent if `index` is None; the last group may be smaller.
        index: group of each input, int32 [K], if they are in another order (act-order); else None.
    """

    width: int
    count: int
    size: int
    index: Tensor | None

    @classmethod
    def of(cls, width: int, count: int, group_of: Tensor | None, size: int) -> Self | None:
        """Return the groups given by an index, or groups of adjacent inputs; None if a group does not exist."""
        if group_of is None:
            return cls(width, count, size, None)
        if width == 0 or int(group_of.min()) < 0 or int(group_of.max()) >= count:
            return None
        adjacent = torch.equal(group_of, torch.arange(width) // size) and count == -(-width // size)
        return cls(width, count, size, None if adjacent else group_of.int())


@dataclass(frozen=True, slots=True)
class GroupedWeight(ABC):
    """A matrix [N, K] whose values are (level - zero) * scale."""

    stored: StoredWeight
    bits: int
    rows: int
    groups: Groups

    @abstractmethod
    def levels(self) -> Tensor:
        """Read the integers, uint8 [N, K]."""

    @abstractmethod
    def scales(self) -> Tensor:
        """Read the scales [N, G]."""

    @abstractmethod
    def zeros(self) -> Tensor | None:
        """Read the zero points, uint8 [N, G]; None if all are the middle of the range."""

    def quantized(self, name: str, kind: str) -> QuantizedWeight:
        """Return the description of this weight; `kind` names its type."""
        shape, parts = (self.rows, self.groups.width), self.stored.parts
        return QuantizedWeight(
            name, shape, parts, kind, self.load, block_kind=cache(self.block_kind), load_blocks=self.blocks
        )

    def load(self) -> Tensor:
        """Return the weight in float32."""
        groups, levels, scales, zeros = self.groups, self.levels(), self.scales(), self.zeros()
        if zeros is None:
            zeros = torch.full_like(scales, 1 << self.bits - 1)
        if groups.index is not None:
            return scale_groups(levels, scales, zeros, groups.index)
        return scale_tiles(levels, scales, (1, groups.size), zeros)

    def block_kind(self) -> BlockKind | None:
        """Return the block layout that holds the same numbers, or None if there is none."""
        groups = self.groups
        size = min(groups.size & -groups.size, _MAX_BLOCK)
        if groups.index is not None or size < _MIN_BLOCK or groups.width % groups.size:
            return None
        zeros = self.zeros()
        varied = zeros is not None and bool((zeros != 1 << self.bits - 1).any())
        return BlockKind(4 if self.bits <= 4 else 8, size, offsets=False, zeros=varied)

    def blocks(self) -> SourceBlocks:
        """Return the weight in the layout of `block_kind`."""
        kind = self.block_kind()
        assert kind is not None
        repeats, shift = self.groups.size // kind.size, (1 << kind.bits - 1) - (1 << self.bits - 1)
        zeros = self.zeros() if kind.zeros else None
        return SourceBlocks(
            (self.levels() + shift).contiguous(),
            self.scales().float().repeat_interleave(repeats, dim=1),
            None,
            None if zeros is None else (zeros + shift).repeat_interleave(repeats, dim=1),
        )
