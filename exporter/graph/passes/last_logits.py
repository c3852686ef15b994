"""Pass that makes the number of computed logits an input."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llm_edge.exporter.graph.editor import Editor

INPUT_NAME = "num_logits_to_keep"


def keep_last_logits(model: ir.Model) -> None:
    """Add the optional input `num_logits_to_keep`.

    Requires: a single node feeds the output head, and nothing else: the last norm [B, S, hidden] or, in a rotated model
        with a tied head, the projection after it.
    Does: slices the input of that node to the last n positions; n = 0 keeps all.
    Ensures: callers that do not set the input get all logits, since it is an initializer that can be overridden
        (ONNX IR version 4 and later) rather than a required input.
    """
    graph = model.graph
    computed = head_nodes(graph.outputs[0])
    head = computed[-1] if computed else None
    norm = head.inputs[0].producer() if head is not None and head.inputs[0] is not None else None
    if norm is None or norm.inputs[0] is None:
        raise ValueError("the graph does not end in norm and output head")
    nodes, last = last_positions(Editor(model), norm.inputs[0], INPUT_NAME)
    graph.insert_before(norm, nodes)
    norm.replace_input_with(0, last)
    kept = ir.SymbolicDim("num_logits")
    for value in (norm.outputs[0], *(node.outputs[0] for node in computed)):
        if value.shape is not None:
            value.shape = ir.Shape([value.shape[0], kept, value.shape[2]])


def head_nodes(logits: ir.Value) -> list[ir.Node]:
    """Return the nodes that compute the logits, from the last to the projection of the output head."""
    found = []
    node = logits.producer()
    while node is not None:
        found.append(node)
        if node.op_type == "Linear" or node.inputs[0] is None:
            break
        node = node.inputs[0].producer()
    return found


def last_positions(editor: Editor, value: ir.Value, input_name: str) -> tuple[list[ir.Node], ir.Value]:
    """Return nodes, not in the graph yet, that select the last n positions of `value` [B, S, …]; n = 0 keeps all.

    n becomes an optional input of the graph, an initializer that can be overridden.
    """
    keep = ir.Value(name=input_name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    keep.const_value = ir.tensor(np.array(0, dtype=np.int64), name=input_name)
    editor.graph.inputs.append(keep)
    editor.graph.register_initializer(keep)
    prefix, largest = f"/{input_name}", np.iinfo(np.int64).max
    negative = editor.node("Neg", [keep], f"{prefix}/Neg")
    start = editor.node("Reshape", [negative.outputs[0], editor.constant(f"{prefix}/one", [1])], f"{prefix}/Reshape")
    bounds = start.outputs[0], editor.constant(f"{prefix}/end", [largest]), editor.constant(f"{prefix}/axis", [1])
    last = editor.node("Slice", [value, *bounds], f"{prefix}/Slice")
    return [negative, start, last], last.outputs[0]
