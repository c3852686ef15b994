"""Writes the precisions of a general decoder as ONNX graphs; see `exporter.bundle.onnx_writer`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.bundle.onnx_writer import GraphFiles, save_graph
from llm_edge.exporter.general.checkpoint import GeneralCheckpoint
from llm_edge.exporter.general.fold import fold
from llm_edge.exporter.general.functions import UnsupportedModelError
from llm_edge.exporter.general.trace import trace_general
from llm_edge.exporter.graph.lower import apply_recipe
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.calibrate import CalibratedWeights, StoredFormat, StoredPrecision
from llm_edge.exporter.quantization.recipes import RECIPES, Recipe
from llm_edge.runtime.backend.graph_check import check_graph
from llm_edge.runtime.errors import BundleError


@dataclass(frozen=True, slots=True)
class GeneralWriter(GraphFiles):
    """Writes the graphs of one general decoder."""

    style: GraphStyle = GraphStyle.FUSED
    _traced: list[ir.Model] = field(default_factory=list, init=False, repr=False, compare=False)

    def write(
        self,
        folder: Path,
        model: GeneralCheckpoint,
        recipes: tuple[Recipe, ...],
        progress: Progress,
        calibrated: Mapping[str, CalibratedWeights] = MappingProxyType({}),
    ) -> dict[str, StoredPrecision]:
        """Write the files of each recipe to a folder, one weight at a time; return how they are stored.

        Weights that `calibrated` does not hold, by recipe name, are rounded to nearest.
        """
        progress("tracing", None, f"{len(model.config.decoder.caches)} layers")
        stored = {}
        for number, recipe in enumerate(recipes):
            graph, formats = self._lowered(model, recipe, calibrated.get(recipe.name))
            stored[recipe.name] = StoredPrecision(formats)

            def on_save(_: ir.TensorProtocol, info: Any, number: int = number, name: str = recipe.name) -> None:
                progress("quantizing", (number + (info.index + 1) / info.total) / len(recipes), name)

            save_graph(graph, folder / self.file_name(recipe), on_save)
            with model.config.refusing():
                _check(folder / self.file_name(recipe))
        return stored

    def unquantized(self, model: GeneralCheckpoint) -> ir.Model:
        """Return the graph of fp32, whose weights are read when they are used."""
        return self._lowered(model, RECIPES["fp32"], None)[0]

    def _lowered(
        self, model: GeneralCheckpoint, recipe: Recipe, calibrated: CalibratedWeights | None
    ) -> tuple[ir.Model, dict[str, StoredFormat]]:
        """Return the graph of a recipe, and the formats of its weights."""
        architecture = model.config
        if not self._traced:
            with architecture.refusing(), architecture.fake_mode:
                self._traced.append(trace_general(architecture.decoder))
        graph = self._traced[0].clone()
        tied = architecture.tie_word_embeddings
        formats = apply_recipe(graph, PublicWeights(model), recipe, self.style, calibrated, tied=tied)
        fold(graph)
        return graph, formats


def _check(path: Path) -> None:
    """Raise UnsupportedModelError for a graph that the runtime would reject."""
    try:
        check_graph(path)
    except BundleError as error:
        raise UnsupportedModelError(f"its graph has what the runtime rejects: {error.__cause__ or error}") from error


class PublicWeights(Mapping[str, Tensor]):
    """The weights and buffers of a model by the names that its graph has for them, read one at a time."""

    def __init__(self, model: GeneralCheckpoint) -> None:
        public = model.config.decoder.public_name
        self._weights = model.weights
        self._names = {public(f"model.{name}"): name for name in model.weights}
        self._buffers = {name: buffer for name, buffer in model.config.buffers().items() if name not in self._names}

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name] if name in self._buffers else self._weights[self._names[name]]

    def __contains__(self, name: object) -> bool:  # the inherited method would read the weight
        return name in self._names or name in self._buffers

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self._buffers

    def __len__(self) -> int:
        return len(self._names) + len(self._buffers)
