"""Gives each projection of a traced graph the form its recipe asks for, and the graph its weights.

Knows nothing of checkpoints' formats or of bundles. Weights are read, quantized and written one at a time:
every initializer is lazy until the graph is saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from llm_edge.exporter.config import ModelConfig
from llm_edge.exporter.graph import EMBEDDING, LINEAR_DOMAIN
from llm_edge.exporter.model import rotary_tables
from llm_edge.exporter.recipes import HEAD, Blocks, Dense, Format, Recipe

_INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits: activations rounded to 8 bits, block by block


@dataclass(frozen=True, slots=True)
class QuantizedBlocks:
    """A weight [N, K] in the layout of MatMulNBits.

    Attributes:
        data: uint8 [N, K / block, block * bits / 8]; of two 4-bit weights a byte, the first is the low half.
        scales: float32 [N, K / block].
        zero_points: uint8 [N, ceil(K / block * bits / 8)], packed like `data`; None for symmetric blocks,
            whose zero is 2 ** (bits - 1).
    """

    data: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None


def quantize_blocks(weight: Tensor, form: Blocks) -> QuantizedBlocks:
    """Round a weight [N, K] to nearest, block by block; the last block of a row is filled up with zeros.

    The layout is that of onnxruntime's operator documentation (com.microsoft.MatMulNBits).
    """
    rows, width = weight.shape
    blocks = -(-width // form.size)
    padded = torch.nn.functional.pad(weight.float(), (0, blocks * form.size - width))
    grouped = padded.view(rows, blocks, form.size)
    middle, levels = 2 ** (form.bits - 1), 2**form.bits - 1
    if form.symmetric:
        scales = grouped.abs().amax(-1) / (middle - 1)
        zero_points = torch.full_like(scales, middle)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = (high - low) / levels
        zero_points = (-low / scales.where(scales > 0, 1.0)).round()
    divisors = scales.where(scales > 0, 1.0)  # a block of zeros stays one
    levels_of = ((grouped / divisors[..., None]).round() + zero_points[..., None]).clamp(0, levels)
    return QuantizedBlocks(
        data=_pack(levels_of.byte(), form.bits),
        scales=scales.numpy(),
        zero_points=None if form.symmetric else _pack(zero_points.byte(), form.bits),
    )


def _pack(values: Tensor, bits: int) -> npt.NDArray[np.uint8]:
    """Two 4-bit numbers a byte along the last axis, an odd one filled up with zero; 8-bit ones as they are."""
    if bits == 4:
        if values.shape[-1] % 2:
            values = torch.nn.functional.pad(values, (0, 1))
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    return values.contiguous().numpy()


def apply_recipe(model: ir.Model, config: ModelConfig, weights: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Turn a traced graph (see `graph.trace`) into the graph of a precision, in place."""
    lowering = _Lowering(model, weights)
    for node in list(model.graph):
        if node.domain == LINEAR_DOMAIN:
            lowering.linear(node, recipe)
        elif node.op_type == "Gather" and _name(node.inputs[0]) == EMBEDDING:
            lowering.embedding(node, recipe.format_of(HEAD) if config.tie_word_embeddings else recipe.embedding)
    model.opset_imports.pop(LINEAR_DOMAIN, None)
    for name, table in zip(("cos", "sin"), rotary_tables(config), strict=True):
        model.graph.initializers[name].const_value = ir.tensor(table.numpy(), name=name)
    for name, value in list(model.graph.initializers.items()):
        if name in weights:
            if value.uses():
                lowering.fill(name, lambda name=name: weights[name].float().numpy())  # type: ignore[misc]
            else:
                del model.graph.initializers[name]
    if lowering.contrib:
        model.opset_imports["com.microsoft"] = 1


