"""How products of whole numbers are written into a graph: for onnxruntime's own operators, or for standard ones.

The steps are those of `activations.product`. Knows nothing of recipes; `lower.py` decides what is written so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import onnx_ir as ir

from llm_edge.exporter.graph.editor import Array, Editor, name_of, shape_of
from llm_edge.exporter.graph.emitters.blocks import suffix
from llm_edge.exporter.quantization.activations import EPSILON, QuantizedInteger
from llm_edge.exporter.quantization.hadamard import hadamard_block
from llm_edge.exporter.quantization.recipes import Integer

_FLOAT = ir.DataType.FLOAT


class IntegerForm(Protocol):
    """Makes nodes, the last of which yield the results, that are not in the graph yet."""

    def linear(self, x: ir.Value, weight: ir.Value, form: Integer, path: str, parts: int = 1) -> list[ir.Node]:
        """`x [B, S, K]` times the transpose of `weight [N, K]`, its rows in equal parts; a result for each."""


class _Writer:
    """Nodes and initializers of one projection."""

    def __init__(
        self,
        editor: Editor,
        load: Callable[[str], QuantizedInteger],
        weight: ir.Value,
        form: Integer,
        path: str,
        parts: int,
    ) -> None:
        self.editor = editor
        self.weight = name_of(weight)
        self.rows, self.width = shape_of(weight)
        self.rows //= parts
        self.parts = parts
        self.form = form
        self.path = path
        self.nodes: list[ir.Node] = []
        self._load = load

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", label: str = "", **attributes: int) -> ir.Value:
        """Add a node of one output."""
        name = f"{self.path}/{label or kind}"
        self.nodes.append(self.editor.node(kind, list(inputs), name, domain=domain, **attributes))
        return self.nodes[-1].outputs[0]

    def outputs(
        self, kind: str, *inputs: ir.Value | None, count: int, label: str = "", **attributes: float
    ) -> list[ir.Value]:
        """Add a node of several outputs."""
        name = f"{self.path}/{label or kind}"
        node = ir.node(kind, list(inputs), attributes=attributes, num_outputs=count, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}/output_{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def number(self, label: str, make: Callable[[QuantizedInteger], float]) -> ir.Value:
        """A float32 scalar that calibration fixed."""
        return self._tensor(label, _FLOAT, (), lambda found: np.array(make(found), dtype=np.float32))

    def data(self, part: int) -> ir.Value:
        """A part of the weight, int8 [K, N]."""
        return self._tensor(
            f"data{suffix(part, self.parts)}",
            ir.DataType.INT8,
            (self.width, self.rows),
            lambda found: np.ascontiguousarray(self._rows(found.data, part).T),
        )

    def scales(self, part: int) -> ir.Value:
        """Of the part's outputs, float32 [N]."""
        label = f"scales{suffix(part, self.parts)}"
        return self._tensor(label, _FLOAT, (self.rows,), lambda found: self._rows(found.scales, part))

    def inverse_smooth(self) -> ir.Value:
        """What channels are multiplied by, float32 [K]."""

        def make(found: QuantizedInteger) -> Array:
            assert found.smooth is not None
            return 1 / found.smooth

        return self._tensor("smooth", _FLOAT, (self.width,), make)

    def step(self) -> ir.Value:
        """Of the activations."""
        return self.number("step", lambda found: found.activation_scale)

    def middle(self) -> ir.Value:
        """What stands for zero in unsigned activations; without a sign they take the fast kernels."""
        return self.editor.initializer("uint8_middle", ir.DataType.UINT8, (), lambda: np.array(128, dtype=np.uint8))

    def mixed(self, x: ir.Value) -> ir.Value:
        """`x` with its blocks of channels multiplied by a Hadamard matrix."""
        matrix = hadamard_block(self.width, self.form.spread).numpy()
        size = len(matrix)
        blocks = self.editor.constant(f"blocks_of_{size}", [0, 0, -1, size])
        flat = self.editor.constant("flat", [0, 0, -1])
        factor = self.editor.initializer(f"hadamard_{size}", _FLOAT, matrix.shape, lambda: matrix)
        split = self.op("Reshape", x, blocks, label="Blocks")
        return self.op("Reshape", self.op("MatMul", split, factor, label="Mix"), flat, label="Flatten")

    def _rows(self, array: Array, part: int) -> Array:
        return array[part * self.rows : (part + 1) * self.rows]

    def _tensor(
        self, label: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[QuantizedInteger], Array]
    ) -> ir.Value:
        name = self.weight
        return self.editor.initializer(f"{name}.{label}", dtype, shape, lambda: make(self._load(name)))


