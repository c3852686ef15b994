"""The format `Dense`: unquantized weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llm_edge.exporter.graph.emitters.base import EmitContext
from llm_edge.exporter.graph.emitters.dense import DenseEmitter
from llm_edge.exporter.quantization.formats.base import WeightFormat


@dataclass(frozen=True, slots=True)
class Dense(WeightFormat):
    """Floating-point weights.

    Attributes:
        bits: 32 or 16. Graphs are written in float32; the pass `float16` converts the whole graph.
    """

    bits: int = 32

    kind: ClassVar[str] = "dense"

    @property
    def bytes_per_weight(self) -> float:
        return self.bits / 8

    @property
    def label(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"fp{self.bits}"

    def emitter(self, context: EmitContext) -> DenseEmitter:
        return DenseEmitter(context.editor, context.weights)
