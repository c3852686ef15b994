"""The format `Int8Static`: 8-bit weights and activations quantized with fixed scales.

The graph computes what `QuantizedInt8.apply` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.graph.editor import Array, Editor, name_of, shape_of
from llm_edge.exporter.graph.emitter import EmitContext, Emitter, split_suffix
from llm_edge.exporter.quantization.formats.base import ObservedInputs, WeightFormat
from llm_edge.exporter.quantization.hadamard import hadamard_matrix
from llm_edge.exporter.quantization.int8_static import EPSILON, QuantizedInt8, quantize_int8

_FLOAT = ir.DataType.FLOAT
_Load = Callable[[str], QuantizedInt8]


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
    def prefill_cost(self) -> float:
        return self.activation_bits / 8

    @property
    def label(self) -> str:
        return f"int8x{self.activation_bits}{f'/{self.hadamard_block}' if self.hadamard_block else ''}"

    def __str__(self) -> str:
        hadamard = f", Hadamard blocks of {self.hadamard_block}" if self.hadamard_block > 1 else ""
        normalized = ", normalized per token" if self.hadamard_block else ""
        return f"int8 per channel x {self.activation_bits}-bit static activations{normalized}{hadamard}"

    def calibrate(self, weight: Tensor, observed: ObservedInputs) -> QuantizedInt8:
        key = (Int8Static, self.hadamard_block)  # the weight does not depend on how activations are quantized
        if key not in observed.shared:
            observed.shared[key] = quantize_int8(weight, self.hadamard_block, observed.hessian, observed.samples)
        quantized: QuantizedInt8 = observed.shared[key]
        return quantized.with_activation_bits(self.activation_bits, observed.samples)

    def emitter(self, context: EmitContext) -> Emitter[Int8Static]:
        return (FusedInt8 if context.fused else PortableInt8)(context, self)


class _Projection:
    """Nodes and initializers of one projection."""

    def __init__(self, editor: Editor, load: _Load, weight: ir.Value, path: str, num_splits: int) -> None:
        self.editor = editor
        self.weight = name_of(weight)
        rows, self.width = shape_of(weight)
        self.rows = rows // num_splits
        self.num_splits = num_splits
        self.path = path
        self.nodes: list[ir.Node] = []
        self._load = load

    def op(self, kind: str, *inputs: ir.Value | None, **options: Any) -> ir.Value:
        """Add a node with one output."""
        return self.outputs(kind, *inputs, count=1, **options)[0]

    def outputs(
        self, kind: str, *inputs: ir.Value | None, count: int, label: str = "", **options: Any
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs; `options` are further arguments of `Editor.node`."""
        node = self.editor.node(kind, list(inputs), f"{self.path}/{label or kind}", outputs=count, **options)
        self.nodes.append(node)
        return node.outputs

    def scalar(self, label: str, get: Callable[[QuantizedInt8], float]) -> ir.Value:
        """Return a float32 scalar of the quantized weight."""
        return self._tensor(label, _FLOAT, (), lambda quantized: np.array(get(quantized), dtype=np.float32))

    def data(self, index: int) -> ir.Value:
        """Return a split of the weight, int8 [K, N]."""
        return self._tensor(
            f"data{split_suffix(index, self.num_splits)}",
            ir.DataType.INT8,
            (self.width, self.rows),
            lambda quantized: np.ascontiguousarray(self._split(quantized.data, index).T),
        )

    def scales(self, index: int) -> ir.Value:
        """Return the scales of a split's output channels, float32 [N]."""
        label = f"scales{split_suffix(index, self.num_splits)}"
        return self._tensor(label, _FLOAT, (self.rows,), lambda quantized: self._split(quantized.scales, index))

    def inverse_smooth(self) -> ir.Value:
        """Return the factors of the channels, float32 [K]."""

        def values(quantized: QuantizedInt8) -> Array:
            assert quantized.smooth is not None
            return 1 / quantized.smooth

        return self._tensor("smooth", _FLOAT, (self.width,), values)

    def activation_scale(self) -> ir.Value:
        """Return the scale of the activations."""
        return self.scalar("step", lambda quantized: quantized.activation_scale)

    def zero_point(self) -> ir.Value:
        """Return the zero point of unsigned activations, for which the kernels are fastest."""
        return self.editor.initializer("uint8_middle", ir.DataType.UINT8, (), lambda: np.array(128, dtype=np.uint8))

    def multiply_hadamard(self, x: ir.Value, block: int) -> ir.Value:
        """Multiply the blocks of channels of `x` by a Hadamard matrix."""
        matrix = hadamard_matrix(self.width, block).numpy()
        size = len(matrix)
        blocks = self.editor.constant(f"blocks_of_{size}", [0, 0, -1, size])
        flat = self.editor.constant("flat", [0, 0, -1])
        factor = self.editor.initializer(f"hadamard_{size}", _FLOAT, matrix.shape, lambda: matrix)
        split = self.op("Reshape", x, blocks, label="Blocks")
        return self.op("Reshape", self.op("MatMul", split, factor, label="Mix"), flat, label="Flatten")

    def _split(self, array: Array, index: int) -> Array:
        return array[index * self.rows : (index + 1) * self.rows]

    def _tensor(
        self, label: str, dtype: ir.DataType, shape: tuple[int, ...], get: Callable[[QuantizedInt8], Array]
    ) -> ir.Value:
        name = self.weight
        return self.editor.initializer(f"{name}.{label}", dtype, shape, lambda: get(self._load(name)))


