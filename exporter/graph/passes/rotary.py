"""Pass that fuses the arithmetic of rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from llm_edge.exporter.graph.editor import Editor
from llm_edge.exporter.graph.passes.patterns import Dims, dims_of, integers_of, made_by, number_of, only_use, operands

_SWAPPED = [0, 2, 1, 3]


def fuse_rotary(model: ir.Model) -> None:
    """Fuse x * cos + rotate_half(x) * sin into RotaryEmbedding.

    Requires: shapes of values; constants are computed.
    Does: replaces the arithmetic on the heads of queries or keys, [B, H, S, D] or [B, S, H, D], also where only the
        first elements of a head are rotated. Pairs are either the halves of a head or neighbours, and both elements of
        a pair must have the same cosine and sine, which are read [B, S, D / 2].
    Ensures: the same values but for rounding. Each node has views before and after it, for `simplify_views` to merge.
    """
    editor = Editor(model)
    angles = _Angles(editor)
    for node in list(model.graph):
        rotation = None if node.graph is None or node.domain != "" else _match(node)
        if rotation is not None:
            _replace(editor, angles, rotation)
    common_passes.RemoveUnusedNodesPass()(model)


@dataclass(frozen=True, slots=True)
class _Rotation:
    """What is rotated.

    Attributes:
        last: the node that computes the result.
        parts: the heads, [B, H, S, D] or [B, S, H, D], or the two halves of each.
        cos, sin: of all elements of a head, or of each pair if `per_pair` is true: [B, 1, S, …] or [B, S, 1, …].
        interleaved: whether pairs are neighbours.
        rest: number of elements of a head after those that are rotated.
    """

    last: ir.Node
    parts: tuple[ir.Value, ...]
    cos: ir.Value
    sin: ir.Value
    per_pair: bool = False
    interleaved: bool = False
    rest: int = 0


# ---- recognition


class _Cut(NamedTuple):
    """The elements of another value's last axis that a value has."""

    source: ir.Value
    start: int
    stop: int
    step: int


def _cut(value: ir.Value | None) -> _Cut | None:
    node = made_by(value, "Slice", "Split")
    if node is None or value is None or node.inputs[0] is None:
        return None
    source, size = node.inputs[0], _width(node.inputs[0])
    if node.op_type == "Split":
        widths = [_width(each) for each in node.outputs[: value.index() + 1]]  # type: ignore[operator]
        if not _is_last(node.attributes["axis"].as_int(), source) or not all(widths):
            return None
        return _Cut(source, sum(widths[:-1]), sum(widths), 1)
    start, stop, axis, step = [integers_of(each) for each in [*node.inputs[1:], *[None] * 4][:4]]
    if not start or not stop or not axis or not size or len(axis) != 1 or not _is_last(axis[0], source):
        return None
    return _Cut(source, *slice(start[0], stop[0], step[0] if step else 1).indices(size))


def _width(value: ir.Value | None) -> int:
    """Return the size of the last axis; 0 if it is not known."""
    shape = dims_of(value)
    return shape[-1] if shape and isinstance(shape[-1], int) else 0


def _is_last(axis: int, value: ir.Value) -> bool:
    shape = dims_of(value)
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _is_concat(node: ir.Node | None) -> TypeGuard[ir.Node]:
    """Whether a node concatenates two values along their last axis."""
    return (
        node is not None
        and node.op_type == "Concat"
        and len(node.inputs) == 2
        and _is_last(node.attributes["axis"].as_int(), node.outputs[0])
    )


def _is_pair(first: ir.Value | None, second: ir.Value | None, x: ir.Value, *, interleaved: bool) -> bool:
    """Whether two values are the halves of x or, if `interleaved` is true, its even and its odd elements."""
    width = _width(x)
    half = width // 2
    if not width or width % 2:
        return False
    wanted = [(x, 0, width, 2), (x, 1, width, 2)] if interleaved else [(x, 0, half, 1), (x, half, width, 1)]
    return [_cut(first), _cut(second)] == wanted


def _match(node: ir.Node) -> _Rotation | None:
    found = _match_sum(node) if node.op_type == "Add" else _match_halves(node) if _is_concat(node) else None
    return None if found is None else _with_rest(found)


