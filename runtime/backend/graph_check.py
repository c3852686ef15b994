"""`check_graph`: inspects an ONNX file before onnxruntime reads it, and accepts only what the exporter writes.

onnxruntime trusts its input: a graph may loop forever, refer to any file, or compute gigabytes while it is loaded.
Everything outside the allow-lists below is rejected: loops, branches, functions, other domains, other data files. The
fields and their numbers are those of ONNX's onnx.proto; the runtime does not depend on the onnx package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.safe_io import MIB, read_bytes, short_repr

_MAX_BYTES = 32 * MIB  # of the file without its weights; a layer takes about 15 kB
_MAX_NODES = 100_000
_MAX_RANK = 8
_MAX_INLINE = MIB  # elements of a tensor without external data


def _words(text: str) -> list[str]:
    return text.split()


_STANDARD = _words(
    """
    Add And Attention Cast CastLike Clip Concat Constant Cos CumSum DequantizeLinear Div Equal Erf Exp Gather Gelu
    Gemm Greater GreaterOrEqual Identity LayerNormalization Less LessOrEqual Log MatMul Max Min Mul Neg Not Or Pow
    QuantizeLinear RMSNormalization Range Reciprocal ReduceMax ReduceMean ReduceSum Relu Reshape RotaryEmbedding
    Shape Sigmoid SimplifiedLayerNormalization Sin Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh Transpose
    Unsqueeze Where"""
)
_MICROSOFT = _words(
    """
    GatherBlockQuantized GroupQueryAttention MatMulIntegerToFloat MatMulNBits SimplifiedLayerNormalization
    SkipSimplifiedLayerNormalization"""
)
OPERATORS = frozenset({("", name) for name in _STANDARD} | {("com.microsoft", name) for name in _MICROSOFT})
"""(domain, operator) of all nodes that a graph may have: what the exporter writes, and elementwise functions."""

# onnxruntime computes nodes whose inputs are all constant when it loads a graph. Only operators whose results are not
# larger than their inputs may have such inputs, or a small file could allocate any amount of memory.
_FOLDABLE = frozenset({"Cast", "CastLike", "Constant", "DequantizeLinear", "Identity", "Reshape", "Shape"})

# Concat nodes that feed one another double their result; a layer joins few values before its next projection, whose
# weight fixes the size again. A Range counts tokens: from zero or a size up to a size.
_MAX_JOINED = 64
_PROJECTIONS = frozenset({"Gemm", "MatMul", "MatMulIntegerToFloat", "MatMulNBits"})
_ATTENTION = frozenset({"Attention", "GroupQueryAttention"})

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MODEL_FIELDS = {1: _VARINT, 2: _BYTES, 3: _BYTES, 4: _BYTES, 5: _VARINT, 6: _BYTES, 7: _BYTES, 8: _BYTES, 14: _BYTES}
_GRAPH_FIELDS = {1: _BYTES, 2: _BYTES, 5: _BYTES, 10: _BYTES, 11: _BYTES, 12: _BYTES, 13: _BYTES, 16: _BYTES}
_ATTRIBUTE_FIELDS = {1: (_BYTES,), 2: (_FIXED32,), 3: (_VARINT,), 4: (_BYTES,), 5: (_BYTES,), 7: (_BYTES, _FIXED32)}
_ATTRIBUTE_FIELDS |= {8: (_BYTES, _VARINT), 9: (_BYTES,), 13: (_BYTES,), 20: (_VARINT,)}
_ATTRIBUTE_TYPES = {1, 2, 3, 4, 6, 7, 8}  # FLOAT, INT, STRING, TENSOR, FLOATS, INTS, STRINGS; not GRAPH
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
"""Bits of an element by TensorProto.DataType; strings and complex numbers are missing."""


class _RejectedError(Exception):
    """The reason why a file is rejected."""


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
    except (_RejectedError, IndexError, ValueError) as error:  # IndexError: an integer is cut off
        why = str(error) if isinstance(error, _RejectedError) else "it is damaged"
        raise BundleError(f"{path}: not a graph that llm-export writes: {why}: export the bundle again") from error
    return weights.tensors


class _Weights:
    """The file with the weights of a graph: its name, its size in bytes, and the initializers found in it so far."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name.encode("utf-8", "surrogateescape"), size
        self.tensors: list[ExternalTensor] = []


