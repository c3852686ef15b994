"""Writes the ONNX graphs of all precisions of a model."""

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
from llm_edge.exporter.quantization.calibrate import CalibratedWeights, StoredFormat, calibrate
from llm_edge.exporter.quantization.hadamard import rotation
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.quantization.rotate import RotatedWeights, rotated_config, rotates_residual
from llm_edge.model.config import ModelConfig

_INLINE_LIMIT = 1024  # bytes; larger tensors are stored in the data file


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
) -> dict[str, Mapping[str, StoredFormat]]:
    """Write `<stem>.onnx` and `<stem>.onnx_data` for each recipe; weights are processed one at a time.

    Args:
        folder: output folder.
        config: shape of the model.
        weights: weights of the model.
        recipes: the precisions.
        style: style of the graphs.
        text: tokens of the calibration text.
        progress: see `Progress`.
        hidden_states: add hidden states to the outputs; see `add_hidden_states`.

    Returns:
        by recipe name, the formats of all projections and the embedding by module path.
    """
    rotated = rotated_config(config), RotatedWeights(config, weights)
    stored: dict[str, Mapping[str, StoredFormat]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as quantized:
        calibrated: dict[str, CalibratedWeights] = {}
        if to_calibrate := [recipe for recipe in recipes if recipe.calibrated]:
            calibrated = calibrate(
                *rotated, to_calibrate, text, Path(quantized), lambda done, item: progress("calibrating", done, item)
            )
        traces: dict[ModelConfig, ir.Model] = {}
        for shape in dict.fromkeys(rotated[0] if recipe.calibrated else config for recipe in recipes):
            progress("tracing", None, f"{config.num_hidden_layers} layers, {style.value} graph")
            traces[shape] = trace(shape, style, hidden_states=hidden_states)
        for number, recipe in enumerate(recipes):
            recipe_config, recipe_weights = rotated if recipe.calibrated else (config, weights)
            model = traces[recipe_config].clone()
            if hidden_states and recipe.calibrated and rotates_residual(config):
                undo_rotation(model, rotation(config.hidden_size), lambda: weights["norm.weight"].float().numpy())
            stored[recipe.name] = apply_recipe(
                model, recipe_config, recipe_weights, recipe, style, calibrated.get(recipe.name)
            )

            def on_save(_: ir.TensorProtocol, info: Any, number: int = number, recipe: Recipe = recipe) -> None:
                progress("quantizing", (number + (info.index + 1) / info.total) / len(recipes), recipe.name)

            ir.save(
                model,
                folder / f"{recipe.stem}.onnx",
                external_data=f"{recipe.stem}.onnx_data",
                size_threshold_bytes=_INLINE_LIMIT,
                callback=on_save,
            )
    return stored


def graph_files(folder: Path, recipe: Recipe) -> list[Path]:
    """Return the files that `write_graphs` wrote for a recipe."""
    return sorted(folder.glob(f"{recipe.stem}.onnx*"))
