"""`check_graph`: inspects an ONNX file before onnxruntime reads it, and accepts only what the exporter writes.

onnxruntime trusts its input: a graph may loop forever, refer to any file, or compute gigabytes while it is loaded.
Everything outside the allow-lists below is rejected: loops, branches, functions, other domains, other data files. The
fields and their numbers are those of ONNX's onnx.proto; the runtime does not depend on the onnx package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from llm_edge.runtime.backend.graph_growth import MAX_RANK, Growth, read_integers
from llm_edge.runtime.backend.protobuf import (
    BYTES,
    FIXED32,
    VARINT,
    RejectedError,
    read_fields,
    read_varint,
    read_varints,
)
from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.safe_io import MIB, read_bytes, short_repr

_MAX_BYTES = 32 * MIB  # of the file without its weights; a layer takes about 15 kB
_MAX_NODES = 100_000
_MAX_INLINE = MIB  # elements of a tensor without external data


def _words(text: str) -> list[str]:
    return text.split()


_STANDARD = _words(
    """
    Abs Add And ArgMax Attention Cast CastLike Ceil Clip Concat Constant ConstantOfShape Cos CumSum
    DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Floor Gather GatherElements GatherND Gelu Gemm Greater
    GreaterOrEqual Identity LayerNormalization Less LessOrEqual Log MatMul Max Min Mod Mul Neg Not Or Pad Pow
    QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean
    ReduceMin ReduceSum Relu Reshape RotaryEmbedding Round ScatterElements ScatterND Shape Sigmoid Sign
    SimplifiedLayerNormalization Sin Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh TensorScatter Tile TopK
    Transpose Trilu Unsqueeze Where"""
)
_MICROSOFT = _words(
    """
    CausalConvWithState GatherBlockQuantized GroupQueryAttention LinearAttention MatMulIntegerToFloat MatMulNBits MoE
    QMoE SimplifiedLayerNormalization SkipSimplifiedLayerNormalization"""
)
OPERATORS = frozenset({("", name) for name in _STANDARD} | {("com.microsoft", name) for name in _MICROSOFT})
"""(domain, operator) of all nodes that a graph may have: what the exporter writes, and elementwise functions."""

# onnxruntime computes nodes whose inputs are all constant when it loads a graph. Only operators whose results are not
# larger than their inputs may have such inputs, or a small file could allocate any amount of memory.
_FOLDABLE = frozenset({"Cast", "CastLike", "Constant", "DequantizeLinear", "Identity", "Reshape", "Shape", "Split"})

_MODEL_FIELDS = {1: VARINT, 2: BYTES, 3: BYTES, 4: BYTES, 5: VARINT, 6: BYTES, 7: BYTES, 8: BYTES, 14: BYTES}
_GRAPH_FIELDS = {1: BYTES, 2: BYTES, 5: BYTES, 10: BYTES, 11: BYTES, 12: BYTES, 13: BYTES, 16: BYTES}
_ATTRIBUTE_FIELDS = {1: (BYTES,), 2: (FIXED32,), 3: (VARINT,), 4: (BYTES,), 5: (BYTES,), 7: (BYTES, FIXED32)}
_ATTRIBUTE_FIELDS |= {8: (BYTES, VARINT), 9: (BYTES,), 13: (BYTES,), 20: (VARINT,)}
_ATTRIBUTE_TYPES = {1, 2, 3, 4, 6, 7, 8}  # FLOAT, INT, STRING, TENSOR, FLOATS, INTS, STRINGS; not GRAPH
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
"""Bits of an element by TensorProto.DataType; strings and complex numbers are missing."""


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """An initializer whose values are in the file of weights.

    Attributes:
        name, dims: as in the graph.
        kind: TensorProto.DataType.
        offset, size: where it is, in bytes.
    """

    name: str
    kind: int
    dims: tuple[int, ...]
    offset: int
    size: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)


def check_graph(path: Path) -> list[ExternalTensor]:
    """Check that an ONNX file contains only a graph as the exporter writes it, with its weights in `<path>_data`.

    Returns:
        its weights.

    Raises:
        BundleError: it is not such a file.
    """
    data = read_bytes(path, _MAX_BYTES)
    external = path.with_name(f"{path.name}_data")
    try:
        size = external.stat().st_size
    except OSError:
        size = 0
    weights = _Weights(external.name, size)
    try:
        _check_model(data, weights)
    except (RejectedError, IndexError, ValueError) as error:  # IndexError: an integer is cut off
        why = str(error) if isinstance(error, RejectedError) else "it is damaged"
        raise BundleError(f"{path}: not a graph that llm-export writes: {why}: export the bundle again") from error
    return weights.tensors


class _Weights:
    """The file with the weights of a graph: its name, its size in bytes, and the initializers found in it so far."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name.encode("utf-8", "surrogateescape"), size
        self.tensors: list[ExternalTensor] = []


