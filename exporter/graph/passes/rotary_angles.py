"""Pass that computes cosines and sines of rotary angles from positions, so that a graph has no tables of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from llm_edge.exporter.graph.attention import DOMAIN
from llm_edge.exporter.graph.editor import Editor, name_of
from llm_edge.model.config import ModelConfig
from llm_edge.model.rope import Rope

PREFIX = "rotary_"
"""Names of the initializers begin with it, and names of the nodes with a slash and it."""
_WIDTH = 16
"""onnxruntime computes the last elements of a tensor by another method than whole vectors, with other last bits: with
rows of this multiple, the angles of a token do not depend on the tokens beside it."""


def compute_rotary_angles(model: ir.Model, config: ModelConfig) -> None:
    """Replace the abstract nodes RotaryAngles and the rotary tables that they read.

    Requires: nodes `RotaryAngles(cos_n, sin_n, positions [B, S])`, where n is an index of `config.ropes`.
    Does: computes cosines and sines of positions times frequencies, in float32 as the tables do.
    Ensures: for one head, the outputs are [B, S, D / 2], rows of the tables within rounding of cosine and sine; for
        several [B, S * heads, D / 2]: for each token a row per query and key head, then rows of ones and zeros for
        value heads. Rows of query heads are multiplied by `query_factor`.
    """
    editor = Editor(model)
    for node in [node for node in model.graph if node.domain == DOMAIN and node.op_type == "RotaryAngles"]:
        table = name_of(node.inputs[0])
        rope = config.ropes[int(table.removeprefix("cos_"))]
        heads = _Heads.of(node)
        name = f"{PREFIX}{table.removeprefix('cos_')}"
        angles = _Angles(editor, rope, f"{name}.query" if not heads.keys else name)
        positions = node.inputs[2]
        assert positions is not None
        results = angles.of(positions, heads)
        editor.replace(node, angles.nodes, results)
    for name in [name for name in model.graph.initializers if name.startswith(("cos_", "sin_"))]:
        del model.graph.initializers[name]


class _Heads(NamedTuple):
    """Numbers of heads of each kind, and the factor of queries."""

    queries: int
    keys: int
    values: int
    query_factor: float

    @staticmethod
    def of(node: ir.Node) -> _Heads:
        """Those of a node RotaryAngles."""
        queries, keys, values = (node.attributes[f"{kind}_heads"].as_int() for kind in ("query", "key", "value"))
        return _Heads(queries, keys, values, node.attributes["query_factor"].as_float())

    @property
    def factors(self) -> list[float]:
        """Factors of the cosines and sines of each head; 0 for values, which are not rotated."""
        return [self.query_factor] * self.queries + [1.0] * self.keys + [0.0] * self.values


class _Angles:
    """Adds the nodes of one kind of rotary positions."""

    def __init__(self, editor: Editor, rope: Rope, name: str) -> None:
        self.nodes: list[ir.Node] = []
        self._editor = editor
        self._rope = rope
        self._name = name

    def of(self, positions: ir.Value, heads: _Heads) -> list[ir.Value]:
        """Return cosines and sines at positions [B, S]; see `compute_rotary_angles`."""
        axes = [2, 3] if len(heads.factors) > 1 else [2]
        column = self._op("Unsqueeze", self._op("Cast", positions, to=int(ir.DataType.FLOAT)), self._ints("axes", axes))
        angles = self._op("Mul", column, self._frequencies(positions))
        return [self._function(kind, angles, heads) for kind in ("Cos", "Sin")]

    def _function(self, kind: str, angles: ir.Value, heads: _Heads) -> ir.Value:
        width = self._rope.dim // 2
        values = self._op(kind, angles)
        if width % _WIDTH:
            bounds = (self._ints(name, [number]) for name, number in (("zero", 0), ("width", width), ("last", -1)))
            values = self._op("Slice", values, *bounds, label=f"{kind}/Slice")
        amplitude = self._rope.amplitude
        if len(heads.factors) == 1:
            amplitude *= heads.factors[0]
        if amplitude != 1:
            values = self._op(
                "Mul", values, self._editor.scalar(f"{self._name}.amplitude", amplitude), label=f"{kind}/Amplitude"
            )
        if len(heads.factors) == 1:
            return values
        factors = np.array(heads.factors, np.float32)[:, None]
        values = self._op("Mul", values, self._floats("heads", factors), label=f"{kind}/Heads")
        if kind == "Cos" and heads.values:
            ones = (factors == 0).astype(np.float32)
            values = self._op("Add", values, self._floats("values", ones), label=f"{kind}/Ones")
        return self._op("Reshape", values, self._ints("rows", [0, -1, width]), label=f"{kind}/Rows")

    def _frequencies(self, positions: ir.Value) -> ir.Value:
        """Return the frequencies, for LongRoPE those of the length: [D / 2], padded to a multiple of `_WIDTH`."""
        frequencies = self._rope.frequencies().numpy()
        padded = np.pad(frequencies, ((0, 0), (0, -frequencies.shape[1] % _WIDTH)))
        if not self._rope.long_from:
            return self._floats("frequencies", padded[0])
        bound = self._editor.constant(f"{self._name}.short", [self._rope.long_from])
        last = self._op("ReduceMax", positions, keepdims=0)
        long = self._op("Cast", self._op("GreaterOrEqual", last, bound), label="Long", to=int(ir.DataType.INT64))
        chosen = self._op("Gather", self._floats("frequencies", padded), long, axis=0)
        return self._op("Reshape", chosen, self._ints("flat", [-1]), label="Flat")

    def _op(self, kind: str, *inputs: ir.Value, label: str | None = None, **attributes: Any) -> ir.Value:
        self.nodes.append(self._editor.node(kind, [*inputs], f"/{self._name}/{label or kind}", **attributes))
        return self.nodes[-1].outputs[0]

    def _ints(self, label: str, numbers: list[int]) -> ir.Value:
        return self._editor.constant(f"{self._name}.{label}", numbers)

    def _floats(self, label: str, numbers: np.ndarray) -> ir.Value:
        return self._editor.initializer(f"{self._name}.{label}", ir.DataType.FLOAT, numbers.shape, lambda: numbers)
