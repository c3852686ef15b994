"""Tells from a graph file how each weight is stored. Knows nothing of manifests, terminals or rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llm_edge.exporter.explain.report import EMBEDDING, HEAD
from llm_edge.exporter.quantization.calibrate import Choice
from llm_edge.exporter.quantization.recipes import Blocks

_DENSE = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


def explained(graph: Path, files: int, choices: Mapping[str, Choice]) -> dict[str, Any]:
    """What the manifest says of a precision's weights: `projections` and `other`, see docs/bundle.md.

    Args:
        graph: an ONNX file; its weights are not read.
        files: bytes of graph and weights, of which `other` takes what no projection does.
        choices: of the projections that calibration rounded, by module path.
    """
    modules: dict[str, list[ir.Value]] = {}
    for name, value in ir.load(graph).graph.initializers.items():
        modules.setdefault(_module(name), []).append(value)
    projections: dict[str, dict[str, Any]] = {}
    other = {"norms": 0, "tables": 0}
    for module, values in modules.items():
        size = sum(map(_size, values))
        data = max(values, key=_size)
        if not module or len(data.shape or ()) < 2:
            other["norms" if module.endswith("norm") else "tables"] += size
            continue
        choice = choices.get(module)
        entry = {"format": _format(data, values) if choice is None else str(choice.form), "bytes": size}
        if choice is not None and math.isfinite(choice.error):
            entry["error"] = float(f"{choice.error:.4g}")
        projections[module] = entry
    other["graph"] = files - sum(entry["bytes"] for entry in projections.values()) - sum(other.values())
    return {"projections": projections, "other": other}


def _module(initializer: str) -> str:
    """Path of the module that an initializer belongs to, or nothing: `layers.0.mlp.down` of `….weight.scales`."""
    for kind in (".weight", ".bias"):
        module, found, rest = initializer.partition(kind)
        if found:  # a tied embedding that also lies transposed does so for the head
            return HEAD if module == EMBEDDING and rest.startswith(".transposed") else module
    return ""


def _size(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes


def _format(data: ir.Value, values: list[ir.Value]) -> str:
    """How a weight is stored that no calibration chose a format for."""
    assert data.dtype is not None
    if data.dtype in _DENSE:
        return _DENSE[data.dtype]
    parts = {(value.name or "").rpartition(".")[2] for value in values}
    offsets = ", offsets" if "offsets" in parts else ""
    for node in _readers(data):
        size = node.attributes.get_int("block_size", 0)
        if size:
            bits = node.attributes.get_int("bits", data.dtype.bitwidth)
            return f"{Blocks(bits, size, symmetric='zero_points' not in parts)}{offsets}"
    return data.dtype.name.lower()


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that compute with a weight, which may be reshaped or gathered first."""
    for node in value.consumers():
        if node.op_type in ("Reshape", "Gather"):
            yield from _readers(node.outputs[0])
        else:
            yield node