def _check_model(data: bytes, weights: _Weights) -> None:
    graphs = []
    for number, wire, start, end in read_fields(data, 0, len(data)):
        if _MODEL_FIELDS.get(number) != wire:
            raise RejectedError(f"it has field {number}, such as functions or training information")
        if number == 8:
            domain = b"".join(data[a:b] for field, _, a, b in read_fields(data, start, end) if field == 1)
            if domain not in (b"", b"ai.onnx", b"com.microsoft"):
                raise RejectedError(f"it has operators of the domain {short_repr(domain)}")
        elif number == 7:
            graphs.append((start, end))
    if len(graphs) != 1:
        raise RejectedError(f"it has {len(graphs)} graphs")
    _check_main_graph(data, *graphs[0], weights)


def _check_main_graph(data: bytes, start: int, end: int, weights: _Weights) -> None:
    nodes, inputs, constants = [], set(), set()
    numbers: dict[bytes, list[int]] = {}
    for number, wire, a, b in read_fields(data, start, end):
        if _GRAPH_FIELDS.get(number) != wire:
            raise RejectedError(f"its graph has field {number}, such as sparse or quantized initializers")
        if number == 1:
            nodes.append((a, b))
        elif number == 5:
            name, tensor = _check_tensor(data, a, b, weights)
            if tensor is None:
                numbers[name] = read_integers(data, a, b)
            if name in constants:
                raise RejectedError("two tensors have the same name")
            constants.add(name)
            weights.tensors += [tensor] if tensor is not None else []
        elif number == 11:
            inputs.add(b"".join(data[c:d] for field, _, c, d in read_fields(data, a, b) if field == 1))
    if len(nodes) > _MAX_NODES:
        raise RejectedError(f"it has {len(nodes):,} nodes, more than {_MAX_NODES:,}")
    growth = Growth(constants - inputs, {name: values for name, values in numbers.items() if name not in inputs})
    _check_nodes(data, nodes, inputs, growth, weights)


