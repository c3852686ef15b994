"""Emitter of weights that a quantized source stores in blocks, without quantizing them again.

Blocks with a scale are written by the emitters of `blocks.py`. The fast kernels do not support an offset per block;
its contribution is the sum of the inputs in each block times the offsets, a small float32 matmul.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llm_edge.exporter.graph.editor import name_of, shape_of
from llm_edge.exporter.graph.emitters.base import EmitContext, Emitter, split_suffix
from llm_edge.exporter.graph.emitters.blocks import BlockEmitter, FusedBlocks, PortableBlocks
from llm_edge.exporter.quantization.blocks import BlockLayout, QuantizedBlocks
from llm_edge.model.block_weights import SOURCE_BLOCK, BlockKind

Offsets = npt.NDArray[np.float32]


class OriginalBlocksEmitter(Emitter):
    """Blocks of 32 weights, with offsets if the source has them.

    Args:
        context: the graph to write.
        kind: bits of the blocks, and whether they have offsets.
        load: returns blocks and offsets, float32 [K / 32, N], by initializer name.
    """

    def __init__(
        self, context: EmitContext, kind: BlockKind, load: Callable[[str], tuple[QuantizedBlocks, Offsets | None]]
    ) -> None:
        self._editor = context.editor
        self._fused = context.fused
        self._kind = kind
        self._load = load

    def linear(self, x: ir.Value, weight: ir.Value, path: str, num_splits: int = 1) -> list[ir.Node]:
        nodes = self._block_emitter(self._kind.bits).linear(x, weight, path, num_splits)
        if not self._kind.offsets:
            return nodes
        products = nodes[-num_splits:]
        blocks = self._node("Reshape", [x, self._block_shape()], f"{path}/Blocks")  # [B, S, K / 32, 32]
        last = self._editor.constant("last", [-1])
        sums = self._editor.node("ReduceSum", [blocks.outputs[0], last], f"{path}/ReduceSum", keepdims=0)
        suffixes = [split_suffix(index, num_splits) for index in range(num_splits)]
        contributions = [
            self._node("MatMul", [sums.outputs[0], self._offsets(weight, index, num_splits)], f"{path}/Offsets{suffix}")
            for index, suffix in enumerate(suffixes)
        ]
        results = [
            self._node("Add", [product.outputs[0], contribution.outputs[0]], f"{path}/Add{suffix}")
            for product, contribution, suffix in zip(products, contributions, suffixes, strict=True)
        ]
        return [*nodes, blocks, sums, *contributions, *results]

    def gather(self, weight: ir.Value, ids: ir.Value, path: str) -> list[ir.Node] | None:
        # onnxruntime's Gather does not support 4-bit tensors: portable graphs store the same numbers in 8 bits.
        nodes = self._block_emitter(self._kind.bits if self._fused else 8).gather(weight, ids, path)
        if nodes is None or not self._kind.offsets:
            return nodes
        gathered = self._editor.node("Gather", [self._offsets(weight), ids], f"{path}/Offsets", axis=1)
        transposed = ir.node("Transpose", [gathered.outputs[0]], {"perm": [1, 2, 0]}, name=f"{path}/Transpose")
        transposed.outputs[0].name = f"{transposed.name}/output_0"  # [B, S, K / 32]
        last = self._editor.constant("last", [-1])
        column = self._node("Unsqueeze", [transposed.outputs[0], last], f"{path}/Unsqueeze")
        blocks = self._node("Reshape", [nodes[-1].outputs[0], self._block_shape()], f"{path}/Blocks")
        shifted = self._node("Add", [blocks.outputs[0], column.outputs[0]], f"{path}/Add")
        shape = self._editor.constant("flat", [0, 0, -1])
        flat = self._node("Reshape", [shifted.outputs[0], shape], f"{path}/Flatten")
        return [*nodes, gathered, transposed, column, blocks, shifted, flat]

    def _block_emitter(self, bits: int) -> BlockEmitter:
        emitter = FusedBlocks if self._fused else PortableBlocks
        layout = BlockLayout(bits, SOURCE_BLOCK, symmetric=True)
        return emitter(self._editor, layout, lambda name: self._load(name)[0])

    def _node(self, kind: str, inputs: list[ir.Value | None], name: str) -> ir.Node:
        return self._editor.node(kind, inputs, name)

    def _block_shape(self) -> ir.Value:
        return self._editor.constant(f"blocks_of_{SOURCE_BLOCK}", [0, 0, -1, SOURCE_BLOCK])

    def _offsets(self, weight: ir.Value, index: int = 0, num_splits: int = 1) -> ir.Value:
        """Return the offsets of a split of the rows, float32 [K / 32, N]."""
        name = name_of(weight)
        rows, width = shape_of(weight)
        rows //= num_splits

        def values() -> Offsets:
            _, offsets = self._load(name)
            assert offsets is not None
            return np.ascontiguousarray(offsets[:, index * rows : (index + 1) * rows])

        initializer_name = f"{name}{split_suffix(index, num_splits)}.offsets"
        return self._editor.initializer(initializer_name, ir.DataType.FLOAT, (width // SOURCE_BLOCK, rows), values)
