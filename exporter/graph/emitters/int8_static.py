"""Emitters of integer matmuls with static activation scales, for onnxruntime's own operators and for standard ones.

The computation is that of `QuantizedInt8.apply`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from llm_edge.exporter.graph.editor import Array, Editor, name_of, shape_of
from llm_edge.exporter.graph.emitters.base import Emitter, split_suffix
from llm_edge.exporter.quantization.hadamard import hadamard_matrix
from llm_edge.exporter.quantization.int8_static import EPSILON, QuantizedInt8

_FLOAT = ir.DataType.FLOAT
_Load = Callable[[str], QuantizedInt8]


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

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", label: str = "", **attributes: int) -> ir.Value:
        """Add a node with one output."""
        name = f"{self.path}/{label or kind}"
        self.nodes.append(self.editor.node(kind, list(inputs), name, domain=domain, **attributes))
        return self.nodes[-1].outputs[0]

    def outputs(
        self, kind: str, *inputs: ir.Value | None, count: int, label: str = "", **attributes: float
    ) -> list[ir.Value]:
        """Add a node with several outputs."""
        name = f"{self.path}/{label or kind}"
        node = ir.node(kind, list(inputs), attributes=attributes, num_outputs=count, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}/output_{index}"
        self.nodes.append(node)
        return list(node.outputs)

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


class Int8Emitter(Emitter):
    """Base of both emitters.

    Args:
        editor: of the graph.
        hadamard_block: see `Int8Static`.
        activation_bits: 8 or 16.
        load: returns a quantized weight by initializer name.
    """

    def __init__(self, editor: Editor, hadamard_block: int, activation_bits: int, load: _Load) -> None:
        self._editor = editor
        self._hadamard_block = hadamard_block
        self._activation_bits = activation_bits
        self._load = load


class FusedInt8(Int8Emitter):
    """`com.microsoft` MatMulIntegerToFloat; 16-bit activations are two batches of 8 bits in one matmul."""

    def linear(self, x: ir.Value, weight: ir.Value, path: str, num_splits: int = 1) -> list[ir.Node]:
        projection = _Projection(self._editor, self._load, weight, path, num_splits)
        inverse = None
        if self._hadamard_block:
            x, inverse = projection.outputs(
                "SimplifiedLayerNormalization", x, projection.inverse_smooth(), count=2, axis=-1, epsilon=EPSILON
            )
        if self._hadamard_block > 1:
            x = projection.multiply_hadamard(x, self._hadamard_block)
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
            if self._activation_bits == 16:
                result = self._combine(projection, result, suffix)
            if inverse is not None:
                projection.op("Div", result, inverse, label=f"Div{suffix}")
            tails.append(projection.nodes[start:])
        nodes = projection.nodes[: len(projection.nodes) - sum(map(len, tails))]
        return [*nodes, *(node for tail in tails for node in tail[:-1]), *(tail[-1] for tail in tails)]

    def _quantize(self, projection: _Projection, x: ir.Value) -> ir.Value:
        """Return activations as uint8 [B, S, K], or of 16 bits [2 * B, S, K] with the high bytes first."""
        scale, zero = projection.activation_scale(), projection.zero_point()
        if self._activation_bits == 8:
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


class PortableInt8(Int8Emitter):
    """QuantizeLinear, DequantizeLinear and MatMul, which runtimes fuse; 16-bit activations are not quantized."""

    def linear(self, x: ir.Value, weight: ir.Value, path: str, num_splits: int = 1) -> list[ir.Node]:
        projection = _Projection(self._editor, self._load, weight, path, num_splits)
        norm = None
        if self._hadamard_block:
            squares = projection.op("Mul", x, x, label="Square")
            mean = projection.op("ReduceMean", squares, self._editor.constant("last", [-1]))
            # "Add" is the name of the projection's bias.
            norm = projection.op(
                "Sqrt", projection.op("Add", mean, self._editor.scalar("epsilon", EPSILON), label="Epsilon")
            )
            x = projection.op("Mul", projection.op("Div", x, norm), projection.inverse_smooth(), label="Smooth")
        if self._hadamard_block > 1:
            x = projection.multiply_hadamard(x, self._hadamard_block)
        if self._activation_bits == 8:
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
