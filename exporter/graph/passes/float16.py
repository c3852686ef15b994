"""Pass that converts a graph to float16."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Container

import numpy as np
import onnx_ir as ir

from llm_edge.exporter.graph.editor import Array, Editor, lazy_tensor, name_of, shape_of
from llm_edge.exporter.graph.passes.rotary_angles import PREFIX
from llm_edge.runtime.errors import CheckpointError

_FLOAT, _FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
_FLOAT32_OUTPUTS = ("logits", "hidden_states")


def to_float16(model: ir.Model) -> None:
    """Convert a graph to float16, from the embedding to the head.

    Requires: float32 is the only floating-point dtype of the graph.
    Does: converts every float32 tensor, including the cache, to float16; weights are converted one at a time when the
        graph is saved. Rotary angles, up to the length of the context, stay in float32; only their cosines and sines
        are converted.
    Ensures: logits and hidden states are float32 as in every other graph. A weight out of the range of float16 raises
        CheckpointError.
    """
    graph = model.graph
    angles = {node for node in graph if node.name and node.name.startswith(f"/{PREFIX}")}
    for node in graph:
        if node not in angles:
            _convert_attributes(node)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype is _FLOAT and not name.startswith(PREFIX):
            make = functools.partial(_to_float16, name, tensor)
            value.const_value = lazy_tensor(name, _FLOAT16, shape_of(value), make)
            value.dtype = _FLOAT16
    computed = (value for node in graph if node not in angles for value in node.outputs)
    for value in itertools.chain(graph.inputs, computed):
        if value.dtype is _FLOAT:
            value.dtype = _FLOAT16
    for node in list(graph):
        if node in angles:
            _cast_angles(model, node, angles)
    for index, value in enumerate(graph.outputs):
        if value.name in _FLOAT32_OUTPUTS:
            _cast_to_float32(model, index)


def _convert_attributes(node: ir.Node) -> None:
    """Convert the constants that a node holds, and the type to which it casts."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS) and name.startswith("value_"):
            raise ValueError(f"{node.name}: constants must be tensors")
        if attribute.type is ir.AttributeType.TENSOR and attribute.as_tensor().dtype is _FLOAT:
            converted = _to_float16(name_of(node.outputs[0]), attribute.as_tensor())
            node.attributes.add(ir.AttrTensor(name, ir.tensor(converted)))
        if node.op_type == "Cast" and name == "to" and attribute.as_int() == _FLOAT:
            node.attributes.add(ir.AttrInt64("to", _FLOAT16))


def _cast_angles(model: ir.Model, node: ir.Node, angles: Container[ir.Node]) -> None:
    """Cast the output of a node of rotary angles to float16 where other nodes use it."""
    value = node.outputs[0]
    uses = [use for use in value.uses() if use.node not in angles]
    if uses:
        cast = Editor(model).node("Cast", [value], f"{node.name}/Cast", to=int(_FLOAT16))
        model.graph.insert_after(node, cast)
        for use in uses:
            use.node.replace_input_with(use.idx, cast.outputs[0])


def _cast_to_float32(model: ir.Model, index: int) -> None:
    """Cast an output of the graph to float32."""
    graph = model.graph
    output = graph.outputs[index]
    name = name_of(output)
    output.name = f"{name}_float16"
    cast = Editor(model).node("Cast", [output], f"/{name}/Cast", to=int(_FLOAT))
    result = cast.outputs[0]
    result.name, result.type, result.shape = name, ir.TensorType(_FLOAT), output.shape
    graph.append(cast)
    graph.outputs[index] = result


def _to_float16(name: str, tensor: ir.TensorProtocol) -> Array:
    """Return the values of a tensor as float16."""
    values = tensor.numpy()
    with np.errstate(over="ignore"):
        converted = values.astype(np.float16)
    if np.isfinite(values).all() and not np.isfinite(converted).all():
        raise CheckpointError(
            f"{name}: a weight of {np.abs(values).max():.3g} exceeds the float16 maximum 65504: "
            "remove fp16 from --precision"
        )
    return converted
