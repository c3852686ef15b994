"""Writes the manifest of a bundle."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.exporter.bundle.side_files import runtimes, write_json
from llm_edge.exporter.bundle.writer import BundleWriter
from llm_edge.exporter.explain.graph import describe_weights
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.formats.dense import Dense
from llm_edge.exporter.results import PrecisionReport, Report
from llm_edge.exporter.validation.parity import model_shape
from llm_edge.runtime.bundle import FORMAT_VERSION, MANIFEST, ONNX, ReasoningTags, manifest_entry

_TOOLS = ("llm-edge", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def write_manifest(
    folder: Path, checkpoint: Checkpoint, report: Report, writer: BundleWriter, progress: Progress
) -> None:
    """Write the manifest, after all other files. It has no times and no paths, so that exports are reproducible."""
    files = {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for number, name in enumerate(names):
        progress("writing", number / len(names), name)
        files[name] = manifest_entry(folder / name)
    reasoning_key = "reasoning_tags" if isinstance(checkpoint.reasoning, ReasoningTags) else "reasoning"
    chat = {
        key: asdict(value)
        for key, value in ((reasoning_key, checkpoint.reasoning), ("guards", checkpoint.guards))
        if value is not None
    }
    validation = report.validation
    auxiliary = validation.auxiliary_parities if validation else {}
    write_json(
        folder / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "name": checkpoint.source.name,
            "model": {**asdict(model_shape(checkpoint.config)), "parameters": report.parameters},
            "graph": writer.name if report.style is None else report.style.value,
            **chat,
            "source": asdict(checkpoint.source),
            "tools": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _TOOLS},
            },
            "precisions": {
                precision.recipe.name: _precision_entry(folder, precision, report, writer)
                for precision in report.precisions
            },
            "validation": {"layers": validation.layers if validation else 0, "of": report.layers},
            "proof": {name: parity.to_dict() for name, parity in auxiliary.items()},
            "files": files,
        },
    )


def _precision_entry(folder: Path, precision: PrecisionReport, report: Report, writer: BundleWriter) -> dict[str, Any]:
    recipe = precision.recipe
    model = f"{writer.name}/{writer.file_name(recipe)}"
    entry: dict[str, Any] = {} if writer.name == ONNX else {"format": writer.name}
    entry |= {"model": model, "recipe": str(recipe), "share_buffer": report.style is GraphStyle.FUSED}
    if writer.hidden_size is not None:
        entry["hidden_size"] = writer.hidden_size
    validation = report.validation
    entry["parity"] = validation.parities[recipe.name].to_dict() if validation else {}
    entry["quality"] = asdict(validation.qualities[recipe.name]) if validation else {}
    if writer.name == ONNX:
        entry["runtimes"] = runtimes(recipe)
        default = Dense(16 if recipe.float16 else 32)
        entry |= describe_weights(folder / model, precision.size, precision.formats, default)
    return entry
