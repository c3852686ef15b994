"""The format `Blocks`: weights quantized in blocks along the input axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llm_edge.exporter.graph.emitters.base import EmitContext
from llm_edge.exporter.graph.emitters.blocks import BlockEmitter, FusedBlocks, PortableBlocks
from llm_edge.exporter.quantization.blocks import BlockLayout, QuantizedBlocks, quantize_blocks
from llm_edge.exporter.quantization.formats.base import ObservedInputs, WeightFormat
from llm_edge.runtime.errors import CheckpointError

_MIN_SIZE = 16  # smallest block of MatMulNBits


@dataclass(frozen=True, slots=True)
class Blocks(BlockLayout, WeightFormat):
    """Weights in blocks along the input axis with one scale per block, for the operator MatMulNBits.

    The operator quantizes activations to 8 bits itself, block by block. See `BlockLayout` for the parameters.
    """

    kind: ClassVar[str] = "blocks"
    quantized_type: ClassVar[type[QuantizedBlocks]] = QuantizedBlocks

    @property
    def bytes_per_weight(self) -> float:
        return self.bits / 8 + 4 / self.size

    @property
    def label(self) -> str:
        return f"int{self.bits}-{self.size}{'' if self.symmetric else 'z'}"

    def __str__(self) -> str:
        return f"int{self.bits} blocks of {self.size}{'' if self.symmetric else ', zero points'}"

    def for_width(self, width: int) -> Blocks:
        """Return the format with blocks a half or a quarter as large if only those divide a row; padding is slow."""
        for size in (self.size, self.size // 2, self.size // 4):
            if width % size == 0 and size >= _MIN_SIZE:
                return Blocks(self.bits, size, self.symmetric)
        return self

    def quantize(self, weights: Mapping[str, Tensor], name: str) -> QuantizedBlocks:
        try:
            return quantize_blocks(weights[name], self)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def calibrate(self, weight: Tensor, observed: ObservedInputs) -> QuantizedBlocks:
        return quantize_blocks(weight, self, observed.hessian)

    def emitter(self, context: EmitContext) -> BlockEmitter:
        emitter = FusedBlocks if context.fused else PortableBlocks
        return emitter(context.editor, self, lambda name: context.load(name, self))
