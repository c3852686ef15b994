"""`PartwiseGraph`: runs an ONNX graph in parts, so that memory holds the weights of one part.

A part is a range of nodes. Unquantized weights are inputs of onnxruntime's session: they are neither written nor
copied. Quantized ones are constants, which the operators pack as they do in the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from llm_edge.exporter.graph.editor import name_of
from llm_edge.exporter.memory import return_freed_pages
from llm_edge.exporter.validation.windows import Run
from llm_edge.runtime.backend.graph import HIDDEN_STATES, inference_session
from llm_edge.runtime.model_shape import ModelShape

_PART_BYTES = 512 << 20
_INLINE_BYTES = 1024  # operators require some small inputs, such as shapes, to be constants
_PAST, _PRESENT = "past_key_values.", "present."

Values = dict[str, Any]
"""Arrays by the name of their value in the graph."""


@dataclass(slots=True)
class _Part:
    """Nodes, the initializers that they use, and the names of values that enter and leave them."""

    nodes: list[ir.Node] = field(default_factory=list)
    initializers: dict[str, ir.TensorProtocol] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all initializers."""
        return sum(tensor.nbytes for tensor in self.initializers.values())


class PartwiseGraph:
    """An ONNX graph of a decoder whose weights are read part by part; see `Forward` for its calls.

    Args:
        model: the graph.
        shape: of the decoder.
        part_bytes: of the weights of a part; a single larger one is a part of its own.
        file: where the graph is, if it has quantized weights.
    """

    def __init__(
        self, model: ir.Model, shape: ModelShape, part_bytes: int = _PART_BYTES, file: Path | None = None
    ) -> None:
        model.graph.sort()
        self._file = file
        self._model = model
        self._shape = shape
        # TensorScatter writes into the cache that it is given; other operators return a longer one.
        self._scattered = {name_of(node.inputs[0]) for node in model.graph if node.op_type == "TensorScatter"}
        self._parts = _split(model.graph, part_bytes)

    def __len__(self) -> int:
        """Number of parts."""
        return len(self._parts)

    def __call__(self, runs: Sequence[Run], progress: Callable[[float], None] = lambda _: None) -> Iterator[Tensor]:
        """Yield the logits of each chunk of each run."""
        return self._run(runs, "logits", progress)

    def hidden_states(self, run: Run) -> Tensor:
        """Return the hidden states of a run in one step."""
        (states,) = self._run([Run((run.tokens,), 0)], HIDDEN_STATES, lambda _: None)
        return states

    def _run(self, runs: Sequence[Run], output: str, progress: Callable[[float], None]) -> Iterator[Tensor]:
        """Run all chunks through each part in turn; yield an output of the graph for each chunk."""
        values = [_graph_inputs(run) for run in runs]
        for number, part in enumerate(self._parts):
            progress(number / len(self._parts))
            for run_values in self._run_part(part, values):
                result = run_values.pop(output, None)
                self._drop_unused(run_values, number)
                if result is not None:
                    yield torch.from_numpy(result[0])
            for tensor in _large(part).values():
                if isinstance(tensor, ir.ExternalTensor):
                    tensor.release()  # its mapped pages
            return_freed_pages()

    def _run_part(self, part: _Part, values: list[list[Values]]) -> Iterator[Values]:
        """Run a part over the values of each chunk of each run; add its outputs to them and yield them."""
        weights = {name: tensor.numpy() for name, tensor in _large(part).items()} if self._file is None else {}
        session: Any = None
        for run_values in values:
            total = run_values[-1]["attention_mask"].shape[1]
            past = {
                name: self._cache(name, total if name in self._scattered else 0)
                for name in part.inputs
                if name.startswith(_PAST)
            }
            for chunk in run_values:
                feeds = {name: chunk[name] for name in part.inputs if name in chunk} | weights | past
                session = session or self._session(part, feeds)
                chunk |= dict(zip(part.outputs, session.run(part.outputs, feeds), strict=True))
                # A part without attention reads only the shape of the cache.
                shape_only = partial(self._cache, length=chunk["attention_mask"].shape[1])
                past = {name: chunk.pop(name.replace(_PAST, _PRESENT), None) for name in past}
                past = {name: shape_only(name) if tensor is None else tensor for name, tensor in past.items()}
                yield chunk

    def _drop_unused(self, values: Values, number: int) -> None:
        needed = {"attention_mask", *(name for part in self._parts[number + 1 :] for name in part.inputs)}
        for name in [name for name in values if name not in needed]:
            del values[name]

    def _cache(self, name: str, length: int) -> Any:
        """Return a cache of zeros for an input of the graph."""
        dtype = next(value for value in self._model.graph.inputs if value.name == name).dtype
        assert dtype is not None
        tensor = next(tensor for tensor in self._shape.caches if name == f"{_PAST}{tensor.name}")
        return np.zeros((1, *tensor.sized(length)), dtype.numpy())

    def _session(self, part: _Part, feeds: Values) -> Any:
        """Load a part whose inputs have the types of `feeds`."""
        types = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
        graph = onnx.helper.make_graph(
            [ir.to_proto(node) for node in part.nodes],
            "part",
            [onnx.helper.make_tensor_value_info(name, dtype, None) for name, dtype in types.items()],
            [onnx.ValueInfoProto(name=name) for name in part.outputs],
            [ir.to_proto(tensor) for name, tensor in part.initializers.items() if name not in types],
        )
        opsets = [onnx.helper.make_opsetid(*item) for item in self._model.opset_imports.items()]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self._model.ir_version)
        return inference_session(model.SerializeToString(), None if self._file is None else self._file.parent)


def _large(part: _Part) -> dict[str, ir.TensorProtocol]:
    return {name: tensor for name, tensor in part.initializers.items() if tensor.nbytes > _INLINE_BYTES}


def _graph_inputs(run: Run) -> list[Values]:
    """Return the inputs of the graph for each chunk of a run."""
    found, past = [], 0
    for chunk in run.chunks:
        past += len(chunk)
        found.append({"input_ids": np.array([chunk]), "attention_mask": np.ones((1, past), dtype=np.int64)})
    return found


def _split(graph: ir.Graph, part_bytes: int) -> list[_Part]:
    """Return the nodes of a sorted graph in parts whose weights have at most a given size."""
    parts = [_Part()]
    for node in graph:
        initializers = _initializers(node)
        new = [tensor.nbytes for name, tensor in initializers.items() if name not in parts[-1].initializers]
        if max(new, default=0) > _INLINE_BYTES and parts[-1].nodes and parts[-1].size + sum(new) > part_bytes:
            parts.append(_Part())
        parts[-1].nodes.append(node)
        parts[-1].initializers |= initializers
    used_later = {value.name for value in graph.outputs}
    for part in reversed(parts):
        produced = [name_of(value) for node in part.nodes for value in node.outputs]
        used = {name_of(value): None for node in part.nodes for value in node.inputs if value is not None}
        part.outputs = [name for name in produced if name in used_later]
        part.inputs = [name for name in used if name not in {*produced, *part.initializers}]
        used_later |= set(part.inputs)
    return parts


def _initializers(node: ir.Node) -> dict[str, ir.TensorProtocol]:
    """Return the weights and constants that a node uses, by name."""
    found = {}
    for value in node.inputs:
        if value is not None and value.is_initializer():
            assert value.const_value is not None
            found[name_of(value)] = value.const_value
    return found