def _check_nodes(
    data: bytes, nodes: list[tuple[int, int]], known: set[bytes], growth: Growth, weights: _Weights
) -> None:
    """Check the nodes of a graph, which are sorted, so that every input is known before it is used.

    Args:
        data: the file.
        nodes: where they start and end.
        known: names of the graph's inputs.
        growth: follows the sizes of results.
        weights: the file of weights.
    """
    allowed = {(domain.encode(), name.encode()): name for domain, name in OPERATORS}
    attributes_seen: set[bytes] = set()  # most nodes repeat those of another one
    constants = growth.constants
    known = known | constants | {b""}  # an omitted optional input
    for start, end in nodes:
        inputs, outputs, attributes, operator, domain = [], [], [], b"", b""
        at = start
        while at < end:  # as `read_fields`, without its overhead: there are 100,000 fields
            tag, length, at = data[at], data[at + 1], at + 2
            if length > 127:
                length, at = read_varint(data, at - 1)
            value = data[at : at + length]
            at += length
            if tag == 0x0A:  # input
                inputs.append(value)
            elif tag == 0x12:  # output
                outputs.append(value)
            elif tag == 0x2A:  # attribute
                if value not in attributes_seen:
                    _check_attribute(value, weights)
                    attributes_seen.add(value)
                attributes.append(value)
            elif tag == 0x22 and not operator:  # op_type
                operator = value
            elif tag == 0x3A and not domain:
                domain = value
            elif tag not in (0x1A, 0x32, 0x4A):  # name, doc_string, metadata_props
                raise RejectedError(f"a node has field {tag >> 3}")
        name = allowed.get((domain, operator))
        if at != end or name is None:
            raise RejectedError(
                f"operator {short_repr((domain + b'.' + operator).strip(b'.').decode(errors='replace'))}"
            )
        if not known.issuperset(inputs):
            raise RejectedError("a node uses a value before it is computed")
        if constants.issuperset(filter(None, inputs)):
            if name not in _FOLDABLE:
                raise RejectedError(f"operator {name!r} with constant inputs only")
            constants.update(outputs)
        known.update(outputs)
        growth.follow(name, inputs, outputs, attributes)


def _check_attribute(data: bytes, weights: _Weights) -> None:
    for number, wire, start, end in read_fields(data, 0, len(data)):
        if wire not in _ATTRIBUTE_FIELDS.get(number, ()):
            raise RejectedError(f"an attribute has field {number}, such as a subgraph")
        if number == 5:
            _check_tensor(data, start, end, weights)
        elif number == 20 and start not in _ATTRIBUTE_TYPES:
            raise RejectedError(f"an attribute has type {start}, such as a subgraph")


def _check_tensor(data: bytes, start: int, end: int, weights: _Weights) -> tuple[bytes, ExternalTensor | None]:
    """Check that a tensor's values are in the graph or in the file of weights; returns its name and the latter."""
    dims: list[int] = []
    kind, name, inline, located = 0, b"", 0, False
    external: dict[bytes, bytes] = {}
    for number, wire, a, b in read_fields(data, start, end):
        if number == 1:  # packed or not
            dims += [a] if wire == VARINT else read_varints(data, a, b)
        elif number == 2 and wire == VARINT:
            kind = a
        elif number == 8 and wire == BYTES:
            name = data[a:b]
        elif number in (4, 5, 7, 9, 10, 11):  # values
            inline += b - a if wire == BYTES else 1
        elif number == 13 and wire == BYTES:
            entry = {field: data[c:d] for field, _, c, d in read_fields(data, a, b)}
            external[entry.get(1, b"")] = entry.get(2, b"")
        elif number == 14 and wire == VARINT:
            located = a == 1
        elif number not in (12, 16):
            raise RejectedError(f"a tensor has field {number}")
    if kind not in _BITS or len(dims) > MAX_RANK or any(dim >> 40 for dim in dims):
        raise RejectedError("a tensor has an impossible type or shape")
    elements = math.prod(dims)
    if not located and not external:
        if elements > min(_MAX_INLINE, 8 * inline):
            raise RejectedError("a tensor has fewer values than its shape")
        return name, None
    if inline or external.keys() - {b"offset", b"length"} != {b"location"} or external[b"location"] != weights.name:
        location = external.get(b"location", b"").decode(errors="replace")
        raise RejectedError(f"weights are in {short_repr(location)} instead of {weights.name.decode(errors='replace')}")
    size = -(-elements * _BITS[kind] // 8)
    offset, length = _decimal(external.get(b"offset", b"0")), _decimal(external.get(b"length", b"%d" % size))
    if length != size or offset + length > weights.size:
        raise RejectedError("weights are outside of their file, or of another size than their shape")
    return name, ExternalTensor(name.decode(), kind, tuple(dims), offset, size)


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise RejectedError("an offset or length is not a number")
    return int(text)
