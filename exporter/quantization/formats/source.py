"""The formats `Source` and `OriginalBlocks`: weights of a quantized source, unchanged.

Blocks with a scale and perhaps a zero point are written like `Blocks`. The fast kernels do not support an offset per
block; its contribution is the sum of the inputs in each block times the offsets, a small float32 matmul.

The kernels round activations to 8 bits, block by block, which costs more fidelity than the blocks of most sources have
lost (mean KL 0.003 to 0.004). Fused graphs therefore multiply the activations and what rounding takes from them in one
matmul of two rows, whose products are added. An identity matrix in blocks returns the activations as the kernels round
them, whatever the rounding is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.graph.editor import Array, name_of, shape_of
from llm_edge.exporter.graph.emitter import EmitContext, Emitter, split_suffix
from llm_edge.exporter.quantization.blocks import BlockLayout, QuantizedBlocks, pack
from llm_edge.exporter.quantization.formats.base import WeightFormat
from llm_edge.exporter.quantization.formats.blocks import INT8_ACTIVATIONS, block_emitter
from llm_edge.model.block_weights import BlockKind
from llm_edge.model.weights import Weights
from llm_edge.runtime.errors import CheckpointError

Offsets = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class OriginalBlocks(WeightFormat):
    """Blocks of 4- or 8-bit weights as the source stores them, with a scale and perhaps an offset or a zero point."""

    bits: int
    size: int
    offsets: bool
    zeros: bool = False

    kind: ClassVar[str] = "original_blocks"

    @property
    def bytes_per_weight(self) -> float:
        zero = self.bits / 8 if self.zeros else 0
        return self.bits / 8 + ((2 if self.offsets else 1) * 4 + zero) / self.size

    @property
    def label(self) -> str:
        return f"int{self.bits}-{self.size}{'o' if self.offsets else 'z' if self.zeros else ''}"

    def __str__(self) -> str:
        more = ", offsets" if self.offsets else ", zero points" if self.zeros else ""
        return f"int{self.bits} blocks of {self.size}{more}"

    def quantize(self, weights: Mapping[str, Tensor], name: str) -> tuple[QuantizedBlocks, Offsets | None]:
        """Read the blocks and their offsets, float32 [K / block, N]."""
        assert isinstance(weights, Weights)
        source = weights.blocks(name)
        for values in (source.scales, source.offsets):
            if values is not None and not values.isfinite().all():
                raise CheckpointError(f"{name}: a scale is NaN or infinity: the checkpoint is damaged")
        data = pack(source.levels.reshape(*source.scales.shape, -1), self.bits)
        zeros = None if source.zeros is None else pack(source.zeros, self.bits)
        blocks = QuantizedBlocks(data, source.scales.numpy(), zeros, self.bits)
        return blocks, None if source.offsets is None else source.offsets.numpy().T

    def emitter(self, context: EmitContext) -> Emitter[OriginalBlocks]:
        return OriginalBlocksEmitter(context, self)


@dataclass(frozen=True, slots=True)
class Source(WeightFormat):
    """`OriginalBlocks` for weights that the source stores in blocks, the format `otherwise` for the others."""

    otherwise: WeightFormat

    kind: ClassVar[str] = "source"
    needs_source_blocks: ClassVar[bool] = True

    @property
    def bytes_per_weight(self) -> float:
        return self.otherwise.bytes_per_weight

    @property
    def label(self) -> str:
        return "source"

    def __str__(self) -> str:
        return f"the source's own blocks, else {self.otherwise}"

    def for_source(self, kind: BlockKind | None) -> WeightFormat:
        return self.otherwise if kind is None else OriginalBlocks(kind.bits, kind.size, kind.offsets, kind.zeros)

    def emitter(self, context: EmitContext) -> Emitter[Source]:  # noqa: ARG002
        raise TypeError("call for_source first: a weight is stored in blocks or otherwise")


class OriginalBlocksEmitter(Emitter[OriginalBlocks]):
    """Blocks of weights, and the contribution of their offsets if they have any."""

    def linear(self, x: ir.Value, weight: ir.Value, path: str, num_splits: int = 1) -> list[ir.Node]:
        nodes: list[ir.Node] = []
        suffixes = [split_suffix(index, num_splits) for index in range(num_splits)]
        sums = self._block_sums(nodes, x, path) if self._format.offsets else None
        inputs = self._with_remainder(nodes, x, path) if self._context.fused else x
        nodes += self._block_emitter(self._format.bits).linear(inputs, weight, path, num_splits)
        results = [node.outputs[0] for node in nodes[-num_splits:]]
        if self._context.fused:
            halves = [
                self._add(nodes, "Split", [result], f"{path}/Split{suffix}", outputs=2, axis=0, num_outputs=2)
                for result, suffix in zip(results, suffixes, strict=True)
            ]
            results = [
                self._add(nodes, "Add", pair, f"{path}/Sum{suffix}")[0]
                for pair, suffix in zip(halves, suffixes, strict=True)
            ]
        if sums is not None:
            contributions = [
                self._add(nodes, "MatMul", [sums, self._offsets(weight, i, num_splits)], f"{path}/Offsets{suffix}")[0]
                for i, suffix in enumerate(suffixes)
            ]
            for pair, suffix in zip(zip(results, contributions, strict=True), suffixes, strict=True):
                self._add(nodes, "Add", pair, f"{path}/Add{suffix}")
        return nodes

    def _with_remainder(self, nodes: list[ir.Node], x: ir.Value, path: str) -> ir.Value:
        """Return the activations and, as a second batch, what rounding takes from them: [2 * B, S, K]."""
        size = self._format.size
        rows = self._add(nodes, "Reshape", [x, self._block_shape()], f"{path}/Rows")  # [B, S, K / block, block]
        rounded = self._add(
            nodes,
            "MatMulNBits",
            [rows[0], *self._identity()],
            f"{path}/Rounded",
            domain="com.microsoft",
            K=size,
            N=size,
            bits=4,
            block_size=size,
            accuracy_level=INT8_ACTIVATIONS,
        )
        flat = self._add(nodes, "Reshape", [rounded[0], self._editor.constant("flat", [0, 0, -1])], f"{path}/Flat")
        remainder = self._add(nodes, "Sub", [x, flat[0]], f"{path}/Remainder")
        return self._add(nodes, "Concat", [x, remainder[0]], f"{path}/Concat", axis=0)[0]

    def _identity(self) -> list[ir.Value]:
        """Return data and scales of the identity matrix as one 4-bit block per row, whose zero is 8."""
        size = self._format.size

        def data() -> Array:
            levels = 8 + np.eye(size, dtype=np.uint8)
            return (levels[:, None, ::2] | levels[:, None, 1::2] << 4).astype(np.uint8)

        name, ones = f"identity_{size}", np.ones((size, 1), np.float32)
        return [
            self._editor.initializer(f"{name}.data", ir.DataType.UINT8, (size, 1, size // 2), data),
            self._editor.initializer(f"{name}.scales", ir.DataType.FLOAT, ones.shape, lambda: ones),
        ]

    def _block_sums(self, nodes: list[ir.Node], x: ir.Value, path: str) -> ir.Value:
        """Return the sum of the inputs in each block, [B, S, K / block]."""
        blocks = self._add(nodes, "Reshape", [x, self._block_shape()], f"{path}/Blocks")
        last = self._editor.constant("last", [-1])
        return self._add(nodes, "ReduceSum", [blocks[0], last], f"{path}/ReduceSum", keepdims=0)[0]

    def _add(
        self, nodes: list[ir.Node], kind: str, inputs: Sequence[ir.Value], name: str, **options: Any
    ) -> Sequence[ir.Value]:
        """Append a node; returns its outputs. `options` are further arguments of `Editor.node`."""
        nodes.append(self._editor.node(kind, inputs, name, **options))
        return nodes[-1].outputs

    def gather(self, weight: ir.Value, ids: ir.Value, path: str) -> list[ir.Node] | None:
        # onnxruntime's Gather does not support 4-bit tensors: portable graphs store the same numbers in 8 bits.
        nodes = self._block_emitter(self._format.bits if self._context.fused else 8).gather(weight, ids, path)
        if nodes is None or not self._format.offsets:
            return nodes
        gathered = self._editor.node("Gather", [self._offsets(weight), ids], f"{path}/Offsets", axis=1)
        transposed = self._editor.node(  # [B, S, K / block]
            "Transpose", [gathered.outputs[0]], f"{path}/Transpose", perm=[1, 2, 0]
        )
        last = self._editor.constant("last", [-1])
        column = self._editor.node("Unsqueeze", [transposed.outputs[0], last], f"{path}/Unsqueeze")
        blocks = self._editor.node("Reshape", [nodes[-1].outputs[0], self._block_shape()], f"{path}/Blocks")
        shifted = self._editor.node("Add", [blocks.outputs[0], column.outputs[0]], f"{path}/Add")
        shape = self._editor.constant("flat", [0, 0, -1])
        flat = self._editor.node("Reshape", [shifted.outputs[0], shape], f"{path}/Flatten")
        return [*nodes, gathered, transposed, column, blocks, shifted, flat]

    def _block_emitter(self, bits: int) -> Emitter[BlockLayout]:
        context = dataclasses.replace(self._context, load=lambda name, _: self._load(name)[0])
        return block_emitter(context, BlockLayout(bits, self._format.size, symmetric=not self._format.zeros))

    def _block_shape(self) -> ir.Value:
        size = self._format.size
        return self._editor.constant(f"blocks_of_{size}", [0, 0, -1, size])

    def _offsets(self, weight: ir.Value, index: int = 0, num_splits: int = 1) -> ir.Value:
        """Return the offsets of a split of the rows, float32 [K / block, N]."""
        name = name_of(weight)
        rows, width = shape_of(weight)
        rows //= num_splits

        def values() -> Offsets:
            _, offsets = self._load(name)
            assert offsets is not None
            return np.ascontiguousarray(offsets[:, index * rows : (index + 1) * rows])

        initializer_name = f"{name}{split_suffix(index, num_splits)}.offsets"
        return self._editor.initializer(initializer_name, ir.DataType.FLOAT, (width // self._format.size, rows), values)
