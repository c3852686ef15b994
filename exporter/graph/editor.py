"""Helpers for editing a graph in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[np.generic]


class Editor:
    """Adds nodes and initializers to a graph. Initializers are lazy: computed when the graph is saved."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        domain: str = "",
        outputs: int = 1,
        **attributes: int | float | Sequence[int],
    ) -> ir.Node:
        """Create a node whose outputs are named after it, without inserting it into the graph."""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}/output_{index}"
        self.model.opset_imports.setdefault(domain, 1)
        return node

    def constant(self, name: str, numbers: list[int]) -> ir.Value:
        """Return the int64 vector of this name; created on the first call."""
        array = np.array(numbers, dtype=np.int64)
        return self.initializer(name, ir.DataType.INT64, array.shape, lambda: array)

    def scalar(self, name: str, number: float) -> ir.Value:
        """Return the float32 scalar of this name; created on the first call."""
        array = np.array(number, dtype=np.float32)
        return self.initializer(name, ir.DataType.FLOAT, array.shape, lambda: array)

    def initializer(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.Value:
        """Return the initializer of this name, created on the first call; `make` computes its values on saving."""
        value = self.graph.initializers.get(name)
        if value is None:
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            value.const_value = lazy_tensor(name, dtype, shape, make)
            self.graph.register_initializer(value)
        return value

    def replace(self, node: ir.Node, replacement: list[ir.Node], results: list[ir.Value] | None = None) -> None:
        """Replace a node. The results take over the uses and types of its outputs, and names of graph outputs.

        Args:
            node: node to remove.
            replacement: nodes to insert, in order.
            results: one value per output of `node`; None uses the output of the last inserted node.
        """
        self.graph.insert_before(node, replacement)
        for old, new in zip(node.outputs, results or [replacement[-1].outputs[0]], strict=True):
            new.type, new.shape = old.type, old.shape
            if old in self.graph.outputs:
                new.name = old.name
                self.graph.outputs[list(self.graph.outputs).index(old)] = new
            ir.convenience.replace_all_uses_with(old, new)
        self.graph.remove(node, safe=True)


def lazy_tensor(name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.LazyTensor:
    """Return a tensor whose values are computed when it is written, and not kept."""

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(make(), dtype=dtype, shape=ir.Shape(shape), name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


def name_of(value: ir.Value | None) -> str:
    """Return the name of a value that has one."""
    assert value is not None
    assert value.name is not None
    return value.name


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Return the shape of a value whose dimensions are all known."""
    assert value.shape is not None
    return value.shape.numpy()
