"""Passes that add hidden states to the outputs of a graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from llm_edge.exporter.graph.editor import Array, Editor
from llm_edge.exporter.graph.passes.last_logits import head_nodes, last_positions
from llm_edge.exporter.quantization.hadamard import Rotation

OUTPUT_NAME = "hidden_states"
INPUT_NAME = "num_hidden_states_to_keep"
_FLOAT = ir.DataType.FLOAT


def add_hidden_states(model: ir.Model, scale: float) -> None:
    """Add `hidden_states` [B, n, hidden], the output of the last norm times `scale`, as the last output.

    Requires: the graph ends in the last norm and the head, with at most one projection between them.
    Does: adds a second last norm, over the last n positions. n is the optional input `num_hidden_states_to_keep`;
        0, its default, keeps all.
    Ensures: the logits and their positions are unchanged. onnxruntime computes every output, fetched or not: to save
        time, callers who need only one of the two outputs request a single position of the other.
    """
    graph, editor = model.graph, Editor(model)
    norm = _input_producer(head_nodes(graph.outputs[0])[-1])
    if norm is not None and norm.op_type == "Linear":
        norm = _input_producer(norm)
    if norm is None or norm.inputs[0] is None:
        raise ValueError("the graph does not end in norm and output head")
    nodes, kept = last_positions(editor, norm.inputs[0], INPUT_NAME)
    twin = ir.node(
        norm.op_type,
        [kept, *norm.inputs[1:]],
        {attribute.name: attribute for attribute in norm.attributes.values()},
        domain=norm.domain,
        name=f"/{OUTPUT_NAME}/{norm.op_type}",
    )
    nodes.append(twin)
    if scale != 1:
        factor = editor.scalar(f"{OUTPUT_NAME}.scale", scale)
        nodes.append(editor.node("Mul", [twin.outputs[0], factor], f"/{OUTPUT_NAME}/Scale"))
    batch, _, width = norm.outputs[0].shape or (None, None, None)
    states = nodes[-1].outputs[0]
    twin.outputs[0].name = f"{twin.name}/output_0"
    states.name, states.type = OUTPUT_NAME, ir.TensorType(_FLOAT)
    states.shape = ir.Shape([batch, ir.SymbolicDim("num_hidden_states"), width])
    graph.extend(nodes)
    graph.outputs.append(states)


def undo_rotation(model: ir.Model, rotation: Rotation, gain: Callable[[], Array]) -> None:
    """Convert `hidden_states` back to those of the model before its residual stream was rotated.

    Requires: the output, and a last norm whose weights were folded into the projections that read it.
    Does: multiplies by the inverse rotation, factor by factor, and by `gain` [hidden], the weights of the norm.
    Ensures: nothing else changes.
    """
    graph, editor = model.graph, Editor(model)
    (index,) = (i for i, value in enumerate(graph.outputs) if value.name == OUTPUT_NAME)
    old = graph.outputs[index]
    signs, left, right = rotation.signs.numpy(), rotation.left.numpy(), rotation.right.numpy()
    old.name = f"/{OUTPUT_NAME}/rotated"

    def tensor(label: str, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.Value:
        return editor.initializer(f"{OUTPUT_NAME}.{label}", _FLOAT, shape, make)

    def op(kind: str, label: str, *inputs: ir.Value) -> ir.Value:
        nodes.append(editor.node(kind, [*inputs], f"/{OUTPUT_NAME}/{label}"))
        return nodes[-1].outputs[0]

    nodes: list[ir.Node] = []
    split = op("Reshape", "Split", old, editor.constant(f"{OUTPUT_NAME}.split", [0, 0, len(left), len(right)]))
    unrotated = op("MatMul", "Right", split, tensor("right", right.shape, lambda: np.ascontiguousarray(right.T)))
    unrotated = op("MatMul", "Left", tensor("left", left.shape, lambda: left), unrotated)
    flat = op("Reshape", "Flatten", unrotated, editor.constant(f"{OUTPUT_NAME}.flat", [0, 0, len(signs)]))
    states = op("Mul", "Gain", flat, tensor("gain", signs.shape, lambda: signs * gain()))
    states.name, states.type, states.shape = OUTPUT_NAME, old.type, old.shape
    graph.extend(nodes)
    graph.outputs[index] = states


def _input_producer(node: ir.Node | None) -> ir.Node | None:
    """Return the node that computes the first input of a node."""
    return None if node is None or node.inputs[0] is None else node.inputs[0].producer()
