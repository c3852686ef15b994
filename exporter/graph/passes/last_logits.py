"""Pass that makes the number of computed logits an input."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

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
    head = graph.outputs[0].producer()
    norm = head.inputs[0].producer() if head is not None and head.inputs[0] is not None else None
    if norm is None or norm.inputs[0] is None:
        raise ValueError("the graph does not end in norm and output head")
    hidden = norm.inputs[0]

    nodes, last = last_positions(graph, hidden, INPUT_NAME)
    graph.insert_before(norm, nodes)
    norm.replace_input_with(0, last)
    kept = ir.SymbolicDim("num_logits")
    for value in (norm.outputs[0], head.outputs[0]) if head is not None else ():
        if value.shape is not None:
            value.shape = ir.Shape([value.shape[0], kept, value.shape[2]])


def last_positions(graph: ir.Graph, value: ir.Value, input_name: str) -> tuple[list[ir.Node], ir.Value]:
    """Return nodes, not in the graph yet, that select the last n positions of `value` [B, S, …]; n = 0 keeps all.

    n becomes an optional input of the graph, an initializer that can be overridden.
    """
    keep = ir.Value(name=input_name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    keep.const_value = ir.tensor(np.array(0, dtype=np.int64), name=input_name)
    graph.inputs.append(keep)
    graph.register_initializer(keep)

    def constant(name: str, numbers: list[int]) -> ir.Value:
        initializer = ir.Value(name=f"/{input_name}/{name}", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
        initializer.const_value = ir.tensor(np.array(numbers, dtype=np.int64), name=initializer.name)
        graph.register_initializer(initializer)
        return initializer

    negative = ir.node("Neg", [keep], name=f"/{input_name}/Neg")
    start = ir.node("Reshape", [negative.outputs[0], constant("one", [1])], name=f"/{input_name}/Reshape")
    slice_ = ir.node(
        "Slice",
        [value, start.outputs[0], constant("end", [np.iinfo(np.int64).max]), constant("axis", [1])],
        name=f"/{input_name}/Slice",
    )
    nodes = [negative, start, slice_]
    for node in nodes:
        node.outputs[0].name = f"{node.name}/output_0"
    return nodes, slice_.outputs[0]
