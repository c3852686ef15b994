"""Reads the sizes of the weights in a graph file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llm_edge.exporter.module_names import EMBEDDING, HEAD
from llm_edge.exporter.quantization.calibrate import StoredFormat
from llm_edge.exporter.quantization.formats.dense import Dense


def describe_weights(
    graph: Path, total_size: int, stored: Mapping[str, StoredFormat], default: Dense
) -> dict[str, Any]:
    """Return the manifest entries `projections` and `other` of a precision; see docs/bundle.md.

    Args:
        graph: ONNX file; its weights are not read.
        total_size: bytes of graph and weights. `other.graph` is what no initializer accounts for.
        stored: formats of the projections and the embedding by module path.
        default: format of the matrices that `stored` does not list.
    """
    modules: dict[str, list[ir.Value]] = {}
    for name, value in ir.load(graph).graph.initializers.items():
        modules.setdefault(_module_of(name), []).append(value)
    projections: dict[str, dict[str, Any]] = {}
    other = {"norms": 0, "tables": 0}
    for module, values in modules.items():
        size = sum(map(_size, values))
        largest = max(values, key=_size)
        if not module or len(largest.shape or ()) < 2:
            other["norms" if module.endswith("norm") else "tables"] += size
            continue
        found = stored.get(module, StoredFormat(default))
        projections[module] = {"format": found.format.to_dict(), "bytes": size}
        if found.error is not None and math.isfinite(found.error):
            projections[module]["error"] = float(f"{found.error:.4g}")
    other["graph"] = total_size - sum(entry["bytes"] for entry in projections.values()) - sum(other.values())
    return {"projections": projections, "other": other}


def _module_of(initializer: str) -> str:
    """Return the module path of an initializer such as `layers.0.mlp.down.weight.scales`; empty if it has none."""
    for kind in (".weight", ".bias"):
        module, separator, rest = initializer.partition(kind)
        if separator:  # the transposed copy of a tied embedding belongs to the head
            return HEAD if module == EMBEDDING and rest.startswith(".transposed") else module
    return ""


def _size(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes
