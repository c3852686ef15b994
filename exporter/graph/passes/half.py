"""The whole graph in float16. Knows nothing of recipes or of weights' formats."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import onnx_ir as ir

from llm_edge.exporter.graph.editor import Array, Editor, lazy_tensor, name_of, shape_of
from llm_edge.runtime.errors import CheckpointError

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_WIDE = ("logits", "hidden_states")


def to_half(model: ir.Model) -> None:
    """Compute in float16, from the embedding to the head.

    Requires: float32 is the graph's only floating-point type.
    Does: turns every float32 tensor, the cache among them, into float16; weights are rounded one at a time when the
        graph is saved.
    Ensures: logits and hidden states are float32 as in every other graph. A weight that float16 cannot hold raises
        CheckpointError.
    """
    graph = model.graph
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS) and name.startswith("value_"):
                raise ValueError(f"{node.name}: a constant that is not a tensor")
            if attribute.type is ir.AttributeType.TENSOR and attribute.as_tensor().dtype is _FLOAT:
                half = _rounded(name_of(node.outputs[0]), attribute.as_tensor())
                node.attributes.add(ir.AttrTensor(name, ir.tensor(half)))
            if node.op_type == "Cast" and name == "to" and attribute.as_int() == _FLOAT:
                node.attributes.add(ir.AttrInt64("to", _HALF))
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype is _FLOAT:
            make = functools.partial(_rounded, name_of(value), tensor)
            value.const_value = lazy_tensor(name_of(value), _HALF, shape_of(value), make)
    made = (value for node in graph for value in node.outputs)
    for value in itertools.chain(graph.inputs, graph.initializers.values(), made):
        if value.dtype is _FLOAT:
            value.dtype = _HALF
    for index, value in enumerate(graph.outputs):
        if value.name in _WIDE:
            _widen(model, index)


def _widen(model: ir.Model, index: int) -> None:
    """Cast an output back to float32."""
    graph = model.graph
    narrow = graph.outputs[index]
    name = name_of(narrow)
    narrow.name = f"{name}_float16"
    cast = Editor(model).node("Cast", [narrow], f"/{name}/Cast", to=int(_FLOAT))
    wide = cast.outputs[0]
    wide.name, wide.type, wide.shape = name, ir.TensorType(_FLOAT), narrow.shape
    graph.append(cast)
    graph.outputs[index] = wide


def _rounded(name: str, tensor: ir.TensorProtocol) -> Array:
    """A tensor's numbers as float16."""
    numbers = tensor.numpy()
    with np.errstate(over="ignore"):
        half = numbers.astype(np.float16)
    if np.isfinite(numbers).all() and not np.isfinite(half).all():
        raise CheckpointError(
            f"{name}: float16 ends at 65504, and a weight is {np.abs(numbers).max():.3g}: leave fp16 out of --precision"
        )
    return half
