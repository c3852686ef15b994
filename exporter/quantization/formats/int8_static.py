"""The format `Int8Static`: 8-bit weights and activations quantized with fixed scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llm_edge.exporter.graph.emitters.base import EmitContext
from llm_edge.exporter.graph.emitters.int8_static import FusedInt8, Int8Emitter, PortableInt8
from llm_edge.exporter.quantization.formats.base import ObservedInputs, WeightFormat
from llm_edge.exporter.quantization.int8_static import QuantizedInt8, quantize_int8


@dataclass(frozen=True, slots=True)
class Int8Static(WeightFormat):
    """Integer matmul of 8-bit weights, one scale per output channel, and activations with calibrated, fixed scales.

    The rows of a batch do not affect each other, and the matmul is several times as fast as with `Blocks`.

    Attributes:
        hadamard_block: size of the blocks of channels that are multiplied by a Hadamard matrix before activations are
            quantized, for inputs with outliers (reduced to a size that divides the width). Activations are also
            divided by their root mean square per token. 1 only divides; 0 leaves activations unchanged.
        activation_bits: 8, or 16 for activations stored as the sum of two 8-bit terms.
    """

    hadamard_block: int = 0
    activation_bits: int = 8

    kind: ClassVar[str] = "int8_static"
    quantized_type: ClassVar[type[QuantizedInt8]] = QuantizedInt8
    static_activations: ClassVar[bool] = True

    @property
    def bytes_per_weight(self) -> float:
        return 1.0

    @property
    def label(self) -> str:
        return f"int8x{self.activation_bits}{f'/{self.hadamard_block}' if self.hadamard_block else ''}"

    def __str__(self) -> str:
        hadamard = f", Hadamard blocks of {self.hadamard_block}" if self.hadamard_block > 1 else ""
        normalized = ", normalized per token" if self.hadamard_block else ""
        return f"int8 per channel x {self.activation_bits}-bit static activations{normalized}{hadamard}"

    def calibrate(self, weight: Tensor, observed: ObservedInputs) -> QuantizedInt8:
        return quantize_int8(weight, self.hadamard_block, self.activation_bits, observed.hessian, observed.samples)

    def emitter(self, context: EmitContext) -> Int8Emitter:
        emitter = FusedInt8 if context.fused else PortableInt8
        return emitter(context.editor, self.hadamard_block, self.activation_bits, lambda name: context.load(name, self))
