"""`BundleWriter`: writes the precisions of a bundle in a file format, and opens them for validation."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeAlias

from llm_edge.exporter.bundle.onnx_writer import OnnxWriter
from llm_edge.exporter.bundle.torchscript_writer import TorchScriptWriter
from llm_edge.exporter.quantization.recipes import Recipe

BundleWriter: TypeAlias = OnnxWriter | TorchScriptWriter


class AnyWriter(Protocol):
    """What the manifest needs to know of the writer of a bundle; see `OnnxWriter`."""

    @property
    def name(self) -> str:
        """Name of the format in the manifest, and of the folder in the bundle."""

    @property
    def hidden_size(self) -> int | None:
        """Width of the hidden states among the outputs; None if there are none."""

    def file_name(self, recipe: Recipe) -> str:
        """Return the name of the file to load."""

    def files(self, folder: Path, recipe: Recipe) -> list[Path]:
        """Return all files written for a recipe."""
