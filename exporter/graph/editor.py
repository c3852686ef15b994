"""Small tools for changing a graph in place. Knows nothing of models or precisions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[np.generic]


class Editor:
    """Adds nodes and initializers to a graph; initializers of weights stay lazy until the graph is saved."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph

    def node(
        self, op_type: str, inputs: list[ir.Value | None], name: str, domain: str = "", **attributes: int
    ) -> ir.Node:
        """Make a node of one output; it is not in the graph yet."""
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, name=name)
        node.outputs[0].name = f"{name}/output_0"
        self.model.opset_imports.setdefault(domain, 1)
        return node

    def constant(self, name: str, numbers: list[int]) -> ir.Value:
        """An int64 vector, made once a name."""
        array = np.array(numbers, dtype=np.int64)
        return self.initializer(name, ir.DataType.INT64, array.shape, lambda: array)

    def scalar(self, name: str, number: float) -> ir.Value:
        """A float32 scalar, made once a name."""
        array = np.array(number, dtype=np.float32)
        return self.initializer(name, ir.DataType.FLOAT, array.shape, lambda: array)

    def initializer(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.Value:
        """A tensor whose numbers `make` yields when they are written, made once a name."""
        value = self.graph.initializers.get(name)
        if value is None:
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            value.const_value = lazy_tensor(name, dtype, shape, make)
            self.graph.register_initializer(value)
        return value

    def replace(self, node: ir.Node, replacement: list[ir.Node], results: list[ir.Value] | None = None) -> None:
        """Put nodes in another's place; their results take over its outputs, names and all.

        Args:
            node: what goes.
            replacement: what comes, in order.
            results: one value for each output of `node`; None takes the output of the last node that comes.
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
    """A tensor that is made when it is written, and not kept."""

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(make(), dtype=dtype, shape=ir.Shape(shape), name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


def name_of(value: ir.Value | None) -> str:
    """Name of a value that has one."""
    assert value is not None
    assert value.name is not None
    return value.name


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Shape of a value whose dimensions are all known."""
    assert value.shape is not None
    return value.shape.numpy()