class FusedInt8(Emitter[Int8Static]):
    """`com.microsoft` MatMulIntegerToFloat; 16-bit activations are two batches of 8 bits in one matmul."""

    def linear(self, x: ir.Value, weight: ir.Value, path: str, num_splits: int = 1) -> list[ir.Node]:
        projection = _Projection(self._editor, self._load, weight, path, num_splits)
        inverse = None
        if self._format.hadamard_block:
            x, inverse = projection.outputs(
                "SimplifiedLayerNormalization", x, projection.inverse_smooth(), count=2, axis=-1, epsilon=EPSILON
            )
        if self._format.hadamard_block > 1:
            x = projection.multiply_hadamard(x, self._format.hadamard_block)
        quantized = self._quantize(projection, x)
        tails: list[list[ir.Node]] = []  # nodes of each split
        for index in range(num_splits):
            start = len(projection.nodes)
            suffix = split_suffix(index, num_splits)
            inputs = [
                quantized,
                projection.data(index),
                projection.activation_scale(),
                projection.scales(index),
                projection.zero_point(),
            ]
            label = f"MatMulIntegerToFloat{suffix}"
            result = projection.op("MatMulIntegerToFloat", *inputs, domain="com.microsoft", label=label)
            if self._format.activation_bits == 16:
                result = self._combine(projection, result, suffix)
            if inverse is not None:
                projection.op("Div", result, inverse, label=f"Div{suffix}")
            tails.append(projection.nodes[start:])
        nodes = projection.nodes[: len(projection.nodes) - sum(map(len, tails))]
        return [*nodes, *(node for tail in tails for node in tail[:-1]), *(tail[-1] for tail in tails)]

    def _quantize(self, projection: _Projection, x: ir.Value) -> ir.Value:
        """Return activations as uint8 [B, S, K], or of 16 bits [2 * B, S, K] with the high bytes first."""
        scale, zero = projection.activation_scale(), projection.zero_point()
        if self._format.activation_bits == 8:
            return projection.op("QuantizeLinear", x, scale, zero)
        coarse = projection.scalar("coarse_step", lambda quantized: 256 * quantized.activation_scale)
        high = projection.op("QuantizeLinear", x, coarse, zero, label="High")
        remainder = projection.op("Sub", x, projection.op("DequantizeLinear", high, coarse, zero))
        low = projection.op("QuantizeLinear", remainder, scale, zero, label="Low")
        return projection.op("Concat", high, low, axis=0)

    def _combine(self, projection: _Projection, products: ir.Value, suffix: str) -> ir.Value:
        """Add the products of the high and the low bytes."""
        high, low = projection.outputs("Split", products, count=2, label=f"Split{suffix}", axis=0, num_outputs=2)
        scaled = projection.op("Mul", high, self._editor.scalar("two_to_the_8", 256.0), label=f"Mul{suffix}")
        return projection.op("Add", scaled, low, label=f"Sum{suffix}")


class PortableInt8(Emitter[Int8Static]):
    """QuantizeLinear, DequantizeLinear and MatMul, which runtimes fuse; 16-bit activations are not quantized."""

    def linear(self, x: ir.Value, weight: ir.Value, path: str, num_splits: int = 1) -> list[ir.Node]:
        projection = _Projection(self._editor, self._load, weight, path, num_splits)
        norm = None
        if self._format.hadamard_block:
            squares = projection.op("Mul", x, x, label="Square")
            mean = projection.op("ReduceMean", squares, self._editor.constant("last", [-1]))
            # "Add" is the name of the projection's bias.
            norm = projection.op(
                "Sqrt", projection.op("Add", mean, self._editor.scalar("epsilon", EPSILON), label="Epsilon")
            )
            x = projection.op("Mul", projection.op("Div", x, norm), projection.inverse_smooth(), label="Smooth")
        if self._format.hadamard_block > 1:
            x = projection.multiply_hadamard(x, self._format.hadamard_block)
        if self._format.activation_bits == 8:
            scale, zero = projection.activation_scale(), projection.zero_point()
            x = projection.op("DequantizeLinear", projection.op("QuantizeLinear", x, scale, zero), scale, zero)
        suffixes = [split_suffix(index, num_splits) for index in range(num_splits)]
        weights = [
            projection.op(
                "DequantizeLinear", projection.data(index), projection.scales(index), label=f"Weight{suffix}", axis=1
            )
            for index, suffix in enumerate(suffixes)
        ]
        results = [
            projection.op("MatMul", x, dequantized, label=f"MatMul{suffix}")
            for dequantized, suffix in zip(weights, suffixes, strict=True)
        ]
        if norm is not None:
            for result, suffix in zip(results, suffixes, strict=True):
                projection.op("Mul", result, norm, label=f"Mul{suffix}")
        return projection.nodes
