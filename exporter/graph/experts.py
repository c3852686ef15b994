"""Translation of the operator `experts` to ONNX: to an abstract node, which is lowered with the weights at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from llm_edge.exporter.graph.attention import DOMAIN, contrib
from llm_edge.exporter.graph.editor import Array, Editor, name_of, shape_of
from llm_edge.exporter.graph.routing import find_router
from llm_edge.exporter.quantization.blocks import BlockLayout, QuantizedBlocks, quantize_blocks
from llm_edge.exporter.quantization.formats.blocks import INT8_ACTIVATIONS
from llm_edge.model.experts import ExpertsInputs, Gate

Convert = Callable[[Tensor], Tensor]

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""Names of the matrices of experts that are quantized."""

EXPERTS = "Experts"
"""Abstract node; its inputs are the tensors of `ExpertsInputs`, and its attributes the other fields."""
_TENSORS = 7
_EXPERTS = contrib(
    DOMAIN,
    EXPERTS,
    inputs=_TENSORS,
    outputs=1,
    transposed="INT",
    activation="STRING",
    gated="INT",
    interleaved="INT",
    slope="FLOAT",
    up_offset="FLOAT",
    limit="FLOAT",
)


def experts(*arguments: Any) -> Any:
    """Translate to the abstract node."""
    inputs = ExpertsInputs(*arguments)
    names = inputs._fields[_TENSORS:]
    attributes = {name: getattr(inputs, name) for name in names}
    return _EXPERTS(
        *inputs[:_TENSORS], **{name: int(x) if isinstance(x, bool) else x for name, x in attributes.items()}
    )


def expert_layout(layout: BlockLayout | None, gate: Gate, widths: Sequence[int]) -> BlockLayout | None:
    """Return the layout in which experts are stored, None if they are not quantized.

    Its blocks divide the rows, of these widths, of all matrices.
    """
    if layout is None or not _is_swiglu(gate):
        return None
    sizes = [size for size in (layout.size, 32, 16) if not any(width % size for width in widths)]
    return replace(layout, size=sizes[0]) if sizes else None


def interleaved(matrices: Tensor, gate: Gate) -> Tensor:
    """Return matrices [E, 2I, H] or vectors [E, 2I] with rows that alternate between gate and up, as in MoE."""
    if gate.interleaved:
        return matrices
    return torch.stack(matrices.chunk(2, dim=1), dim=2).flatten(1, 2)


def _is_swiglu(gate: Gate) -> bool:
    return gate.gated and gate.activation == "silu"


def lower_experts(
    editor: Editor,
    node: ir.Node,
    weights: Mapping[str, Tensor],
    layout: BlockLayout | None = None,
    stored: Callable[[str], QuantizedBlocks | None] = lambda _: None,
) -> BlockLayout | None:
    """Replace the abstract node; return the layout in which the experts are stored, None if they are not quantized.

    Experts with SiLU become one node MoE or, in blocks, QMoE. For others onnxruntime has no operator: all experts are
    computed for all tokens, which takes (experts / experts per token) times the operations, with unquantized weights.
    `stored` returns matrices [E * rows, K] by name, `interleaved`, that are quantized in this layout already.
    """
    lowering = _Lowering(editor, node, weights, stored)
    found = lowering.layout_for(layout)
    nodes = lowering.fused(found) if _is_swiglu(lowering.gate) else lowering.dense()
    editor.replace(node, nodes)
    return found


