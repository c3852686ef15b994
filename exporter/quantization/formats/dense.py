"""The format `Dense`: unquantized weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from llm_edge.exporter.graph.editor import name_of, shape_of
from llm_edge.exporter.graph.emitter import EmitContext, Emitter
from llm_edge.exporter.module_names import EMBEDDING
from llm_edge.exporter.quantization.formats.base import WeightFormat


@dataclass(frozen=True, slots=True)
class Dense(WeightFormat):
    """Floating-point weights of 32 or 16 bits. Graphs are written in float32; the pass `float16` converts all of it."""

    bits: int = 32

    kind: ClassVar[str] = "dense"

    @property
    def bytes_per_weight(self) -> float:
        return self.bits / 8

    @property
    def label(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"fp{self.bits}"

    def emitter(self, context: EmitContext) -> DenseEmitter:
        return DenseEmitter(context, self)


class DenseEmitter(Emitter[Dense]):
    """MatMul with the transposed weight, or Gemm with a tied embedding, which is stored once."""

    can_split: ClassVar[bool] = False

    def linear(self, x: ir.Value, weight: ir.Value, path: str, num_splits: int = 1) -> list[ir.Node]:
        assert num_splits == 1
        name = name_of(weight)
        if name == f"{EMBEDDING}.weight":
            return self._tied_head(x, weight, path)
        rows, width = shape_of(weight)
        transposed = self._editor.initializer(
            f"{name}.transposed",
            ir.DataType.FLOAT,
            (width, rows),
            lambda: np.ascontiguousarray(self._context.weights[name].float().numpy().T),
        )
        return [self._editor.node("MatMul", [x, transposed], f"{path}/MatMul")]

    def _tied_head(self, x: ir.Value, weight: ir.Value, path: str) -> list[ir.Node]:
        """Multiply by the transpose of the embedding [V, hidden] without storing a transposed copy."""
        rows, width = shape_of(weight)
        editor = self._editor
        flat = editor.node("Reshape", [x, editor.constant(f"{path}/flat", [-1, width])], f"{path}/Flatten")
        gemm = editor.node("Gemm", [flat.outputs[0], weight], f"{path}/Gemm", transB=1)
        shape = editor.node("Shape", [x], f"{path}/Shape", start=0, end=2)
        vocab = editor.constant(f"{path}/vocab", [rows])
        full_shape = editor.node("Concat", [shape.outputs[0], vocab], f"{path}/Concat", axis=0)
        unflat = editor.node("Reshape", [gemm.outputs[0], full_shape.outputs[0]], f"{path}/Unflatten")
        return [flat, gemm, shape, full_shape, unflat]