def _check_model(data: bytes, weights: _Weights) -> None:
    graphs = []
    for number, wire, start, end in _fields(data, 0, len(data)):
        if _MODEL_FIELDS.get(number) != wire:
            raise _RejectedError(f"it has field {number}, such as functions or training information")
        if number == 8:
            domain = b"".join(data[a:b] for field, _, a, b in _fields(data, start, end) if field == 1)
            if domain not in (b"", b"ai.onnx", b"com.microsoft"):
                raise _RejectedError(f"it has operators of the domain {short_repr(domain)}")
        elif number == 7:
            graphs.append((start, end))
    if len(graphs) != 1:
        raise _RejectedError(f"it has {len(graphs)} graphs")
    _check_main_graph(data, *graphs[0], weights)


def _check_main_graph(data: bytes, start: int, end: int, weights: _Weights) -> None:
    nodes, inputs, constants = [], set(), set()
    for number, wire, a, b in _fields(data, start, end):
        if _GRAPH_FIELDS.get(number) != wire:
            raise _RejectedError(f"its graph has field {number}, such as sparse or quantized initializers")
        if number == 1:
            nodes.append((a, b))
        elif number == 5:
            name, tensor = _check_tensor(data, a, b, weights)
            if name in constants:
                raise _RejectedError("two tensors have the same name")
            constants.add(name)
            weights.tensors += [tensor] if tensor is not None else []
        elif number == 11:
            inputs.add(b"".join(data[c:d] for field, _, c, d in _fields(data, a, b) if field == 1))
    if len(nodes) > _MAX_NODES:
        raise _RejectedError(f"it has {len(nodes):,} nodes, more than {_MAX_NODES:,}")
    _check_nodes(data, nodes, inputs, constants - inputs, weights)


def _check_nodes(
    data: bytes, nodes: list[tuple[int, int]], known: set[bytes], constants: set[bytes], weights: _Weights
) -> None:
    """Check the nodes of a graph, which are sorted, so that every input is known before it is used.

    Args:
        data: the file.
        nodes: where they start and end.
        known: names of the graph's inputs.
        constants: names of the initializers that are no inputs.
        weights: the file of weights.
    """
    allowed = {(domain.encode(), name.encode()): name for domain, name in OPERATORS}
    attributes_seen: set[bytes] = set()  # most nodes repeat those of another one
    known = known | constants | {b""}  # an omitted optional input
    growth = _Growth(constants)
    for start, end in nodes:
        inputs, outputs, attributes, operator, domain = [], [], [], b"", b""
        at = start
        while at < end:  # as `_fields`, without its overhead: there are 100,000 fields
            tag, length, at = data[at], data[at + 1], at + 2
            if length > 127:
                length, at = _varint(data, at - 1)
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
                raise _RejectedError(f"a node has field {tag >> 3}")
        name = allowed.get((domain, operator))
        if at != end or name is None:
            raise _RejectedError(
                f"operator {short_repr((domain + b'.' + operator).strip(b'.').decode(errors='replace'))}"
            )
        if not known.issuperset(inputs):
            raise _RejectedError("a node uses a value before it is computed")
        if constants.issuperset(filter(None, inputs)):
            if name not in _FOLDABLE:
                raise _RejectedError(f"operator {name!r} with constant inputs only")
            constants.update(outputs)
        known.update(outputs)
        growth.follow(name, inputs, outputs, attributes)


class _Growth:
    """Follows the values that decide how large results can become.

    Args:
        constants: names of all values that are constant; nodes may add to it.
    """

    def __init__(self, constants: set[bytes]) -> None:
        self._constants = constants
        self._joined: dict[bytes, int] = {}  # values that were concatenated to make up a value; 1 if missing
        self._sizes: set[bytes] = set()  # int64 numbers of elements
        self._zeros: set[bytes] = set()

    def follow(self, name: str, inputs: list[bytes], outputs: list[bytes], attributes: list[bytes]) -> None:
        """Take in a node; `attributes` are those of a Constant."""
        if self._is_size(name, inputs):
            self._sizes.update(outputs)
        elif name == "Constant" and all(map(_is_zero, attributes)):
            self._zeros.update(outputs)
        elif name == "Range" and not (
            self._sizes.issuperset(inputs[1:2]) and (self._sizes | self._zeros).issuperset(inputs[:1])
        ):
            raise _RejectedError("a Range that does not count tokens")
        if self._joined or name == "Concat":
            joined = self._number_of_joined(name, inputs)
            if joined > _MAX_JOINED:
                raise _RejectedError(f"more than {_MAX_JOINED} values are concatenated")
            self._joined.update(dict.fromkeys(outputs, joined) if joined > 1 else {})

    def _is_size(self, name: str, inputs: list[bytes]) -> bool:
        if name in ("Squeeze", "Identity"):
            return self._sizes.issuperset(inputs[:1])
        if name == "CastLike":  # a zero becomes the type of a size
            return self._sizes.issuperset(inputs[1:]) and (self._sizes | self._zeros).issuperset(inputs[:1])
        return name == "Shape" or (name == "Sub" and self._sizes.issuperset(inputs))

    def _number_of_joined(self, name: str, inputs: list[bytes]) -> int:
        if name in _ATTENTION or (name in _PROJECTIONS and not self._constants.isdisjoint(filter(None, inputs))):
            return 1
        counts = [self._joined.get(each, 1) for each in inputs]
        return sum(counts) if name == "Concat" else max(counts, default=1)


