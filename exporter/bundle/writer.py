"""`BundleWriter`: writes the precisions of a bundle in a file format, and opens them for validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.calibrate import StoredFormat
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.validation.compare import Runnable
from llm_edge.runtime.bundle import ModelShape

Formats = Mapping[str, Mapping[str, StoredFormat]]
"""By recipe name, the formats of all projections and the embedding by module path; empty for TorchScript."""


class BundleWriter(Protocol):
    """Writer of a file format: `OnnxWriter` or `TorchScriptWriter`."""

    @property
    def name(self) -> str:
        """Name of the format in the manifest, and of the folder in the bundle."""

    @property
    def style(self) -> GraphStyle | None:
        """Style of the graphs; None for TorchScript."""

    @property
    def hidden_size(self) -> int | None:
        """Width of the hidden states among the outputs; None if there are none."""

    def write(
        self, folder: Path, model: Checkpoint, recipes: tuple[Recipe, ...], text: Sequence[int], progress: Progress
    ) -> Formats:
        """Write the files of each recipe to a folder, one weight at a time; `text` is the tokens for calibration."""

    def file_name(self, recipe: Recipe) -> str:
        """Return the name of the file to load."""

    def files(self, folder: Path, recipe: Recipe) -> list[Path]:
        """Return all files written for a recipe."""

    def open(self, folder: Path, shape: ModelShape, recipe: Recipe) -> Runnable:
        """Load the files of a recipe on the CPU."""
