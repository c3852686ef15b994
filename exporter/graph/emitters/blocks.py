"""How weights in blocks are written into a graph: for onnxruntime's own operators, or for standard ones.

Knows nothing of recipes; `lower.py` decides what is written in blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llm_edge.exporter.graph.editor import Array, Editor, name_of, shape_of
from llm_edge.exporter.quantization.blocks import QuantizedBlocks
from llm_edge.exporter.quantization.recipes import Blocks

_INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits: activations rounded to 8 bits, block by block


class BlockForm(Protocol):
    """Both make nodes, the last of which yield the results, that are not in the graph yet."""

    def linear(self, x: ir.Value, weight: ir.Value, form: Blocks, path: str, parts: int = 1) -> list[ir.Node]:
        """`x [B, S, K]` times the transpose of `weight [N, K]`, its rows in equal parts; a result for each."""

    def gather(self, weight: ir.Value, ids: ir.Value, form: Blocks, path: str) -> list[ir.Node]:
        """Rows `ids [B, S]` of `weight [V, K]`; K is a multiple of the block."""


class FusedBlocks:
    """`com.microsoft` MatMulNBits and GatherBlockQuantized; both read one and the same weight."""

    def __init__(self, editor: Editor, load: Callable[[str, Blocks], QuantizedBlocks]) -> None:
        self._editor = editor
        self._load = load

    def linear(self, x: ir.Value, weight: ir.Value, form: Blocks, path: str, parts: int = 1) -> list[ir.Node]:
        """See `BlockForm`."""
        rows, width = shape_of(weight)
        return [
            self._editor.node(
                "MatMulNBits",
                [x, *self._stored(weight, form, part, parts)],
                f"{path}/MatMulNBits{suffix(part, parts)}",
                domain="com.microsoft",
                K=width,
                N=rows // parts,
                bits=form.bits,
                block_size=form.size,
                accuracy_level=_INT8_ACTIVATIONS,
            )
            for part in range(parts)
        ]

    def gather(self, weight: ir.Value, ids: ir.Value, form: Blocks, path: str) -> list[ir.Node]:
        """See `BlockForm`."""
        data, *rest = self._stored(weight, form)
        shape = self._editor.constant(f"{path}/shape", [shape_of(weight)[0], -1])
        flat = self._editor.node("Reshape", [data, shape], f"{path}/Reshape")
        rows = self._editor.node(
            "GatherBlockQuantized",
            [flat.outputs[0], ids, *rest],
            f"{path}/GatherBlockQuantized",
            domain="com.microsoft",
            bits=form.bits,
            block_size=form.size,
            gather_axis=0,
            quantize_axis=1,
        )
        return [flat, rows]

    def _stored(self, weight: ir.Value, form: Blocks, part: int = 0, parts: int = 1) -> list[ir.Value]:
        """Data, scales and, for asymmetric blocks, zero points, in the layout of `QuantizedBlocks`."""
        name = name_of(weight)
        rows, width = shape_of(weight)
        rows //= parts
        blocks = form.count(width)
        tensors = [
            ("data", ir.DataType.UINT8, (rows, blocks, form.size * form.bits // 8)),
            ("scales", ir.DataType.FLOAT, (rows, blocks)),
        ]
        if not form.symmetric:
            tensors.append(("zero_points", ir.DataType.UINT8, (rows, -(-blocks * form.bits // 8))))

        def make(field: str) -> Array:
            array: Array = getattr(self._load(name, form), field)
            return array[part * rows : (part + 1) * rows]

        return [
            self._editor.initializer(
                f"{name}{suffix(part, parts)}.{field}", dtype, shape, functools.partial(make, field)
            )
            for field, dtype, shape in tensors
        ]


class PortableBlocks:
    """Standard operators: DequantizeLinear in blocks (opset 21) before MatMul or behind Gather.

    onnxruntime turns the pair DequantizeLinear + MatMul into its own kernel when it loads; for that the weight lies
    transposed, so an embedding tied to the head is stored twice.
    """

    def __init__(self, editor: Editor, load: Callable[[str, Blocks], QuantizedBlocks]) -> None:
        self._editor = editor
        self._load = load

    def linear(self, x: ir.Value, weight: ir.Value, form: Blocks, path: str, parts: int = 1) -> list[ir.Node]:
        """See `BlockForm`."""
        wholes, products = [], []
        for part in range(parts):
            end = suffix(part, parts)
            stored = self._stored(weight, form, True, part, parts)
            name = f"{path}/DequantizeLinear{end}"
            wholes.append(self._editor.node("DequantizeLinear", stored, name, axis=0, block_size=form.size))
            products.append(self._editor.node("MatMul", [x, wholes[-1].outputs[0]], f"{path}/MatMul{end}"))
        return [*wholes, *products]

    def gather(self, weight: ir.Value, ids: ir.Value, form: Blocks, path: str) -> list[ir.Node]:
        """See `BlockForm`."""
        parts = [
            self._editor.node("Gather", [part, ids], f"{path}/Gather_{index}", axis=0)
            for index, part in enumerate(self._stored(weight, form, False))
        ]
        rows = self._editor.node(
            "DequantizeLinear",
            [part.outputs[0] for part in parts],
            f"{path}/DequantizeLinear",
            axis=2,
            block_size=form.size,
        )
        return [*parts, rows]

    def _stored(
        self, weight: ir.Value, form: Blocks, transposed: bool, part: int = 0, parts: int = 1
    ) -> list[ir.Value | None]:
        """Data, scales and, for asymmetric blocks, zero points; [K, N] and [K / block, N] where transposed."""
        source = name_of(weight)
        name = source + suffix(part, parts) + (".transposed" if transposed else "")
        rows, width = shape_of(weight)
        rows //= parts
        blocks = form.count(width)
        middle = 1 << (form.bits - 1)
        signed = {8: (ir.DataType.INT8, np.int8), 4: (ir.DataType.INT4, ml_dtypes.int4)}
        unsigned = {8: (ir.DataType.UINT8, np.uint8), 4: (ir.DataType.UINT4, ml_dtypes.uint4)}
        dtype, numpy_type = (signed if form.symmetric else unsigned)[form.bits]

        def lay(array: Array) -> Array:
            array = array[part * rows : (part + 1) * rows]
            return np.ascontiguousarray(array.T) if transposed else array

        def data() -> Array:
            levels = self._load(source, form).levels()[:, :width]
            return lay((levels.astype(np.int16) - middle if form.symmetric else levels).astype(numpy_type))

        def scales() -> Array:
            return lay(self._load(source, form).scales)

        def zero_points() -> Array:
            return lay(self._load(source, form).zeros().astype(numpy_type))

        tensors = [("data", dtype, width, data), ("scales", ir.DataType.FLOAT, blocks, scales)]
        if not form.symmetric:
            tensors.append(("zero_points", dtype, blocks, zero_points))
        return [
            self._editor.initializer(f"{name}.{part}", kind, (length, rows) if transposed else (rows, length), make)
            for part, kind, length, make in tensors
        ]


def suffix(part: int, parts: int) -> str:
    """What tells the parts of a weight apart in names."""
    return "" if parts == 1 else f"_{part}"
