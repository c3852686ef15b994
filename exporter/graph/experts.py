"""Translation of the operator `experts` to ONNX: to an abstract node, which is lowered with the weights at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from llm_edge.exporter.graph.attention import DOMAIN, contrib
from llm_edge.exporter.graph.editor import Array, Editor, name_of, shape_of
from llm_edge.model.experts import ExpertsInputs

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


def lower_experts(editor: Editor, node: ir.Node, weights: Mapping[str, Tensor]) -> None:
    """Replace the abstract node by unquantized experts.

    Experts with SiLU become one node MoE. For others onnxruntime has no operator: all experts are computed for all
    tokens, which takes (experts / experts per token) times the operations.
    """
    lowering = _Lowering(editor, node, weights)
    nodes = lowering.fused() if lowering.is_swiglu else lowering.dense()
    editor.replace(node, nodes)


class _Lowering:
    def __init__(self, editor: Editor, node: ir.Node, weights: Mapping[str, Tensor]) -> None:
        self._editor = editor
        self._weights = weights
        self._path = (node.name or "").removesuffix(f"/{EXPERTS}")
        inputs = [*node.inputs, *[None] * (_TENSORS - len(node.inputs))]  # the last optional ones are omitted
        self.x, self.chosen, self.routing, self.up, self.up_bias, self.down, self.down_bias = inputs
        read = {"activation": ir.Attr.as_string, "slope": ir.Attr.as_float, "up_offset": ir.Attr.as_float}
        read |= {"limit": ir.Attr.as_float}
        self.given: dict[str, Any] = {
            name: read.get(name, ir.Attr.as_int)(node.attributes[name]) for name in ExpertsInputs._fields[_TENSORS:]
        }
        assert self.chosen is not None
        assert self.up is not None
        assert self.down is not None
        self._per_token = int(self.chosen.shape[1])  # type: ignore[index, arg-type]
        count, *sides = shape_of(self.up)
        self._count = count
        self._rows, self._width = reversed(sides) if self.given["transposed"] else sides

    @property
    def is_swiglu(self) -> bool:
        return bool(self.given["gated"]) and self.given["activation"] == "silu"

    def fused(self) -> list[ir.Node]:
        """MoE: its softmax of log-weights gives the weights back, divided by their sum."""
        editor, path, given = self._editor, self._path, self.given
        assert self.routing is not None
        nodes, total = [], self._node("ReduceSum", self.routing, editor.constant(f"{path}/last", [1]), keepdims=1)
        logs = self._node("Log", self.routing)
        rows = self._node("Shape", self.x, start=0, end=1)
        shape = self._node("Concat", rows.outputs[0], editor.constant(f"{path}/experts", [self._count]), axis=0)
        none = self._node("Expand", editor.scalar("experts.none", -np.inf), shape.outputs[0])
        logits = self._node("ScatterElements", none.outputs[0], self.chosen, logs.outputs[0], axis=1)
        nodes += [total, logs, rows, shape, none, logits]
        attributes: dict[str, Any] = {
            "k": self._per_token,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": given["slope"],
            "activation_beta": given["up_offset"],
            "normalize_routing_weights": 1,
        }
        if given["limit"]:
            attributes["swiglu_limit"] = given["limit"]
        inputs = [
            self.x,
            logits.outputs[0],
            self._matrix(self.up, self._interleaved),
            self._vector(self.up_bias, self._interleaved),
            self._matrix(self.down, lambda x: x),
            self._vector(self.down_bias, lambda x: x),
        ]
        moe = editor.node("MoE", inputs, f"{path}/MoE", domain="com.microsoft", **attributes)
        return [*nodes, moe, self._node("Mul", moe.outputs[0], total.outputs[0])]

    def dense(self) -> list[ir.Node]:
        """All experts for all tokens, then the weighted sum."""
        raise NotImplementedError

    def _node(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Node:
        return self._editor.node(op_type, inputs, f"{self._path}/{op_type}", **attributes)

    def _matrix(self, value: ir.Value | None, convert: Any) -> ir.Value:
        """Return the experts' matrices with outputs as rows, [E, outputs, inputs]."""
        name = name_of(value)
        assert value is not None
        count, *sides = shape_of(value)
        outputs, inputs = reversed(sides) if self.given["transposed"] else sides

        def make() -> Array:
            weight = self._weights[name].float()
            weight = weight.transpose(1, 2) if self.given["transposed"] else weight
            return convert(weight).contiguous().numpy()  # type: ignore[no-any-return]

        return self._editor.initializer(f"{name}.experts", ir.DataType.FLOAT, (count, outputs, inputs), make)

    def _vector(self, value: ir.Value | None, convert: Any) -> ir.Value | None:
        if value is None:
            return None
        name = name_of(value)
        shape = shape_of(value)
        return self._editor.initializer(
            f"{name}.experts",
            ir.DataType.FLOAT,
            shape,
            lambda: convert(self._weights[name].float()).contiguous().numpy(),
        )

    def _interleaved(self, x: Tensor) -> Tensor:
        """Return rows that alternate between gate and up, as MoE expects them."""
        if self.given["interleaved"]:
            return x
        gate, up = x.chunk(2, dim=1)
        return torch.stack([gate, up], dim=2).flatten(1, 2)
