"""Helpers for passes that recognise nodes of a traced graph."""

from __future__ import annotations

import onnx_ir as ir

Dims = tuple[int | str, ...]


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that computes a value if it is a standard operator of one of these types."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def dims_of(value: ir.Value | None) -> Dims | None:
    """Return the dimensions of a value, numbers or names; None if one is not known."""
    if value is None or value.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return None if None in dims else tuple(dims)  # type: ignore[arg-type]


def number_of(value: ir.Value | None) -> float | None:
    """Return the element of a constant that has only one; None for other values."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def integers_of(value: ir.Value | None) -> list[int] | None:
    """Return the elements of a constant vector or scalar of integers; None for other values."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or tensor.size > 16:
        return None
    return [int(number) for number in tensor.numpy().reshape(-1)]


def operands(node: ir.Node | None) -> list[tuple[ir.Value, ir.Value]]:
    """Return both orders of the two inputs of a commutative node; none if there is no node."""
    if node is None:
        return []
    first, second = node.inputs
    assert first is not None
    assert second is not None
    return [(first, second), (second, first)]


def only_use(value: ir.Value) -> ir.Node | None:
    """Return the only node that uses a value; None if there are others, or it is an output of the graph."""
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None
