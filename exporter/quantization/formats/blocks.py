"""The format `Blocks`: weights quantized in blocks along the input axis."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.graph.editor import Array, name_of, shape_of
from llm_edge.exporter.graph.emitter import EmitContext, Emitter, split_suffix
from llm_edge.exporter.quantization.blocks import BlockLayout, QuantizedBlocks, quantize_blocks
from llm_edge.exporter.quantization.formats.base import ObservedInputs, WeightFormat, naming

_MIN_SIZE = 16  # smallest block of MatMulNBits
INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits: activations are quantized to 8 bits, block by block


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
    def prefill_cost(self) -> float:
        return 3.0 + 1.0 / self.size  # smaller blocks have more scales to apply

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
        with naming(name):
            return quantize_blocks(weights[name], self)

    def calibrate(self, weight: Tensor, observed: ObservedInputs) -> QuantizedBlocks:
        return quantize_blocks(weight, self, observed.hessian)

    def emitter(self, context: EmitContext) -> Emitter[BlockLayout]:
        return block_emitter(context, self)


def block_emitter(context: EmitContext, layout: BlockLayout) -> Emitter[BlockLayout]:
    """Return the emitter of weights in blocks; `context.load` returns them as `QuantizedBlocks`."""
    return (FusedBlocks if context.fused else PortableBlocks)(context, layout)


class FusedBlocks(Emitter[BlockLayout]):
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
                bits=self._format.bits,
                block_size=self._format.size,
                accuracy_level=INT8_ACTIVATIONS,
            )
            for index in range(num_splits)
        ]

    def gather(self, weight: ir.Value, ids: ir.Value, path: str) -> list[ir.Node] | None:
        vocab, width = shape_of(weight)
        if width % self._format.size:
            return None
        data, *scales = self._initializers(weight)
        shape = self._editor.constant(f"{path}/shape", [vocab, -1])
        flat = self._editor.node("Reshape", [data, shape], f"{path}/Reshape")
        rows = self._editor.node(
            "GatherBlockQuantized",
            [flat.outputs[0], ids, *scales],
            f"{path}/GatherBlockQuantized",
            domain="com.microsoft",
            bits=self._format.bits,
            block_size=self._format.size,
            gather_axis=0,
            quantize_axis=1,
        )
        return [flat, rows]

    def _initializers(self, weight: ir.Value, index: int = 0, num_splits: int = 1) -> list[ir.Value]:
        """Return data, scales and, for asymmetric blocks, zero points, in the layout of `QuantizedBlocks`."""
        name, layout = name_of(weight), self._format
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


class PortableBlocks(Emitter[BlockLayout]):
    """Standard operators: blockwise DequantizeLinear (opset 21) before MatMul or after Gather.

    onnxruntime fuses the pair DequantizeLinear and MatMul when it loads the graph. That requires a transposed weight,
    so that an embedding tied to the head is stored twice; with a byte per weight, since Gather does not support 4 bits.
    """

    def linear(self, x: ir.Value, weight: ir.Value, path: str, num_splits: int = 1) -> list[ir.Node]:
        weights, products = [], []
        for index in range(num_splits):
            suffix = split_suffix(index, num_splits)
            stored = self._initializers(weight, True, index, num_splits)
            name = f"{path}/DequantizeLinear{suffix}"
            weights.append(self._editor.node("DequantizeLinear", stored, name, axis=0, block_size=self._format.size))
            products.append(self._editor.node("MatMul", [x, weights[-1].outputs[0]], f"{path}/MatMul{suffix}"))
        return [*weights, *products]

    def gather(self, weight: ir.Value, ids: ir.Value, path: str) -> list[ir.Node] | None:
        if shape_of(weight)[1] % self._format.size:
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
            block_size=self._format.size,
        )
        return [*gathered, rows]

    def _initializers(
        self, weight: ir.Value, transposed: bool, index: int = 0, num_splits: int = 1
    ) -> list[ir.Value | None]:
        """Return data, scales and, for asymmetric blocks, zero points; [K, N] and [K / block, N] if transposed."""
        name, layout = name_of(weight), self._format
        prefix = name + split_suffix(index, num_splits) + (".transposed" if transposed else "")
        rows, width = shape_of(weight)
        rows //= num_splits
        blocks = layout.num_blocks(width)
        signed = {8: (ir.DataType.INT8, np.int8), 4: (ir.DataType.INT4, ml_dtypes.int4)}
        unsigned = {8: (ir.DataType.UINT8, np.uint8), 4: (ir.DataType.UINT4, ml_dtypes.uint4)}
        dtype, numpy_type = (signed if layout.symmetric else unsigned)[layout.bits if transposed else 8]

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
