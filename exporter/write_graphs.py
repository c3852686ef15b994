"""Writes the graph of every precision of a model. Knows nothing of checkpoints' formats or of bundles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.config import ModelConfig
from llm_edge.exporter.graph import GraphStyle, trace
from llm_edge.exporter.lower import apply_recipe
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.recipes import Recipe

_INLINE_LIMIT = 1024  # bytes; larger tensors go to the data file


def write_graphs(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    recipes: tuple[Recipe, ...],
    style: GraphStyle,
    progress: Progress,
) -> None:
    """Write `<stem>.onnx` and `<stem>.onnx_data` for each recipe; weights are read, rounded and written one by one."""
    progress("tracing", None, f"{config.num_hidden_layers} layers, {style.value} graph")
    traced = trace(config, style)
    for number, recipe in enumerate(recipes):
        model = traced.clone()
        apply_recipe(model, config, weights, recipe, style)

        def saved(_: ir.TensorProtocol, info: Any, number: int = number, recipe: Recipe = recipe) -> None:
            progress("quantizing", (number + (info.index + 1) / info.total) / len(recipes), recipe.name)

        ir.save(
            model,
            folder / f"{recipe.stem}.onnx",
            external_data=f"{recipe.stem}.onnx_data",
            size_threshold_bytes=_INLINE_LIMIT,
            callback=saved,
        )


def graph_files(folder: Path, recipe: Recipe) -> list[Path]:
    """What `write_graphs` wrote for a recipe."""
    return sorted(folder.glob(f"{recipe.stem}.onnx*"))