class _Lowering:
    def __init__(
        self,
        editor: Editor,
        node: ir.Node,
        weights: Mapping[str, Tensor],
        stored: Callable[[str], QuantizedBlocks | None],
    ) -> None:
        self._editor = editor
        self._weights = weights
        self._stored = stored
        self._path = (node.name or "").removesuffix(f"/{EXPERTS}")
        inputs = [*node.inputs, *[None] * (_TENSORS - len(node.inputs))]  # the last optional ones are omitted
        self.x, self.chosen, self.routing, self.up, self.up_bias, self.down, self.down_bias = inputs
        read = {"activation": ir.Attr.as_string, "slope": ir.Attr.as_float, "up_offset": ir.Attr.as_float}
        read |= {"limit": ir.Attr.as_float}
        self.given: dict[str, Any] = {
            name: read.get(name, ir.Attr.as_int)(node.attributes[name]) for name in ExpertsInputs._fields[_TENSORS:]
        }
        self.gate = Gate(**{name: self.given[name] for name in Gate._fields})
        assert self.chosen is not None
        assert self.up is not None
        self._per_token = int(self.chosen.shape[1])  # type: ignore[index, arg-type]
        self._count = shape_of(self.up)[0]

    def layout_for(self, layout: BlockLayout | None) -> BlockLayout | None:
        """See `expert_layout`."""
        assert self.up is not None
        assert self.down is not None
        axis = 1 if self.given["transposed"] else 2
        return expert_layout(layout, self.gate, [shape_of(value)[axis] for value in (self.up, self.down)])

    def fused(self, layout: BlockLayout | None) -> list[ir.Node]:
        """MoE or QMoE, which choose experts from logits of their own."""
        editor, path, given = self._editor, self._path, self.given
        router = find_router(self.chosen, self.routing)
        if router is not None and layout is not None and not router.normalized:
            router = None  # QMoE divides by the sum in any case
        nodes, logits = ([], router.logits) if router is not None else self._logits()
        attributes: dict[str, Any] = {
            "k": self._per_token,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": given["slope"],
            "activation_beta": given["up_offset"],
            "normalize_routing_weights": int(router is None or router.normalized),
        }
        if given["limit"]:
            attributes["swiglu_limit"] = given["limit"]
        biases = self._vector(self.up_bias, self._interleaved), self._vector(self.down_bias, lambda x: x)
        if layout is None:
            matrices = self._matrix(self.up, self._interleaved), self._matrix(self.down, lambda x: x)
            inputs = [self.x, logits, matrices[0], biases[0], matrices[1], biases[1]]
            moe = editor.node("MoE", inputs, f"{path}/MoE", domain="com.microsoft", **attributes)
        else:
            up, down = self._blocks(self.up, self._interleaved, layout), self._blocks(self.down, lambda x: x, layout)
            points = [] if layout.symmetric else [None, None, None, up[2], down[2]]
            inputs = [self.x, logits, *up[:2], biases[0], *down[:2], biases[1], *points]
            attributes |= {"expert_weight_bits": layout.bits, "block_size": layout.size}
            attributes["accuracy_level"] = INT8_ACTIVATIONS
            moe = editor.node("QMoE", inputs, f"{path}/QMoE", domain="com.microsoft", **attributes)
        if router is not None:
            return [moe]
        total = self._node("ReduceSum", self.routing, editor.constant(f"{path}/last", [1]), keepdims=1)
        return [*nodes, moe, total, self._node("Mul", moe.outputs[0], total.outputs[0])]

    def _logits(self) -> tuple[list[ir.Node], ir.Value]:
        """Return logits of which the softmax gives the routing weights, divided by their sum."""
        logs = self._node("Log", self.routing)
        nodes, none = self._filled("experts.none", -np.inf)
        logits = self._node("ScatterElements", none, self.chosen, logs.outputs[0], axis=1)
        return [logs, *nodes, logits], logits.outputs[0]

    def _filled(self, name: str, number: float) -> tuple[list[ir.Node], ir.Value]:
        """Return a matrix [N, E] of one number."""
        editor, path = self._editor, self._path
        rows = self._node("Shape", self.chosen, start=0, end=1)  # of x it would seem to grow with each layer's experts
        shape = self._node("Concat", rows.outputs[0], editor.constant(f"{path}/experts", [self._count]), axis=0)
        filled = self._node("Expand", editor.scalar(name, number), shape.outputs[0])
        return [rows, shape, filled], filled.outputs[0]

    def dense(self) -> list[ir.Node]:
        """All experts for all tokens, then the weighted sum."""
        path, constant = self._path, self._editor.constant
        tokens = self._node("Unsqueeze", self.x, constant(f"{path}/first", [0]))  # [1, N, H]
        nodes = [tokens, *self._product("up", tokens.outputs[0], self.up, self.up_bias, self._concatenated)]
        nodes += self._activate(nodes[-1].outputs[0])
        nodes += self._product("down", nodes[-1].outputs[0], self.down, self.down_bias, lambda x: x)  # [E, N, H]
        outputs = nodes[-1].outputs[0]
        filled, zeros = self._filled("experts.zero", 0.0)
        weights = self._node("ScatterElements", zeros, self.chosen, self.routing, axis=1)  # [N, E]
        transposed = self._node("Transpose", weights.outputs[0], perm=[1, 0])
        column = self._node("Unsqueeze", transposed.outputs[0], constant(f"{path}/last", [2]), suffix="_1")
        weighted = self._node("Mul", outputs, column.outputs[0], suffix="_weights")
        total = self._node("ReduceSum", weighted.outputs[0], constant(f"{path}/first", [0]), keepdims=0)
        return [*nodes, *filled, weights, transposed, column, weighted, total]

    def _product(
        self, part: str, x: ir.Value, weight: ir.Value | None, bias: ir.Value | None, convert: Convert
    ) -> list[ir.Node]:
        """Multiply [E or 1, N, inputs] by the experts' matrices: [E, N, outputs]."""
        matrices = self._matrix(weight, lambda matrices: convert(matrices).transpose(1, 2), transposed=True)
        product = self._node("MatMul", x, matrices, suffix=f"_{part}")
        vector = self._vector(bias, lambda vectors: convert(vectors).unsqueeze(1), row=True)
        if vector is None:
            return [product]
        return [product, self._node("Add", product.outputs[0], vector, suffix=f"_{part}")]

    def _activate(self, projected: ir.Value) -> list[ir.Node]:
        """Return the nodes of `Gate.apply` for rows of which all of gate come first."""
        given, scalar = self.given, self._editor.scalar
        if not given["gated"]:
            return self._activation(projected)
        split = self._node("Split", projected, axis=-1, num_outputs=2, outputs=2)
        gate, up = split.outputs
        nodes = [split]
        if given["limit"]:
            high, low = scalar(f"{self._path}/limit", given["limit"]), scalar(f"{self._path}/floor", -given["limit"])
            nodes.append(self._node("Min", gate, high))
            nodes.append(self._node("Clip", up, low, high))
            gate, up = nodes[-2].outputs[0], nodes[-1].outputs[0]
        nodes += self._activation(gate)
        activated = nodes[-1].outputs[0]
        if given["up_offset"]:
            nodes.append(self._node("Add", up, scalar(f"{self._path}/offset", given["up_offset"]), suffix="_offset"))
            up = nodes[-1].outputs[0]
        return [*nodes, self._node("Mul", activated, up, suffix="_up")]

    def _activation(self, x: ir.Value) -> list[ir.Node]:
        name, slope = self.given["activation"], self.given["slope"]
        if slope != 1 and name != "silu":
            raise ValueError(f"{name} with a slope")
        if name == "silu":
            scaled = [] if slope == 1 else [self._node("Mul", x, self._editor.scalar(f"{self._path}/slope", slope))]
            sigmoid = self._node("Sigmoid", scaled[0].outputs[0] if scaled else x)
            return [*scaled, sigmoid, self._node("Mul", x, sigmoid.outputs[0], suffix="_gate")]
        if name in ("gelu", "gelu_tanh"):
            return [self._node("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")]
        relu = self._node("Relu", x)
        square = [self._node("Mul", relu.outputs[0], relu.outputs[0], suffix="_gate")] if name == "relu2" else []
        return [relu, *square]

    def _node(
        self, op_type: str, *inputs: ir.Value | None, suffix: str = "", outputs: int = 1, **attributes: Any
    ) -> ir.Node:
        name = f"{self._path}/{op_type}{suffix}"
        return self._editor.node(op_type, inputs, name, outputs=outputs, **attributes)

    def _matrix(self, value: ir.Value | None, convert: Convert, *, transposed: bool = False) -> ir.Value:
        """Return the experts' matrices [E, outputs, inputs], converted; `transposed` is their shape afterwards."""
        name = name_of(value)
        assert value is not None
        count, *sides = shape_of(value)
        sides = sides[::-1] if self.given["transposed"] != transposed else sides

        def make() -> Array:
            weight = self._weights[name].float()
            return convert(weight.transpose(1, 2) if self.given["transposed"] else weight).contiguous().numpy()

        return self._editor.initializer(f"{name}.experts", ir.DataType.FLOAT, (count, *sides), make)

    def _blocks(self, value: ir.Value | None, convert: Convert, layout: BlockLayout) -> list[ir.Value]:
        """Return the experts' matrices in blocks: integers, scales and, for asymmetric blocks, zero points."""
        name = name_of(value)
        assert value is not None
        count, *sides = shape_of(value)
        rows, width = reversed(sides) if self.given["transposed"] else sides
        blocks = layout.num_blocks(width)

        def quantized() -> QuantizedBlocks:
            found = self._stored(name)
            if found is not None:
                return found
            weight = self._weights[name]
            matrices = convert(weight.transpose(1, 2) if self.given["transposed"] else weight)
            return quantize_blocks(matrices.reshape(-1, width), layout)

        cached = functools.lru_cache(maxsize=1)(quantized)  # its tensors are written one after another
        tensors = [
            ("data", ir.DataType.UINT8, (count, rows, width * layout.bits // 8)),
            ("scales", ir.DataType.FLOAT, (count, rows, blocks)),
        ]
        if not layout.symmetric:
            tensors.append(("zero_points", ir.DataType.UINT8, (count, rows, -(-blocks * layout.bits // 8))))

        def make(part: str, shape: tuple[int, ...]) -> Array:
            array: Array = getattr(cached(), part).reshape(shape)
            if part == tensors[-1][0]:
                cached.cache_clear()
            return array

        return [
            self._editor.initializer(f"{name}.{part}", kind, shape, functools.partial(make, part, shape))
            for part, kind, shape in tensors
        ]

    def _vector(self, value: ir.Value | None, convert: Convert, *, row: bool = False) -> ir.Value | None:
        """Return the experts' biases [E, outputs], converted; as [E, 1, outputs] if `row` is true."""
        if value is None:
            return None
        name, (count, size) = name_of(value), shape_of(value)
        shape = (count, 1, size) if row else (count, size)
        return self._editor.initializer(
            f"{name}.experts",
            ir.DataType.FLOAT,
            shape,
            lambda: convert(self._weights[name].float()).contiguous().numpy(),
        )

    def _concatenated(self, x: Tensor) -> Tensor:
        """Return rows of which all of gate come first."""
        return torch.cat([x[:, ::2], x[:, 1::2]], dim=1) if self.given["interleaved"] else x

    def _interleaved(self, x: Tensor) -> Tensor:
        return interleaved(x, self.gate)
