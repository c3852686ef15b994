"""Pass that fuses the arithmetic of norms by the root of the mean square."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from llm_edge.exporter.graph.editor import Editor
from llm_edge.exporter.graph.passes.patterns import dims_of, integers_of, made_by, number_of, only_use, operands


def fuse_rms_norms(model: ir.Model) -> None:
    """Fuse x / sqrt(mean(x * x) + epsilon) into RMSNormalization.

    Requires: shapes of values; constants are computed.
    Does: replaces the arithmetic over the last axis, and the product with a vector of its width if nothing else uses
        the normed values. A sum of squares, as in norms to unit length, is a mean with another epsilon and scale.
    Ensures: the same values but for rounding; whatever else a model does to a norm's scale, such as adding 1, is kept.
    """
    editor = Editor(model)
    for node in list(model.graph):
        norm = None if node.graph is None else _match(node)  # a replaced product is no longer in the graph
        if norm is not None:
            _replace(editor, node, norm)
    common_passes.RemoveUnusedNodesPass()(model)


@dataclass(frozen=True, slots=True)
class _Norm:
    x: ir.Value
    width: int
    epsilon: float
    factor: float  # of the result


def _match(node: ir.Node) -> _Norm | None:
    """Return the norm whose last node, but for the scale, this is."""
    if node.domain != "" or node.op_type not in ("Mul", "Div"):
        return None
    pairs = operands(node) if node.op_type == "Mul" else operands(node)[:1]
    for x, other in pairs:
        shape = dims_of(x)
        squares = _radicand(other) if node.op_type == "Mul" else _input(other, "Sqrt")
        if squares is None or not shape or not isinstance(shape[-1], int):
            continue
        for total, constant in operands(made_by(squares, "Add")):
            epsilon, reduction = number_of(constant), made_by(total, "ReduceMean", "ReduceSum")
            if epsilon is None or reduction is None or not _is_sum_of_squares(reduction, x, len(shape)):
                continue
            if reduction.op_type == "ReduceMean":
                return _Norm(x, shape[-1], epsilon, 1.0)
            return _Norm(x, shape[-1], epsilon / shape[-1], shape[-1] ** -0.5)
    return None


def _radicand(value: ir.Value) -> ir.Value | None:
    """Return y if a value is 1 / sqrt(y)."""
    power = made_by(value, "Pow")
    if power is not None:
        return power.inputs[0] if number_of(power.inputs[1]) == -0.5 else None
    division = made_by(value, "Div")
    if division is not None:
        return _input(division.inputs[1], "Sqrt") if number_of(division.inputs[0]) == 1 else None
    return _input(_input(value, "Reciprocal"), "Sqrt")


def _input(value: ir.Value | None, op_type: str) -> ir.Value | None:
    node = made_by(value, op_type)
    return None if node is None else node.inputs[0]


def _is_sum_of_squares(reduction: ir.Node, x: ir.Value, rank: int) -> bool:
    """Whether a reduction is that of x * x over its last axis."""
    keeps = reduction.attributes.get("keepdims")
    if len(reduction.inputs) < 2 or (keeps is not None and keeps.as_int() != 1):
        return False
    if integers_of(reduction.inputs[1]) not in ([-1], [rank - 1]):
        return False
    square, power = made_by(reduction.inputs[0], "Mul"), made_by(reduction.inputs[0], "Pow")
    if power is not None:
        return power.inputs[0] is x and number_of(power.inputs[1]) == 2
    return square is not None and square.inputs[0] is x and square.inputs[1] is x


def _replace(editor: Editor, node: ir.Node, norm: _Norm) -> None:
    last, scale = node, None
    product = only_use(node.outputs[0])
    if product is not None and product.op_type == "Mul" and product.domain == "" and norm.factor == 1:
        for normed, other in operands(product):
            if normed is node.outputs[0] and dims_of(other) == (norm.width,):
                last, scale = product, other
    if scale is None:
        name, number = f"norm_scale.{norm.width}.{norm.factor:.6g}", np.float32(norm.factor)
        scale = editor.initializer(
            name, ir.DataType.FLOAT, (norm.width,), lambda: np.full(norm.width, number, dtype=np.float32)
        )
    name = (last.name or "").replace(last.op_type, "RMSNormalization")
    fused = editor.node("RMSNormalization", [norm.x, scale], name, axis=-1, epsilon=norm.epsilon)
    editor.replace(last, [fused])