def _is_zero(attribute: bytes) -> bool:
    """Whether an attribute that passed `_check_attribute` holds nothing but zeros: an integer, or a tensor's bytes."""
    for number, _, start, end in _fields(attribute, 0, len(attribute)):
        if number == 3:
            return start == 0
        if number == 5:
            values = [
                attribute[a:b] for field, _, a, b in _fields(attribute, start, end) if field in (4, 5, 7, 9, 10, 11)
            ]
            return not any(map(any, values))
    return False


def _check_attribute(data: bytes, weights: _Weights) -> None:
    for number, wire, start, end in _fields(data, 0, len(data)):
        if wire not in _ATTRIBUTE_FIELDS.get(number, ()):
            raise _RejectedError(f"an attribute has field {number}, such as a subgraph")
        if number == 5:
            _check_tensor(data, start, end, weights)
        elif number == 20 and start not in _ATTRIBUTE_TYPES:
            raise _RejectedError(f"an attribute has type {start}, such as a subgraph")


def _check_tensor(data: bytes, start: int, end: int, weights: _Weights) -> tuple[bytes, ExternalTensor | None]:
    """Check that a tensor's values are in the graph or in the file of weights; returns its name and the latter."""
    dims: list[int] = []
    kind, name, inline, located = 0, b"", 0, False
    external: dict[bytes, bytes] = {}
    for number, wire, a, b in _fields(data, start, end):
        if number == 1:  # packed or not
            dims += [a] if wire == _VARINT else _varints(data, a, b)
        elif number == 2 and wire == _VARINT:
            kind = a
        elif number == 8 and wire == _BYTES:
            name = data[a:b]
        elif number in (4, 5, 7, 9, 10, 11):  # values
            inline += b - a if wire == _BYTES else 1
        elif number == 13 and wire == _BYTES:
            entry = {field: data[c:d] for field, _, c, d in _fields(data, a, b)}
            external[entry.get(1, b"")] = entry.get(2, b"")
        elif number == 14 and wire == _VARINT:
            located = a == 1
        elif number not in (12, 16):
            raise _RejectedError(f"a tensor has field {number}")
    if kind not in _BITS or len(dims) > _MAX_RANK or any(dim >> 40 for dim in dims):
        raise _RejectedError("a tensor has an impossible type or shape")
    elements = math.prod(dims)
    if not located and not external:
        if elements > min(_MAX_INLINE, 8 * inline):
            raise _RejectedError("a tensor has fewer values than its shape")
        return name, None
    if inline or external.keys() - {b"offset", b"length"} != {b"location"} or external[b"location"] != weights.name:
        location = external.get(b"location", b"").decode(errors="replace")
        raise _RejectedError(
            f"weights are in {short_repr(location)} instead of {weights.name.decode(errors='replace')}"
        )
    size = -(-elements * _BITS[kind] // 8)
    offset, length = _decimal(external.get(b"offset", b"0")), _decimal(external.get(b"length", b"%d" % size))
    if length != size or offset + length > weights.size:
        raise _RejectedError("weights are outside of their file, or of another size than their shape")
    return name, ExternalTensor(name.decode(), kind, tuple(dims), offset, size)


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise _RejectedError("an offset or length is not a number")
    return int(text)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message as (number, wire type, start, end); for an integer, start is its value and end 0."""
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            length, at = _varint(data, at)
            if at + length > end:
                raise _RejectedError("it is truncated")
            yield number, wire, at, at + length
            at += length
        elif wire == _VARINT:
            value, at = _varint(data, at)
            yield number, wire, value, 0
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
            yield number, wire, at, at + size
            at += size
        else:
            raise _RejectedError("it is damaged")
    if at != end:
        raise _RejectedError("it is truncated")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer in base 128, and the position after it."""
    value = data[at]
    at += 1
    if value < 128:
        return value, at
    value &= 127
    for shift in range(7, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _RejectedError("it is damaged")


def _varints(data: bytes, at: int, end: int) -> list[int]:
    values = []
    while at < end:
        value, at = _varint(data, at)
        values.append(value)
    return values
