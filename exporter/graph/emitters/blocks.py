"""Emitters of weights in blocks, for onnxruntime's own operators and for standard ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llm_edge.exporter.graph.editor import Array, Editor, name_of, shape_of
from llm_edge.exporter.graph.emitters.base import Emitter, split_suffix
from llm_edge.exporter.quantization.blocks import BlockLayout, QuantizedBlocks

_INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits: activations are quantized to 8 bits, block by block


class BlockEmitter(Emitter):
    """Base of both emitters.

    Args:
        editor: of the graph.
        layout: of the blocks.
        load: returns a quantized weight by initializer name.
    """

    def __init__(self, editor: Editor, layout: BlockLayout, load: Callable[[str], QuantizedBlocks]) -> None:
        self._editor = editor
        self._layout = layout
        self._load = load


class FusedBlocks(BlockEmitter):
    """`com.microsoft` MatMulNBits and GatherBlockQuantized; both can read the same stored weight."""

    def linear(self, x: ir.Value, weight: ir.Value, path: str, num_splits: int = 1) -> list[ir.Node]:
        rows, width = shape_of(weight)
        return [
            self._editor.node(
                "MatMulNBits",
                [x, *self._initializers(weight, index, num_splits)],
                f"{path}/MatMulNBits{split_suffix(index, num_splits)}",
                domain="com.microsoft",
                K=width,
                N=rows // num_splits,
                bits=self._layout.bits,
                block_size=self._layout.size,
                accuracy_level=_INT8_ACTIVATIONS,
            )
            for index in range(num_splits)
        ]

    def gather(self, weight: ir.Value, ids: ir.Value, path: str) -> list[ir.Node] | None:
        vocab, width = shape_of(weight)
        if width % self._layout.size:
            return None
        data, *scales = self._initializers(weight)
        shape = self._editor.constant(f"{path}/shape", [vocab, -1])
        flat = self._editor.node("Reshape", [data, shape], f"{path}/Reshape")
        rows = self._editor.node(
            "GatherBlockQuantized",
            [flat.outputs[0], ids, *scales],
            f"{path}/GatherBlockQuantized",
            domain="com.microsoft",
            bits=self._layout.bits,
            block_size=self._layout.size,
            gather_axis=0,
            quantize_axis=1,
        )
        return [flat, rows]

    def _initializers(self, weight: ir.Value, index: int = 0, num_splits: int = 1) -> list[ir.Value]:
        """Return data, scales and, for asymmetric blocks, zero points, in the layout of `QuantizedBlocks`."""
        name, layout = name_of(weight), self._layout
        rows, width = shape_of(weight)
        rows //= num_splits
        blocks = layout.num_blocks(width)
        tensors = [
            ("data", ir.DataType.UINT8, (rows, blocks, layout.size * layout.bits // 8)),
            ("scales", ir.DataType.FLOAT, (rows, blocks)),
        ]
        if not layout.symmetric:
            tensors.append(("zero_points", ir.DataType.UINT8, (rows, -(-blocks * layout.bits // 8))))

        def values(field: str) -> Array:
            array: Array = getattr(self._load(name), field)
            return array[index * rows : (index + 1) * rows]

        prefix = name + split_suffix(index, num_splits)
        return [
            self._editor.initializer(f"{prefix}.{field}", dtype, shape, functools.partial(values, field))
            for field, dtype, shape in tensors
        ]


class PortableBlocks(BlockEmitter):
    """Standard operators: blockwise DequantizeLinear (opset 21) before MatMul or after Gather.

    onnxruntime fuses the pair DequantizeLinear and MatMul when it loads the graph. That requires a transposed weight,
    so that an embedding tied to the head is stored twice.
    """

    def linear(self, x: ir.Value, weight: ir.Value, path: str, num_splits: int = 1) -> list[ir.Node]:
        weights, products = [], []
        for index in range(num_splits):
            suffix = split_suffix(index, num_splits)
            stored = self._initializers(weight, True, index, num_splits)
            name = f"{path}/DequantizeLinear{suffix}"
            weights.append(self._editor.node("DequantizeLinear", stored, name, axis=0, block_size=self._layout.size))
            products.append(self._editor.node("MatMul", [x, weights[-1].outputs[0]], f"{path}/MatMul{suffix}"))
        return [*weights, *products]

    def gather(self, weight: ir.Value, ids: ir.Value, path: str) -> list[ir.Node] | None:
        if shape_of(weight)[1] % self._layout.size:
            return None
        gathered = [
            self._editor.node("Gather", [tensor, ids], f"{path}/Gather_{index}", axis=0)
            for index, tensor in enumerate(self._initializers(weight, False))
        ]
        rows = self._editor.node(
            "DequantizeLinear",
            [node.outputs[0] for node in gathered],
            f"{path}/DequantizeLinear",
            axis=2,
            block_size=self._layout.size,
        )
        return [*gathered, rows]

    def _initializers(
        self, weight: ir.Value, transposed: bool, index: int = 0, num_splits: int = 1
    ) -> list[ir.Value | None]:
        """Return data, scales and, for asymmetric blocks, zero points; [K, N] and [K / block, N] if transposed."""
        name, layout = name_of(weight), self._layout
        prefix = name + split_suffix(index, num_splits) + (".transposed" if transposed else "")
        rows, width = shape_of(weight)
        rows //= num_splits
        blocks = layout.num_blocks(width)
        signed = {8: (ir.DataType.INT8, np.int8), 4: (ir.DataType.INT4, ml_dtypes.int4)}
        unsigned = {8: (ir.DataType.UINT8, np.uint8), 4: (ir.DataType.UINT4, ml_dtypes.uint4)}
        dtype, numpy_type = (signed if layout.symmetric else unsigned)[layout.bits]

        def arrange(array: Array) -> Array:
            array = array[index * rows : (index + 1) * rows]
            return np.ascontiguousarray(array.T) if transposed else array

        def data() -> Array:
            quantized = self._load(name)
            levels = quantized.levels()[:, :width]
            if layout.symmetric:  # the stored weight may have fewer bits than the layout
                return arrange((levels.astype(np.int16) - (1 << (quantized.bits - 1))).astype(numpy_type))
            return arrange(levels.astype(numpy_type))

        def scales() -> Array:
            return arrange(self._load(name).scales)

        def zero_points() -> Array:
            return arrange(self._load(name).zeros().astype(numpy_type))

        tensors = [("data", dtype, width, data), ("scales", ir.DataType.FLOAT, blocks, scales)]
        if not layout.symmetric:
            tensors.append(("zero_points", dtype, blocks, zero_points))
        return [
            self._editor.initializer(f"{prefix}.{field}", kind, (length, rows) if transposed else (rows, length), make)
            for field, kind, length, make in tensors
        ]
