"""Results of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_edge.checkpoint.base import Source
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.quantization.calibrate import StoredFormat
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.validation.compare import Parity, Quality


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """An exported precision.

    Attributes:
        recipe: recipe of the precision.
        size: bytes of model and weights.
        parity: differences from the reference; None without validation.
        quality: measured quality; None without validation.
        formats: formats of all projections and the embedding by module path; empty for TorchScript.
    """

    recipe: Recipe
    size: int
    parity: Parity | None
    quality: Quality | None
    formats: Mapping[str, StoredFormat]


@dataclass(frozen=True, slots=True)
class Report:
    """Result of an export.

    Attributes:
        path: bundle folder.
        source: description of the source.
        parameters: number of weights.
        style: style of the graphs; None for TorchScript.
        precisions: exported precisions.
        layers: number of layers of the model.
        validated_layers: number of layers that were compared with PyTorch; 0 without validation.
        validation_bytes: approximate memory required to compare all layers; 0 without validation.
        auxiliary_parities: differences of models that were exported only for validation, by name.
    """

    path: Path
    source: Source
    parameters: int
    style: GraphStyle | None
    precisions: tuple[PrecisionReport, ...]
    layers: int
    validated_layers: int
    validation_bytes: float
    auxiliary_parities: Mapping[str, Parity]