class _Lowering:
    """The graph at work, with the initializers made so far."""

    def __init__(self, model: ir.Model, weights: Mapping[str, Tensor]) -> None:
        self.graph = model.graph
        self.weights = weights
        self.contrib = False
        # Data, scales and zero points of a weight come from one rounding; they are saved one behind the other.
        self._quantized = functools.lru_cache(maxsize=1)(lambda name, form: quantize_blocks(weights[name], form))

    def linear(self, node: ir.Node, recipe: Recipe) -> None:
        """Replace `Linear(x, weight [N, K])`."""
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        assert node.name is not None
        module = node.name.strip("/").removesuffix("/Linear").replace("/", ".")
        form = recipe.format_of(module)
        path = node.name.removesuffix("/Linear")
        if isinstance(form, Blocks):
            replacement = self._blocks(x, weight, form, path)
        elif any(use.node.op_type == "Gather" for use in weight.uses()):
            replacement = self._tied(x, weight, path)
        else:
            replacement = self._dense(x, weight, path)
        self._replace(node, replacement)

    def embedding(self, node: ir.Node, form: Format) -> None:
        """Replace `Gather(weight [V, hidden], input_ids)` where the format asks for it."""
        weight, ids = node.inputs
        assert weight is not None
        if isinstance(form, Dense):
            return
        data, scales, zero_points = self._stored(weight, form)
        rows, width = _shape(weight)
        shape = self._constant(f"{_name(weight)}.shape", [rows, -1])
        flat = self._node("Reshape", [data, shape], "/embed_tokens/Reshape", domain="")
        gathered = self._node(
            "GatherBlockQuantized",
            [flat.outputs[0], ids, scales, *([] if zero_points is None else [zero_points])],
            "/embed_tokens/GatherBlockQuantized",
            block_size=form.size,
            bits=form.bits,
            gather_axis=0,
            quantize_axis=1,
        )
        assert width % form.size == 0
        self._replace(node, [flat, gathered])

    def _blocks(self, x: ir.Value, weight: ir.Value, form: Blocks, path: str) -> list[ir.Node]:
        rows, width = _shape(weight)
        data, scales, zero_points = self._stored(weight, form)
        return [
            self._node(
                "MatMulNBits",
                [x, data, scales, *([] if zero_points is None else [zero_points])],
                f"{path}/MatMulNBits",
                K=width,
                N=rows,
                bits=form.bits,
                block_size=form.size,
                accuracy_level=_INT8_ACTIVATIONS,
            )
        ]

    def _dense(self, x: ir.Value, weight: ir.Value, path: str) -> list[ir.Node]:
        name = _name(weight)
        rows, width = _shape(weight)
        transposed = self._initializer(
            f"{name}.transposed",
            ir.DataType.FLOAT,
            (width, rows),
            lambda: np.ascontiguousarray(self.weights[name].float().numpy().T),
        )
        return [self._node("MatMul", [x, transposed], f"{path}/MatMul", domain="")]

    def _tied(self, x: ir.Value, weight: ir.Value, path: str) -> list[ir.Node]:
        """Read the embedding [V, hidden] as it lies; Gemm transposes without a copy."""
        rows, width = _shape(weight)
        flat = self._node("Reshape", [x, self._constant(f"{path}/flat", [-1, width])], f"{path}/Flatten", domain="")
        gemm = self._node("Gemm", [flat.outputs[0], weight], f"{path}/Gemm", domain="", transB=1)
        shape = self._node("Shape", [x], f"{path}/Shape", domain="", start=0, end=2)
        whole = self._node(
            "Concat",
            [shape.outputs[0], self._constant(f"{path}/vocab", [rows])],
            f"{path}/Concat",
            domain="",
            axis=0,
        )
        unflat = self._node("Reshape", [gemm.outputs[0], whole.outputs[0]], f"{path}/Unflatten", domain="")
        return [flat, gemm, shape, whole, unflat]

    def _stored(self, weight: ir.Value, form: Blocks) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Initializers of a weight in blocks, made once however many nodes read them."""
        name = _name(weight)
        rows, width = _shape(weight)
        blocks = -(-width // form.size)
        data = self._initializer(
            f"{name}.data",
            ir.DataType.UINT8,
            (rows, blocks, form.size * form.bits // 8),
            lambda: self._quantized(name, form).data,
        )
        scales = self._initializer(
            f"{name}.scales", ir.DataType.FLOAT, (rows, blocks), lambda: self._quantized(name, form).scales
        )
        if form.symmetric:
            return data, scales, None

        def zero_points() -> npt.NDArray[np.uint8]:
            points = self._quantized(name, form).zero_points
            assert points is not None
            return points

        packed = -(-blocks * form.bits // 8)
        return (
            data,
            scales,
            self._initializer(f"{name}.zero_points", ir.DataType.UINT8, (rows, packed), zero_points),
        )

    def _constant(self, name: str, numbers: list[int]) -> ir.Value:
        value = self.graph.initializers.get(name)
        if value is None:
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(numbers)]))
            value.const_value = ir.tensor(np.array(numbers, dtype=np.int64), name=name)
            self.graph.register_initializer(value)
        return value

    def _initializer(
        self,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        make: Callable[[], npt.NDArray[np.generic]],
    ) -> ir.Value:
        value = self.graph.initializers.get(name)
        if value is None:
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            value.const_value = _lazy(name, dtype, shape, make)
            self.graph.register_initializer(value)
        return value

    def fill(self, name: str, make: Callable[[], npt.NDArray[np.generic]]) -> None:
        """Give an initializer of the trace its (lazy) numbers."""
        value = self.graph.initializers[name]
        value.const_value = _lazy(name, ir.DataType.FLOAT, _shape(value), make)

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        name: str,
        domain: str = "com.microsoft",
        **attributes: int,
    ) -> ir.Node:
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, name=name)
        node.outputs[0].name = f"{name}/output_0"
        self.contrib = self.contrib or domain == "com.microsoft"
        return node

    def _replace(self, node: ir.Node, replacement: list[ir.Node]) -> None:
        """Put nodes in another's place; the last one takes over its output, name and all."""
        old, new = node.outputs[0], replacement[-1].outputs[0]
        new.type, new.shape = old.type, old.shape
        self.graph.insert_before(node, replacement)
        if old in self.graph.outputs:
            new.name = old.name
            self.graph.outputs[list(self.graph.outputs).index(old)] = new
        ir.convenience.replace_all_uses_with(old, new)
        self.graph.remove(node, safe=True)


def _lazy(
    name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], npt.NDArray[np.generic]]
) -> ir.LazyTensor:
    return ir.LazyTensor(lambda: ir.tensor(make(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name)


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return value.shape.numpy()
