"""Writes the precisions of a model as ONNX graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.exporter.graph.lower import apply_recipe, remove_linear
from llm_edge.exporter.graph.passes.hidden_states import undo_rotation
from llm_edge.exporter.graph.trace import GraphStyle, trace
from llm_edge.exporter.module_names import HEAD_MIX
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.calibrate import CalibratedWeights, StoredPrecision, calibrate
from llm_edge.exporter.quantization.hadamard import rotation
from llm_edge.exporter.quantization.journal import Journal
from llm_edge.exporter.quantization.recipes import RECIPES, Recipe
from llm_edge.exporter.quantization.refine import can_refine, refine
from llm_edge.exporter.quantization.rotate import RotatedWeights, rotated_config, rotates_residual
from llm_edge.exporter.texts import Texts
from llm_edge.model.config import ModelConfig
from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.open import open_graph
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.bundle import ONNX
from llm_edge.runtime.model_shape import ModelShape

_INLINE_LIMIT = 1024  # bytes; larger tensors are stored in the data file


def save_graph(graph: ir.Model, path: Path, on_save: Callable[[ir.TensorProtocol, Any], None]) -> None:
    """Write a graph and, beside it, its weights; `on_save` is called before each of them."""
    ir.save(graph, path, external_data=f"{path.name}_data", size_threshold_bytes=_INLINE_LIMIT, callback=on_save)


@dataclass(frozen=True, slots=True)
class GraphFiles:
    """The files `<stem>.onnx` and `<stem>.onnx_data` of each precision.

    Attributes:
        style: style of the graphs.
        hidden_size: width of the hidden states among the outputs; None if there are none.
        name: of the format in the manifest, and of the folder in the bundle.
    """

    style: GraphStyle
    hidden_size: int | None = None
    name = ONNX

    def file_name(self, recipe: Recipe) -> str:
        """Return the name of the file to load."""
        return f"{recipe.stem}.onnx"

    def files(self, folder: Path, recipe: Recipe) -> list[Path]:
        """Return all files written for a recipe."""
        return sorted(folder.glob(f"{recipe.stem}.onnx*"))

    def open(self, folder: Path, shape: ModelShape, recipe: Recipe) -> Session:
        """Load the files of a recipe on the CPU."""
        fused = self.style is GraphStyle.FUSED
        file = GraphFile(folder / self.file_name(recipe), shape, share_buffer=fused, hidden_size=self.hidden_size)
        return Session(open_graph(file, ExecutionOptions("cpu", spinning=False)))


@dataclass(frozen=True, slots=True)
class OnnxWriter(GraphFiles):
    """Writes the graphs of our own decoder.

    Attributes:
        refined: train 4-bit weights after rounding.
    """

    refined: bool = False
    _traced: dict[ModelConfig, ir.Model] = field(default_factory=dict, init=False, repr=False, compare=False)

    def write(
        self,
        folder: Path,
        model: Checkpoint,
        recipes: tuple[Recipe, ...],
        texts: Texts,
        progress: Progress,
        journal: Journal | None = None,
    ) -> dict[str, StoredPrecision]:
        """Write the files of each recipe to a folder, one weight at a time; `texts` are for calibration.

        The calibration is that of the journal, or of a temporary one. Returns how they are stored, by recipe name.
        """
        config, weights = model.config, model.weights
        hidden_states = self.hidden_size is not None
        rotated = rotated_config(config), RotatedWeights(config, weights)
        stored: dict[str, StoredPrecision] = {}
        with tempfile.TemporaryDirectory(dir=folder) as quantized:
            calibrated: dict[str, CalibratedWeights] = {}
            if to_calibrate := [recipe for recipe in recipes if recipe.calibrated]:
                report = partial(progress, "calibrating")
                calibrated = calibrate(*rotated, to_calibrate, texts, journal or Journal(Path(quantized)), report)
            for name in [recipe.name for recipe in recipes if self.refined and can_refine(recipe)]:
                report = partial(progress, "refining")
                refined = Path(quantized) / f"refined-{name}"
                calibrated[name] = refine(*rotated, calibrated[name], texts, refined, report)
            progress("tracing", None, f"{config.num_hidden_layers} layers, {self.style.value} graph")
            for number, recipe in enumerate(recipes):
                shape, values = rotated if recipe.calibrated else (config, weights)
                graph = self._trace(config, head_mix=shape.head_mix)
                if hidden_states and recipe.calibrated and rotates_residual(config):
                    undo_rotation(graph, rotation(config.hidden_size), lambda: weights["norm.weight"].float().numpy())
                name = recipe.name
                found = calibrated.get(name)
                formats = apply_recipe(
                    graph, values, recipe, self.style, found, tied=shape.tie_word_embeddings, config=shape
                )
                stored[name] = StoredPrecision(formats, found.frontier if found is not None else ())

                def on_save(_: ir.TensorProtocol, info: Any, number: int = number, name: str = name) -> None:
                    progress("quantizing", (number + (info.index + 1) / info.total) / len(recipes), name)

                save_graph(graph, folder / self.file_name(recipe), on_save)
        return stored

    def unquantized(self, model: Checkpoint) -> ir.Model:
        """Return the graph of fp32, whose weights are read when they are used."""
        graph = self._trace(model.config)
        apply_recipe(graph, model.weights, RECIPES["fp32"], self.style, tied=model.config.tie_word_embeddings)
        return graph

    def _trace(self, config: ModelConfig, *, head_mix: bool = False) -> ir.Model:
        """Return the graph of the model, which may be changed, or of the rotated one if that has a `head_mix`."""
        shape = rotated_config(config)
        if shape not in self._traced:
            self._traced[shape] = trace(shape, self.style, hidden_states=self.hidden_size is not None)
        graph = self._traced[shape].clone()
        if not head_mix:
            remove_linear(graph, HEAD_MIX)
        return graph
