"""`find_router`: recognises how a traced graph chooses and weights experts."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from llm_edge.exporter.graph.passes.patterns import integers_of, made_by


class Router(NamedTuple):
    """Routing that the operators MoE and QMoE compute themselves.

    Attributes:
        logits: [N, E]; the experts with the largest are chosen.
        normalized: whether the weights of the chosen experts, from a softmax of the logits, are divided by their sum.
    """

    logits: ir.Value
    normalized: bool


def find_router(chosen: ir.Value | None, weights: ir.Value | None) -> Router | None:
    """Return the router of these experts and their weights, [N, k]; None if they are computed in another way."""
    top = made_by(_uncast(chosen), "TopK")
    if top is None or not _is_last(top, "axis") or not _is(top, "largest", 1):
        return None
    of_chosen = _softmax_of(weights)
    if of_chosen is not None:  # equal to a softmax of all that is divided by its sum
        return Router(_input(top), normalized=True) if _are_largest(of_chosen, top) else None
    logits = _softmax_of(top.inputs[0])
    if logits is None:
        return None
    if _are_largest(weights, top):
        return Router(logits, normalized=False)
    division = made_by(_uncast(weights), "Div")
    total = None if division is None else made_by(_uncast(division.inputs[1]), "ReduceSum")
    if division is None or total is None or division.inputs[0] is not total.inputs[0] or not _is_row_sum(total):
        return None
    return Router(logits, normalized=True) if _are_largest(division.inputs[0], top) else None


def _softmax_of(value: ir.Value | None) -> ir.Value | None:
    """Return the input of the softmax that computes rows of a matrix."""
    node = made_by(_uncast(value), "Softmax")
    return _input(node) if node is not None and _is_last(node, "axis") else None


def _are_largest(value: ir.Value | None, top: ir.Node) -> bool:
    """Whether a value is what a TopK finds, in its order."""
    value = _uncast(value)
    gathered = made_by(value, "GatherElements")
    if gathered is None:
        return value is top.outputs[0]
    same = _uncast(gathered.inputs[0]) is _uncast(top.inputs[0])
    return same and _is_last(gathered, "axis") and _uncast(gathered.inputs[1]) is top.outputs[1]


def _is_row_sum(node: ir.Node) -> bool:
    return len(node.inputs) > 1 and integers_of(node.inputs[1]) in ([-1], [1]) and _is(node, "keepdims", 1)


def _input(node: ir.Node) -> ir.Value:
    value = _uncast(node.inputs[0])
    assert value is not None
    return value


def _uncast(value: ir.Value | None) -> ir.Value | None:
    """Return a value before casts: graphs compute in float32, so that these change nothing."""
    while (cast := made_by(value, "Cast", "Identity")) is not None:
        value = cast.inputs[0]
    return value


def _is_last(node: ir.Node, name: str) -> bool:
    """Whether an axis of a matrix is the last one, as it is by default."""
    return _is(node, name, -1) or _is(node, name, 1)


def _is(node: ir.Node, name: str, default: int) -> bool:
    found = node.attributes.get(name)
    return found is None or found.as_int() == default
