"""The formats `Source` and `OriginalBlocks`: weights of a quantized source, unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llm_edge.exporter.graph.emitters.base import EmitContext, Emitter
from llm_edge.exporter.graph.emitters.original_blocks import Offsets, OriginalBlocksEmitter
from llm_edge.exporter.quantization.blocks import QuantizedBlocks
from llm_edge.exporter.quantization.formats.base import WeightFormat
from llm_edge.model.block_weights import SOURCE_BLOCK, BlockKind
from llm_edge.model.weights import Weights
from llm_edge.runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class OriginalBlocks(WeightFormat):
    """Blocks of 32 weights as the source stores them, with one scale and optionally one offset per block.

    They are written like `Blocks`; the contribution of offsets is a separate small float32 matmul.

    Attributes:
        bits: 4 or 8 per weight.
        offsets: whether blocks have offsets.
    """

    bits: int
    offsets: bool

    kind: ClassVar[str] = "original_blocks"

    @property
    def bytes_per_weight(self) -> float:
        return 1.125  # upper bound: 8 bits and a float32 scale

    @property
    def label(self) -> str:
        return f"int{self.bits}-{SOURCE_BLOCK}{'o' if self.offsets else ''}"

    def __str__(self) -> str:
        return f"int{self.bits} blocks of {SOURCE_BLOCK}{', offsets' if self.offsets else ''}"

    def quantize(self, weights: Mapping[str, Tensor], name: str) -> tuple[QuantizedBlocks, Offsets | None]:
        """Read the blocks and their offsets, float32 [K / 32, N]."""
        assert isinstance(weights, Weights)
        source = weights.blocks(name)
        for values in (source.scales, source.offsets):
            if values is not None and not values.isfinite().all():
                raise CheckpointError(f"{name}: a scale is NaN or infinity: the checkpoint is damaged")
        levels = source.levels.numpy()
        if self.bits == 4:
            levels = levels[:, ::2] | levels[:, 1::2] << 4
        blocks = QuantizedBlocks(levels.reshape(*source.scales.shape, -1), source.scales.numpy(), None, self.bits)
        return blocks, None if source.offsets is None else source.offsets.numpy().T

    def emitter(self, context: EmitContext) -> Emitter:
        kind = BlockKind(self.bits, self.offsets)
        return OriginalBlocksEmitter(context, kind, lambda name: context.load(name, self))


@dataclass(frozen=True, slots=True)
class Source(WeightFormat):
    """`OriginalBlocks` for weights that the source stores in blocks, another format for the others.

    Attributes:
        otherwise: format of the other weights.
    """

    otherwise: WeightFormat

    kind: ClassVar[str] = "source"
    needs_source_blocks: ClassVar[bool] = True

    @property
    def bytes_per_weight(self) -> float:
        return self.otherwise.bytes_per_weight

    @property
    def label(self) -> str:
        return "source"

    def __str__(self) -> str:
        return f"the source's own blocks, else {self.otherwise}"

    def for_source(self, kind: BlockKind | None) -> WeightFormat:
        return self.otherwise if kind is None else OriginalBlocks(kind.bits, kind.offsets)

    def emitter(self, context: EmitContext) -> Emitter:  # noqa: ARG002
        raise TypeError("call for_source first: a weight is stored in blocks or otherwise")
