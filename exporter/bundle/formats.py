"""The formats in which a bundle can hold its precisions: how they are written, and opened to be proven.

Knows nothing of checkpoints or of proofs. `torchscript.py` holds the other one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.graph.write import graph_files, write_graphs
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.calibrate import Rounding
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.validation.compare import Runnable
from llm_edge.model.config import ModelConfig
from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.open import open_graph
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.bundle import ONNX, ModelShape


class Form(Protocol):
    """The format in which a bundle holds its precisions: `OnnxForm`, or `TorchScriptForm` of `torchscript.py`."""

    @property
    def name(self) -> str:
        """As the manifest says it, and name of the folder in the bundle."""

    @property
    def hidden_size(self) -> int | None:
        """Width of the hidden states that the files offer beside the logits; None where they offer none."""

    def write(
        self,
        folder: Path,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        recipes: tuple[Recipe, ...],
        text: Sequence[int],
        progress: Progress,
    ) -> dict[str, Rounding]:
        """Write the files of each recipe; `text` is for calibration, whose findings come back by name of the recipe."""

    def file(self, recipe: Recipe) -> str:
        """Name of the file to load."""

    def files(self, folder: Path, recipe: Recipe) -> list[Path]:
        """All that was written for a recipe."""

    def open(self, folder: Path, shape: ModelShape, recipe: Recipe) -> Runnable:
        """What was written, at work on the CPU."""


@dataclass(frozen=True, slots=True)
class OnnxForm:
    """Precisions as ONNX graphs of a style; see `Form`."""

    style: GraphStyle
    hidden_size: int | None = None
    name = ONNX

    def write(
        self,
        folder: Path,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        recipes: tuple[Recipe, ...],
        text: Sequence[int],
        progress: Progress,
    ) -> dict[str, Rounding]:
        """See `write_graphs`."""
        hidden_states = self.hidden_size is not None
        return write_graphs(folder, config, weights, recipes, self.style, text, progress, hidden_states=hidden_states)

    def file(self, recipe: Recipe) -> str:
        """Name of the graph; its weights lie beside it."""
        return f"{recipe.stem}.onnx"

    def files(self, folder: Path, recipe: Recipe) -> list[Path]:
        """Graph and weights."""
        return graph_files(folder, recipe)

    def open(self, folder: Path, shape: ModelShape, recipe: Recipe) -> Session:
        """The graph at work on the CPU."""
        fused = self.style is GraphStyle.FUSED
        file = GraphFile(folder / self.file(recipe), shape, share_buffer=fused, hidden_size=self.hidden_size)
        return Session(open_graph(file, ExecutionOptions("cpu", spinning=False)))
