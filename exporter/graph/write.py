"""Writes the graph of every precision of a model. Knows nothing of checkpoints' formats or of bundles."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.graph.lower import apply_recipe
from llm_edge.exporter.graph.passes.hidden_states import undo_rotation
from llm_edge.exporter.graph.trace import GraphStyle, trace
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.calibrate import Rounding, calibrate
from llm_edge.exporter.quantization.hadamard import rotation
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.quantization.rotate import RotatedWeights, rotated_config, turns_residual
from llm_edge.model.config import ModelConfig

_INLINE_LIMIT = 1024  # bytes; larger tensors go to the data file


def write_graphs(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    recipes: tuple[Recipe, ...],
    style: GraphStyle,
    text: Sequence[int],
    progress: Progress,
    *,
    hidden_states: bool = False,
) -> dict[str, Rounding]:
    """Write `<stem>.onnx` and `<stem>.onnx_data` for each recipe; weights are read, rounded and written one by one.

    Args:
        folder: where they go.
        config: the shape of the model.
        weights: of the model.
        recipes: the precisions.
        style: of the graphs.
        text: tokens of the calibration text.
        progress: see `Progress`.
        hidden_states: the graphs have them as an output; see `offer_hidden_states`.

    Returns:
        what calibration found, by name of the recipe.
    """
    calibrated = [recipe for recipe in recipes if recipe.calibrated]
    turned = rotated_config(config), RotatedWeights(config, weights)
    roundings: dict[str, Rounding] = {}
    with tempfile.TemporaryDirectory(dir=folder) as rounded:
        if calibrated:
            roundings = calibrate(
                *turned, calibrated, text, Path(rounded), lambda share, what: progress("calibrating", share, what)
            )
        traces: dict[ModelConfig, ir.Model] = {}
        for shape in dict.fromkeys(turned[0] if recipe.calibrated else config for recipe in recipes):
            progress("tracing", None, f"{config.num_hidden_layers} layers, {style.value} graph")
            traces[shape] = trace(shape, style, hidden_states=hidden_states)
        for number, recipe in enumerate(recipes):
            shape, numbers = turned if recipe.calibrated else (config, weights)
            model = traces[shape].clone()
            if hidden_states and recipe.calibrated and turns_residual(config):
                undo_rotation(model, rotation(config.hidden_size), lambda: weights["norm.weight"].float().numpy())
            apply_recipe(model, shape, numbers, recipe, style, roundings.get(recipe.name))

            def saved(_: ir.TensorProtocol, info: Any, number: int = number, recipe: Recipe = recipe) -> None:
                progress("quantizing", (number + (info.index + 1) / info.total) / len(recipes), recipe.name)

            ir.save(
                model,
                folder / f"{recipe.stem}.onnx",
                external_data=f"{recipe.stem}.onnx_data",
                size_threshold_bytes=_INLINE_LIMIT,
                callback=saved,
            )
    return roundings


def graph_files(folder: Path, recipe: Recipe) -> list[Path]:
    """What `write_graphs` wrote for a recipe."""
    return sorted(folder.glob(f"{recipe.stem}.onnx*"))
