"""Writes the manifest of a bundle."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llm_edge.checkpoint.base import AnyCheckpoint
from llm_edge.checkpoint.huggingface.writer import write_json
from llm_edge.exporter.bundle.other_runtimes import other_runtimes
from llm_edge.exporter.bundle.side_files import runtimes
from llm_edge.exporter.bundle.writer import AnyWriter
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.module_names import EMBEDDING, HEAD
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.calibrate import StoredFormat
from llm_edge.exporter.quantization.formats.dense import Dense
from llm_edge.exporter.results import PrecisionReport, Report
from llm_edge.runtime.bundle import FORMAT_VERSION, MANIFEST, ONNX, ReasoningTags, manifest_entry
from llm_edge.runtime.errors import TemplateError
from llm_edge.runtime.model_shape import ModelShape
from llm_edge.runtime.text.chat_template import ChatTemplate
from llm_edge.runtime.text.tool_format_finder import tool_format_of

_NOT_VALIDATED = {"compared": False, "reason": "--no-validate"}
_TOOLS = ("llm-edge", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def write_manifest(
    folder: Path,
    checkpoint: AnyCheckpoint,
    shape: ModelShape,
    report: Report,
    writer: AnyWriter,
    progress: Progress,
) -> None:
    """Write the manifest, after all other files. It has no times and no paths, so that exports are reproducible."""
    files = {}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for number, name in enumerate(names):
        progress("writing", number / len(names), name)
        files[name] = manifest_entry(folder / name)
    reasoning_key = "reasoning_tags" if isinstance(checkpoint.reasoning, ReasoningTags) else "reasoning"
    chat = {
        key: asdict(value)
        for key, value in ((reasoning_key, checkpoint.reasoning), ("guards", checkpoint.guards))
        if value is not None
    }
    known = other_runtimes(checkpoint.hf_config["model_type"], shape)
    validation = report.validation
    auxiliary = validation.auxiliary_parities if validation else {}
    write_json(
        folder / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "name": checkpoint.source.name,
            "model": {**describe_shape(shape), "parameters": report.parameters},
            "graph": writer.name if report.style is None else report.style.value,
            **chat,
            **_tool_calls(checkpoint),
            "source": asdict(checkpoint.source),
            "tools": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _TOOLS},
            },
            "precisions": {
                precision.recipe.name: _precision_entry(folder, known, precision, report, writer)
                for precision in report.precisions
            },
            "validation": {"layers": report.layers if validation else 0, "of": report.layers},
            "independent_check": validation.independent.to_dict() if validation else _NOT_VALIDATED,
            "notes": list(report.notes),
            "proof": {name: parity.to_dict() for name, parity in auxiliary.items()},
            "files": files,
        },
    )


def describe_shape(shape: ModelShape) -> dict[str, Any]:
    """Return the dimensions of a model as stored in the manifest; see docs/bundle.md."""
    described = asdict(shape)
    del described["caches"]
    if not shape.windows:
        del described["windows"]
    if (cache := shape.uniform_cache) is not None:
        heads, width = cache
        context = described.pop("max_position_embeddings")
        return described | {"num_key_value_heads": heads, "head_dim": width, "max_position_embeddings": context}
    return described | {"caches": [asdict(tensor) for tensor in shape.caches]}


def _tool_calls(checkpoint: AnyCheckpoint) -> dict[str, Any]:
    """How the chat template writes calls of tools; empty if it writes none."""
    tokenizer = checkpoint.tokenizer
    template = tokenizer.named_templates.get("tool_use", tokenizer.chat_template)
    if template is None:
        return {}
    named = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    try:
        found = tool_format_of(ChatTemplate(template, named).render)
    except TemplateError:  # reported when the bundle is loaded
        return {}
    return {"tool_calls": found.to_json()} if found is not None else {}


def _precision_entry(
    folder: Path, known: Sequence[str], precision: PrecisionReport, report: Report, writer: AnyWriter
) -> dict[str, Any]:
    recipe = precision.recipe
    model = f"{writer.name}/{writer.file_name(recipe)}"
    entry: dict[str, Any] = {} if writer.name == ONNX else {"format": writer.name}
    entry |= {"model": model, "recipe": str(recipe), "share_buffer": report.style is GraphStyle.FUSED}
    if writer.hidden_size is not None:
        entry["hidden_size"] = writer.hidden_size
    validation = report.validation
    entry["parity"] = validation.parities[recipe.name].to_dict() if validation else {}
    entry["quality"] = validation.qualities[recipe.name].to_dict() if validation else {}
    if writer.name == ONNX:
        entry["runtimes"] = runtimes(recipe, known)
        default = Dense(16 if recipe.float16 else 32)
        entry |= _describe_weights(folder / model, precision.size, precision.stored.formats, default)
        if precision.stored.frontier:
            points = precision.stored.frontier
            entry["frontier"] = [{"bytes": size, "divergence": _rounded(divergence)} for size, divergence in points]
    return entry


def _describe_weights(
    graph: Path, total_size: int, stored: Mapping[str, StoredFormat], default: Dense
) -> dict[str, Any]:
    """Return the manifest entries `projections` and `other` of a precision; see docs/bundle.md.

    Matrices that `stored` does not list have the format `default`. `total_size` is that of graph and weights:
    `other.graph` is what no initializer accounts for.
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
        for key, number in (("error", found.error), ("divergence", found.divergence)):
            if number is not None and math.isfinite(number):
                projections[module][key] = _rounded(number)
    other["graph"] = total_size - sum(entry["bytes"] for entry in projections.values()) - sum(other.values())
    return {"projections": projections, "other": other}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


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
