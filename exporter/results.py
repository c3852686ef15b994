"""Results of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_edge.checkpoint.base import Source
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.quantization.calibrate import StoredFormat
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.validation.parity import Validation


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """An exported precision: `size` in bytes of model and weights, and the formats of its weights, see `Formats`."""

    recipe: Recipe
    size: int
    formats: Mapping[str, StoredFormat]


@dataclass(frozen=True, slots=True)
class Report:
    """Result of an export.

    Attributes:
        parameters: number of weights.
        style: style of the graphs; None for TorchScript.
        layers: number of layers of the model.
        validation: comparison with the reference; None without validation.
        notes: what the checkpoint's reader overruled or ignored, one sentence each.
    """

    path: Path
    source: Source
    parameters: int
    style: GraphStyle | None
    precisions: tuple[PrecisionReport, ...]
    layers: int
    validation: Validation | None
    notes: tuple[str, ...] = ()
