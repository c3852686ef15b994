"""How weights in blocks are written into a graph: for onnxruntime's own operators, or for standard ones.

Knows nothing of recipes; `lower.py` decides what is written in blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.editor import Array, Editor, name_of, shape_of
from llm_edge.exporter.quantize import QuantizedBlocks, quantize_blocks
from llm_edge.exporter.recipes import Blocks
from llm_edge.runtime.errors import CheckpointError

_INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits: activations rounded to 8 bits, block by block


class BlockForm(Protocol):
    """Both make nodes, the last of which yields the result, that are not in the graph yet."""

    def linear(self, x: ir.Value, weight: ir.Value, form: Blocks, path: str) -> list[ir.Node]:
        """`x [B, S, K]` times the transpose of `weight [N, K]`."""

    def gather(self, weight: ir.Value, ids: ir.Value, form: Blocks, path: str) -> list[ir.Node]:
        """Rows `ids [B, S]` of `weight [V, K]`; K is a multiple of the block."""


class _Rounded:
    """Rounds weights when they are written. Data, scales and zero points follow each other: one rounding for all."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._round = functools.lru_cache(maxsize=1)(self._quantize)

    def __call__(self, weight: ir.Value, form: Blocks) -> QuantizedBlocks:
        return self._round(name_of(weight), form)

    def _quantize(self, name: str, form: Blocks) -> QuantizedBlocks:
        try:
            return quantize_blocks(self._weights[name], form)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error


class FusedBlocks:
    """`com.microsoft` MatMulNBits and GatherBlockQuantized; both read one and the same weight."""

    def __init__(self, editor: Editor, weights: Mapping[str, Tensor]) -> None:
        self._editor = editor
        self._rounded = _Rounded(weights)

    def linear(self, x: ir.Value, weight: ir.Value, form: Blocks, path: str) -> list[ir.Node]:
        """See `BlockForm`."""
        rows, width = shape_of(weight)
        product = self._editor.node(
            "MatMulNBits",
            [x, *self._stored(weight, form)],
            f"{path}/MatMulNBits",
            domain="com.microsoft",
            K=width,
            N=rows,
            bits=form.bits,
            block_size=form.size,
            accuracy_level=_INT8_ACTIVATIONS,
        )
        return [product]

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

    def _stored(self, weight: ir.Value, form: Blocks) -> list[ir.Value]:
        """Data, scales and, for asymmetric blocks, zero points, in the layout of `QuantizedBlocks`."""
        name = name_of(weight)
        rows, width = shape_of(weight)
        blocks = form.count(width)
        tensors = [
            ("data", ir.DataType.UINT8, (rows, blocks, form.size * form.bits // 8)),
            ("scales", ir.DataType.FLOAT, (rows, blocks)),
        ]
        if not form.symmetric:
            tensors.append(("zero_points", ir.DataType.UINT8, (rows, -(-blocks * form.bits // 8))))

        def make(part: str) -> Array:
            array: Array = getattr(self._rounded(weight, form), part)
            return array

        return [
            self._editor.initializer(f"{name}.{part}", dtype, shape, functools.partial(make, part))
            for part, dtype, shape in tensors
        ]


class PortableBlocks:
    """Standard operators: DequantizeLinear in blocks (opset 21) before MatMul or behind Gather.

    onnxruntime turns the pair DequantizeLinear + MatMul into its own kernel when it loads; for that the weight lies
    transposed, so an embedding tied to the head is stored twice.
    """

    def __init__(self, editor: Editor, weights: Mapping[str, Tensor]) -> None:
        self._editor = editor
        self._rounded = _Rounded(weights)

    def linear(self, x: ir.Value, weight: ir.Value, form: Blocks, path: str) -> list[ir.Node]:
        """See `BlockForm`."""
        whole = self._editor.node(
            "DequantizeLinear",
            self._stored(weight, form, transposed=True),
            f"{path}/DequantizeLinear",
            axis=0,
            block_size=form.size,
        )
        product = self._editor.node("MatMul", [x, whole.outputs[0]], f"{path}/MatMul")
        return [whole, product]

    def gather(self, weight: ir.Value, ids: ir.Value, form: Blocks, path: str) -> list[ir.Node]:
        """See `BlockForm`."""
        parts = [
            self._editor.node("Gather", [part, ids], f"{path}/Gather_{index}", axis=0)
            for index, part in enumerate(self._stored(weight, form, transposed=False))
        ]
        rows = self._editor.node(
            "DequantizeLinear",
            [part.outputs[0] for part in parts],
            f"{path}/DequantizeLinear",
            axis=2,
            block_size=form.size,
        )
        return [*parts, rows]

    def _stored(self, weight: ir.Value, form: Blocks, transposed: bool) -> list[ir.Value | None]:
        """Data, scales and, for asymmetric blocks, zero points; [K, N] and [K / block, N] where transposed."""
        name = name_of(weight) + (".transposed" if transposed else "")
        rows, width = shape_of(weight)
        blocks = form.count(width)
        middle = 1 << (form.bits - 1)
        signed = {8: (ir.DataType.INT8, np.int8), 4: (ir.DataType.INT4, ml_dtypes.int4)}
        unsigned = {8: (ir.DataType.UINT8, np.uint8), 4: (ir.DataType.UINT4, ml_dtypes.uint4)}
        dtype, numpy_type = (signed if form.symmetric else unsigned)[form.bits]

        def lay(array: Array) -> Array:
            return np.ascontiguousarray(array.T) if transposed else array

        def data() -> Array:
            levels = self._rounded(weight, form).levels()[:, :width]
            return lay((levels.astype(np.int16) - middle if form.symmetric else levels).astype(numpy_type))

        def scales() -> Array:
            return lay(self._rounded(weight, form).scales)

        def zero_points() -> Array:
            return lay(self._rounded(weight, form).zeros().astype(numpy_type))

        tensors = [("data", dtype, width, data), ("scales", ir.DataType.FLOAT, blocks, scales)]
        if not form.symmetric:
            tensors.append(("zero_points", dtype, blocks, zero_points))
        return [
            self._editor.initializer(f"{name}.{part}", kind, (length, rows) if transposed else (rows, length), make)
            for part, kind, length, make in tensors
        ]
