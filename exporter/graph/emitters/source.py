"""How weights that a source holds in blocks are written into a graph, with the source's own numbers.

Blocks with a scale are what `block_forms.py` writes, and nothing is rounded once more. An offset per block is out of
reach of the fast kernels; it adds to a product the sums of the inputs block by block, times the offsets. Knows nothing
of recipes or of sources' formats; `lower.py` decides what is written so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.graph.editor import Editor, name_of, shape_of
from llm_edge.exporter.graph.emitters.blocks import BlockForm, FusedBlocks, PortableBlocks, suffix
from llm_edge.exporter.quantization.blocks import QuantizedBlocks
from llm_edge.exporter.quantization.recipes import Blocks
from llm_edge.model.block_weights import SOURCE_BLOCK, BlockKind
from llm_edge.model.weights import Weights
from llm_edge.runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class _Stored:
    """A weight [N, K]: its blocks, and their offsets, float32 [K / 32, N]."""

    blocks: QuantizedBlocks
    offsets: npt.NDArray[np.float32] | None


class SourceForm:
    """Makes nodes, the last of which yield the results, that are not in the graph yet."""

    def __init__(self, editor: Editor, weights: Mapping[str, Tensor], fused: bool) -> None:
        self._editor = editor
        self._weights = weights
        self._fused = fused
        self._load = functools.lru_cache(maxsize=1)(self._read)
        self._blocks: BlockForm = (FusedBlocks if fused else PortableBlocks)(
            editor, lambda name, form: self._load(name, form.bits).blocks
        )

    def kind(self, weight: ir.Value) -> BlockKind | None:
        """What the source's blocks of a weight hold; None where it has none."""
        return self._weights.block_kind(name_of(weight)) if isinstance(self._weights, Weights) else None

    def linear(self, x: ir.Value, weight: ir.Value, path: str, parts: int = 1) -> list[ir.Node]:
        """`x [B, S, K]` times the transpose of `weight [N, K]`, its rows in equal parts; a result for each."""
        kind = self._kind(weight)
        nodes = self._blocks.linear(x, weight, _form(kind.bits), path, parts)
        if not kind.offsets:
            return nodes
        products = nodes[-parts:]
        blocks = self._node("Reshape", [x, self._per_block()], f"{path}/Blocks")  # [B, S, K / 32, 32]
        last = self._editor.constant("last", [-1])
        sums = self._editor.node("ReduceSum", [blocks.outputs[0], last], f"{path}/ReduceSum", keepdims=0)
        nodes += [blocks, sums]
        ends = [suffix(part, parts) for part in range(parts)]
        added = [
            self._node("MatMul", [sums.outputs[0], self._offsets(weight, part, parts)], f"{path}/Offsets{end}")
            for part, end in enumerate(ends)
        ]
        results = [
            self._node("Add", [product.outputs[0], more.outputs[0]], f"{path}/Add{end}")
            for product, more, end in zip(products, added, ends, strict=True)
        ]
        return [*nodes, *added, *results]

    def gather(self, weight: ir.Value, ids: ir.Value, path: str) -> list[ir.Node]:
        """Rows `ids [B, S]` of `weight [V, K]`."""
        kind = self._kind(weight)
        # onnxruntime's Gather takes no 4-bit tensors; in 8 bits the numbers are the same.
        nodes = self._blocks.gather(weight, ids, _form(kind.bits if self._fused else 8), path)
        if not kind.offsets:
            return nodes
        picked = self._editor.node("Gather", [self._offsets(weight), ids], f"{path}/Offsets", axis=1)
        turned = ir.node("Transpose", [picked.outputs[0]], {"perm": [1, 2, 0]}, name=f"{path}/Transpose")
        turned.outputs[0].name = f"{turned.name}/output_0"  # [B, S, K / 32]
        column = self._node("Unsqueeze", [turned.outputs[0], self._editor.constant("last", [-1])], f"{path}/Unsqueeze")
        blocks = self._node("Reshape", [nodes[-1].outputs[0], self._per_block()], f"{path}/Blocks")
        moved = self._node("Add", [blocks.outputs[0], column.outputs[0]], f"{path}/Add")
        flat = self._node("Reshape", [moved.outputs[0], self._editor.constant("flat", [0, 0, -1])], f"{path}/Flatten")
        return [*nodes, picked, turned, column, blocks, moved, flat]

    def _node(self, kind: str, inputs: list[ir.Value | None], name: str) -> ir.Node:
        return self._editor.node(kind, inputs, name)

    def _per_block(self) -> ir.Value:
        return self._editor.constant(f"blocks_of_{SOURCE_BLOCK}", [0, 0, -1, SOURCE_BLOCK])

    def _offsets(self, weight: ir.Value, part: int = 0, parts: int = 1) -> ir.Value:
        """Of a part of the rows, float32 [K / 32, N]."""
        name, kind = name_of(weight), self._kind(weight)
        rows, width = shape_of(weight)
        rows //= parts

        def make() -> npt.NDArray[np.float32]:
            offsets = self._load(name, kind.bits).offsets
            assert offsets is not None
            return np.ascontiguousarray(offsets[:, part * rows : (part + 1) * rows])

        shape = (width // SOURCE_BLOCK, rows)
        return self._editor.initializer(f"{name}{suffix(part, parts)}.offsets", ir.DataType.FLOAT, shape, make)

    def _kind(self, weight: ir.Value) -> BlockKind:
        kind = self.kind(weight)
        assert kind is not None
        return kind

    def _read(self, name: str, bits: int) -> _Stored:
        """Read a weight and lay it out as MatMulNBits has it, in `bits` a weight which are its own, or 8."""
        assert isinstance(self._weights, Weights)
        kind, found = self._weights.block_kind(name), self._weights.blocks(name)
        assert kind is not None
        for numbers in (found.scales, found.offsets):
            if numbers is not None and not numbers.isfinite().all():
                raise CheckpointError(f"{name}: scales that are no numbers (NaN, infinity): the checkpoint is damaged")
        levels = found.levels.numpy()
        if bits == 4:
            levels = levels[:, ::2] | levels[:, 1::2] << 4
        elif kind.bits == 4:
            levels = levels + np.uint8(128 - 8)
        blocks = QuantizedBlocks(levels.reshape(*found.scales.shape, -1), found.scales.numpy(), None, bits)
        return _Stored(blocks, None if found.offsets is None else found.offsets.numpy().T)


def _form(bits: int) -> Blocks:
    return Blocks(bits, SOURCE_BLOCK, symmetric=True)