class FusedIntegers:
    """`com.microsoft` MatMulIntegerToFloat; 16-bit activations are two rows of 8 bits in one product."""

    def __init__(self, editor: Editor, load: Callable[[str], QuantizedInteger]) -> None:
        self._editor = editor
        self._load = load

    def linear(self, x: ir.Value, weight: ir.Value, form: Integer, path: str, parts: int = 1) -> list[ir.Node]:
        """See `IntegerForm`."""
        write = _Writer(self._editor, self._load, weight, form, path, parts)
        inverse = None
        if form.spread:
            x, inverse = write.outputs(
                "SimplifiedLayerNormalization", x, write.inverse_smooth(), count=2, axis=-1, epsilon=EPSILON
            )
        if form.spread > 1:
            x = write.mixed(x)
        rounded = self._rounded(write, x)
        ends: list[list[ir.Node]] = []
        for part in range(parts):
            before = len(write.nodes)
            label = f"MatMulIntegerToFloat{suffix(part, parts)}"
            inputs = [rounded, write.data(part), write.step(), write.scales(part), write.middle()]
            result = write.op("MatMulIntegerToFloat", *inputs, domain="com.microsoft", label=label)
            if form.terms > 1:
                result = self._sum(write, result, suffix(part, parts))
            if inverse is not None:
                write.op("Div", result, inverse, label=f"Div{suffix(part, parts)}")
            ends.append(write.nodes[before:])
        nodes = write.nodes[: len(write.nodes) - sum(map(len, ends))]
        return [*nodes, *(node for end in ends for node in end[:-1]), *(end[-1] for end in ends)]

    def _rounded(self, write: _Writer, x: ir.Value) -> ir.Value:
        """Activations as uint8 [terms * B, S, K], the higher bytes first."""
        step, middle = write.step(), write.middle()
        if write.form.terms == 1:
            return write.op("QuantizeLinear", x, step, middle)
        coarse = write.number("coarse_step", lambda found: 256 * found.activation_scale)
        high = write.op("QuantizeLinear", x, coarse, middle, label="High")
        rest = write.op("Sub", x, write.op("DequantizeLinear", high, coarse, middle))
        return write.op("Concat", high, write.op("QuantizeLinear", rest, step, middle, label="Low"), axis=0)

    def _sum(self, write: _Writer, both: ir.Value, end: str) -> ir.Value:
        """Products of higher and lower bytes put together."""
        upper, lower = write.outputs("Split", both, count=2, label=f"Split{end}", axis=0, num_outputs=2)
        whole = write.op("Mul", upper, self._editor.scalar("two_to_the_8", 256.0), label=f"Mul{end}")
        return write.op("Add", whole, lower, label=f"Sum{end}")


class PortableIntegers:
    """QuantizeLinear, DequantizeLinear and MatMul, which runtimes join; 16-bit activations are not rounded at all."""

    def __init__(self, editor: Editor, load: Callable[[str], QuantizedInteger]) -> None:
        self._editor = editor
        self._load = load

    def linear(self, x: ir.Value, weight: ir.Value, form: Integer, path: str, parts: int = 1) -> list[ir.Node]:
        """See `IntegerForm`."""
        write = _Writer(self._editor, self._load, weight, form, path, parts)
        norm = None
        if form.spread:
            square = write.op("ReduceMean", write.op("Mul", x, x, label="Square"), self._editor.constant("last", [-1]))
            above = write.op("Add", square, self._editor.scalar("epsilon", EPSILON), label="Epsilon")  # Add is the bias
            norm = write.op("Sqrt", above)
            x = write.op("Mul", write.op("Div", x, norm), write.inverse_smooth(), label="Smooth")
        if form.spread > 1:
            x = write.mixed(x)
        if form.terms == 1:
            step, middle = write.step(), write.middle()
            x = write.op("DequantizeLinear", write.op("QuantizeLinear", x, step, middle), step, middle)
        ends = [suffix(part, parts) for part in range(parts)]
        wholes = [
            write.op("DequantizeLinear", write.data(part), write.scales(part), label=f"Weight{end}", axis=1)
            for part, end in enumerate(ends)
        ]
        results = [write.op("MatMul", x, whole, label=f"MatMul{end}") for whole, end in zip(wholes, ends, strict=True)]
        if norm is not None:
            for result, end in zip(results, ends, strict=True):
                write.op("Mul", result, norm, label=f"Mul{end}")
        return write.nodes
