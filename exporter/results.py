"""Results of an export."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_edge.checkpoint.base import Source
from llm_edge.exporter.bundle.writer import AnyWriter
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.quantization.calibrate import StoredPrecision
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.validation.parity import Validation


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """An exported precision: `size` in bytes of model and weights, and how its weights are `stored`."""

    recipe: Recipe
    size: int
    stored: StoredPrecision


def precision_reports(
    folder: Path, writer: AnyWriter, recipes: Sequence[Recipe], stored: Mapping[str, StoredPrecision]
) -> tuple[PrecisionReport, ...]:
    """Return the precisions that a writer has written to a folder."""
    return tuple(
        PrecisionReport(
            recipe,
            size=sum(path.stat().st_size for path in writer.files(folder, recipe)),
            stored=stored.get(recipe.name, StoredPrecision()),
        )
        for recipe in recipes
    )


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

    def to_json(self) -> dict[str, Any]:
        """The sizes, and how far each precision is from PyTorch; `validated_layers` is 0 without validation."""
        validation = self.validation
        return {
            "source": self.source.name,
            "format": self.source.format,
            "parameters": self.parameters,
            "layers": self.layers,
            "validated_layers": self.layers if validation is not None else 0,
            "precisions": [_precision_json(each, validation) for each in self.precisions],
        }


def _precision_json(precision: PrecisionReport, validation: Validation | None) -> dict[str, Any]:
    name = precision.recipe.name
    found: dict[str, Any] = {"name": name, "size": precision.size}
    if validation is None:
        return found
    quality = validation.qualities[name]
    measured = {
        "max_difference": validation.parities[name].worst.max,
        "kl_mean": quality.kl_mean,
        "kl_p999": quality.kl_p999,
        "top1": quality.top1,
        "perplexity": quality.perplexity,
        **{f"kl_mean_{kind}": value for kind, value in quality.kl_by_kind.items()},
    }
    return {**found, **{key: value if math.isfinite(value) else None for key, value in measured.items()}}