def _match_sum(node: ir.Node) -> _Rotation | None:
    """Match x * cos + turned(x) * sin."""
    for first, second in operands(node):
        for x, cos in operands(made_by(first, "Mul")):
            for turned, sin in operands(made_by(second, "Mul")):
                for interleaved in (False, True):
                    if _is_turned(turned, x, interleaved=interleaved):
                        return _Rotation(node, (x,), cos, sin, interleaved=interleaved)
    return None


def _is_turned(value: ir.Value, x: ir.Value, *, interleaved: bool) -> bool:
    """Whether a value has (-b, a) where x has the pair (a, b)."""
    if interleaved:  # two columns next to each other
        reshape, shape = made_by(value, "Reshape"), dims_of(x)
        concat = None if reshape is None else made_by(reshape.inputs[0], "Concat")
        if not _is_concat(concat) or shape is None or dims_of(value) != shape:
            return False
        if dims_of(concat.outputs[0]) != (*shape[:-1], _width(x) // 2, 2):
            return False
        columns = [made_by(each, "Unsqueeze", "Reshape") for each in concat.inputs]
        parts = [None if each is None else each.inputs[0] for each in columns]
    else:
        concat = made_by(value, "Concat")
        if not _is_concat(concat):
            return False
        parts = list(concat.inputs)
    negated = made_by(parts[0], "Neg")
    return negated is not None and _is_pair(parts[1], negated.inputs[0], x, interleaved=interleaved)


def _match_halves(node: ir.Node) -> _Rotation | None:
    """Match concat(a * cos - b * sin, b * cos + a * sin)."""
    difference, total = made_by(node.inputs[0], "Sub"), made_by(node.inputs[1], "Add")
    if difference is None or total is None:
        return None
    factors = [set() if (made := made_by(each, "Mul")) is None else {*made.inputs} for each in total.inputs]
    for a, cos in operands(made_by(difference.inputs[0], "Mul")):
        for b, sin in operands(made_by(difference.inputs[1], "Mul")):
            products = [{b, cos}, {a, sin}]
            if factors in (products, products[::-1]) and dims_of(a) == dims_of(b):
                cut = _cut(a)
                is_whole = cut is not None and _is_pair(a, b, cut.source, interleaved=False)
                return _Rotation(node, (cut.source,) if cut and is_whole else (a, b), cos, sin, per_pair=True)
    return None


def _with_rest(rotation: _Rotation) -> _Rotation:
    """Include the elements of each head that follow those that are rotated, where these are its first."""
    cut, last = _cut(rotation.parts[0]), only_use(rotation.last.outputs[0])
    if len(rotation.parts) == 2 or cut is None or cut[1:] != (0, cut.stop, 1) or not _is_concat(last):
        return rotation
    width = _width(cut.source)
    if last.inputs[0] is not rotation.last.outputs[0] or _cut(last.inputs[1]) != (cut.source, cut.stop, width, 1):
        return rotation
    return replace(rotation, last=last, parts=(cut.source,), rest=width - cut.stop)


# ---- replacement


def _replace(editor: Editor, angles: _Angles, rotation: _Rotation) -> None:
    """Replace a rotation if its shapes are those of heads and angles."""
    shape, given = dims_of(rotation.last.outputs[0]), dims_of(rotation.cos)
    if shape is None or given is None or len(shape) != 4 or len(given) != 4 or dims_of(rotation.sin) != given:
        return
    is_transposed = given[1] == 1  # [B, H, S, D]
    batch, length, heads, width = (shape[axis] for axis in (_SWAPPED if is_transposed else range(4)))
    if given[:3] != ((batch, 1, length) if is_transposed else (batch, length, 1)):
        return
    if not isinstance(heads, int) or not isinstance(width, int) or dims_of(rotation.parts[0])[:3] != shape[:3]:  # type: ignore[index]
        return
    pairs = [
        each if rotation.per_pair else angles.of(each, rotation.last, interleaved=rotation.interleaved)
        for each in (rotation.cos, rotation.sin)
    ]
    rotated = width - rotation.rest
    if any(2 * _width(each) != rotated for each in pairs):
        return
    chain = _Chain(editor, f"{rotation.last.name}/RotaryEmbedding")
    flat = [
        chain.reshape(each, [0, -1, rotated // 2], (batch, length, rotated // 2), label)
        for label, each in zip(("cos", "sin"), pairs, strict=True)
    ]
    x: ir.Value | None = rotation.parts[0]
    if len(rotation.parts) == 2:
        x = chain.add("Concat", rotation.parts, shape, "x", axis=-1)
    if is_transposed:
        x = chain.add("Transpose", [x], (batch, length, heads, width), "in", perm=_SWAPPED)
    x = chain.reshape(x, [0, 0, heads * width], (batch, length, heads * width), "flat")
    attributes: dict[str, Any] = {"num_heads": heads}
    attributes |= {"rotary_embedding_dim": rotated} if rotation.rest else {}
    attributes |= {"interleaved": 1} if rotation.interleaved else {}
    x = chain.add("RotaryEmbedding", [x, *flat], (batch, length, heads * width), **attributes)
    x = chain.reshape(x, [0, 0, heads, width], (batch, length, heads, width), "heads")
    if is_transposed:
        chain.add("Transpose", [x], shape, "out", perm=_SWAPPED)
    editor.replace(rotation.last, chain.nodes)


class _Chain:
    """Creates nodes of float tensors with their shapes, without inserting them into the graph."""

    def __init__(self, editor: Editor, name: str) -> None:
        self.nodes: list[ir.Node] = []
        self._editor = editor
        self._name = name

    def add(
        self, op_type: str, inputs: Sequence[ir.Value | None], shape: Dims, label: str = "", **attributes: Any
    ) -> ir.Value:
        name = f"{self._name}/{label}" if label else self._name
        node = self._editor.node(op_type, inputs, name, **attributes)
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(node)
        return node.outputs[0]

    def reshape(self, x: ir.Value | None, sizes: list[int], shape: Dims, label: str) -> ir.Value:
        name = f"shape.{'_'.join(str(size) for size in sizes)}"
        return self.add("Reshape", [x, self._editor.constant(name, sizes)], shape, label)


class _Angles:
    """Finds cosines and sines of pairs of elements."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._found: dict[tuple[ir.Value, bool], ir.Value | None] = {}

    def of(self, value: ir.Value, before: ir.Node, *, interleaved: bool) -> ir.Value | None:
        """Return [B, …, D / 2] for cosines or sines [B, …, D], with the same order of rows; None if a pair has two.

        New nodes are inserted before a node.
        """
        key = value, interleaved
        if key not in self._found:
            self._found[key] = self._of(value, before, interleaved)
        return self._found[key]

    def _of(self, value: ir.Value, before: ir.Node, interleaved: bool) -> ir.Value | None:
        node = made_by(value, "Concat", "Reshape", "Unsqueeze", "Cos", "Sin", "Mul")
        if node is None:
            return None
        source = node.inputs[0]
        if not interleaved and _is_concat(node):
            return source if node.inputs[1] is source else None
        if interleaved and (repeated := _repeated(value)) is not None:
            return repeated
        if node.op_type in ("Concat", "Reshape", "Unsqueeze"):
            given, shape = dims_of(source), dims_of(value)
            if node.op_type == "Concat" or not given or not shape or (given[0], given[-1]) != (shape[0], shape[-1]):
                return None
            return self.of(source, before, interleaved=interleaved)  # type: ignore[arg-type]
        factors: list[ir.Value] = []
        if node.op_type == "Mul":
            source, *factors = next((pair for pair in operands(node) if number_of(pair[1]) is not None), (None,))
        half = None if source is None else self.of(source, before, interleaved=interleaved)
        shape = dims_of(half)
        if half is None or shape is None:
            return None
        chain = _Chain(self._editor, f"{node.name}/half")
        chain.add(node.op_type, [half, *factors], shape)
        self._editor.graph.insert_before(before, chain.nodes)
        return chain.nodes[0].outputs[0]


def _repeated(value: ir.Value) -> ir.Value | None:
    """Return the value whose elements this one has twice each, next to each other."""
    reshape = made_by(value, "Reshape")
    expand = None if reshape is None else made_by(reshape.inputs[0], "Expand")
    column = None if expand is None else made_by(expand.inputs[0], "Unsqueeze")
    given = None if column is None else dims_of(column.inputs[0])
    if (
        expand is None
        or column is None
        or given is None
        or dims_of(value) != (*given[:-1], 2 * _width(column.inputs[0]))
    ):
        return None
    is_last = integers_of(column.inputs[1]) in ([-1], [len(given)])
    return column.inputs[0] if is_last and integers_of(expand.inputs[1]) == [*[1] * len(given), 2] else None
