"""Pass that simplifies reshapes, transposes and expands, and the arithmetic of their shapes."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from llm_edge.exporter.graph.editor import Editor
from llm_edge.exporter.graph.passes.patterns import Dims, dims_of, integers_of, made_by

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze")


def simplify_views(model: ir.Model) -> None:
    """Merge successive views, and remove those that change nothing.

    Requires: shapes of values as PyTorch's exporter records them: dimensions of one name are equal.
    Does: reads a reshape's input before the reshapes in front of it, gives it a constant shape where at most one
        dimension is not that of the input, merges successive transposes, makes those that move only dimensions of 1
        reshapes, and removes expands and slices that leave a shape as it is.
    Ensures: the same values; shape arithmetic that is no longer used is removed.
    """
    editor = Editor(model)
    for node in list(model.graph):
        if node.domain != "" or (node.outputs and dims_of(node.outputs[0]) is None):
            continue
        if node.op_type in _VIEWS:
            _simplify_view(editor, node)
        elif node.op_type == "Transpose":
            _simplify_transpose(editor, node)
        elif node.op_type in ("Expand", "Slice"):
            source = node.inputs[0]
            assert source is not None
            if dims_of(source) == dims_of(node.outputs[0]) and not _reverses(node):
                _bypass(node, source)
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.CommonSubexpressionEliminationPass()(model)


def _simplify_view(editor: Editor, node: ir.Node) -> None:
    wanted = dims_of(node.outputs[0])
    assert wanted is not None
    source = node.inputs[0]
    sources = []
    while source is not None:
        sources.append(source)
        before = made_by(source, *_VIEWS)
        source = None if before is None else before.inputs[0]
    for source in reversed(sources):
        given = dims_of(source)
        if given is None:
            continue
        if given == wanted:
            _bypass(node, source)
            return
        shape = _relative_shape(given, wanted)
        if shape is None or (node.op_type in ("Squeeze", "Unsqueeze") and source is node.inputs[0]):
            continue
        name = f"shape.{'_'.join(str(size) for size in shape)}"
        reshape = editor.node("Reshape", [source, editor.constant(name, shape)], node.name or "")
        reshape.outputs[0].name = node.outputs[0].name
        editor.replace(node, [reshape])
        return


def _relative_shape(given: Dims, wanted: Dims) -> list[int] | None:
    """Return the shape for Reshape: 0 copies a dimension, and one may be -1; None if there is no such shape."""
    shape = [
        size if isinstance(size, int) else 0 if index < len(given) and given[index] == size else -1
        for index, size in enumerate(wanted)
    ]
    return None if shape.count(-1) > 1 or 0 in wanted else shape


def _simplify_transpose(editor: Editor, node: ir.Node) -> None:
    before = made_by(node.inputs[0], "Transpose")
    order = list(node.attributes["perm"].as_ints())
    source = node.inputs[0]
    if before is not None:
        first = before.attributes["perm"].as_ints()
        order = [first[axis] for axis in order]
        source = before.inputs[0]
    assert source is not None
    if order == sorted(order):
        _bypass(node, source)
        return
    if before is not None:
        node.replace_input_with(0, source)
        node.attributes["perm"] = ir.AttrInt64s("perm", order)
    given = dims_of(source)
    moved = [axis for axis in order if given is not None and given[axis] != 1]
    if given is not None and moved == sorted(moved):
        _simplify_view(editor, node)


def _reverses(node: ir.Node) -> bool:
    """Whether a node may be a slice with negative steps."""
    steps = integers_of(node.inputs[4]) if node.op_type == "Slice" and len(node.inputs) > 4 else [1]
    return steps is None or min(steps) < 0


def _bypass(node: ir.Node, source: ir.Value) -> None:
    """Let the users of a node read its input; outputs of the graph keep their node."""
    if not node.outputs[0].is_graph_output():
        ir.convenience.replace_all_uses_with(node.outputs[0], source)
