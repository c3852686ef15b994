"""`QuantizedStore`: quantized weights on disk, each in several formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import numpy as np

from llm_edge.exporter.quantization.formats.base import Quantized, WeightFormat

Stored = tuple[str, WeightFormat]
"""Module path and format."""


class QuantizedStore:
    """Quantized weights by module path, for example `layers.0.mlp.down`, and format, in a folder of their own.

    Attributes:
        shapes: [N, K] of the stored weights by module path.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._bytes: dict[Stored, int] = {}
        self.shapes: dict[str, tuple[int, int]] = {}

    def add(self, module: str, weight_format: WeightFormat, shape: tuple[int, int], quantized: Quantized) -> None:
        """Store a weight of a shape [N, K]."""
        self.shapes[module] = shape
        values = {field.name: getattr(quantized, field.name) for field in dataclasses.fields(quantized)}
        arrays = {name: value for name, value in values.items() if value is not None}
        self._bytes[module, weight_format] = sum(np.asarray(value).nbytes for value in arrays.values())
        with self.path(module, weight_format).open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def restore(self, module: str, weight_format: WeightFormat, shape: tuple[int, int], size: int) -> None:
        """Add a weight of a size in bytes that an earlier process stored in the same folder."""
        self.shapes[module] = shape
        self._bytes[module, weight_format] = size

    def load(self, module: str, weight_format: WeightFormat) -> Quantized:
        """Load a weight."""
        kind = weight_format.quantized_type
        assert kind is not None
        with np.load(self.path(module, weight_format)) as arrays:
            fields = {field.name: arrays.get(field.name) for field in dataclasses.fields(kind)}
        scalars = {name: value.item() for name, value in fields.items() if value is not None and not value.ndim}
        return kind(**fields | scalars)

    def formats(self, module: str) -> list[WeightFormat]:
        """Return the formats in which a weight is stored."""
        return [weight_format for name, weight_format in self._bytes if name == module]

    def bytes(self, module: str, weight_format: WeightFormat) -> int:
        """Return the size of a weight."""
        return self._bytes[module, weight_format]

    def keep(self, chosen: Collection[Stored]) -> None:
        """Delete all other weights."""
        for stored in self._bytes.keys() - set(chosen):
            del self._bytes[stored]
            self.path(*stored).unlink(missing_ok=True)  # a resumed export may have deleted it before

    def path(self, module: str, weight_format: WeightFormat) -> Path:
        """Return the file of a weight."""
        return self._folder / f"{module}.{weight_format.label.replace('/', '_')}"


class OverlayStore(QuantizedStore):
    """Weights that replace some of those of another store."""

    def __init__(self, folder: Path, base: QuantizedStore) -> None:
        super().__init__(folder)
        self._base = base

    def load(self, module: str, weight_format: WeightFormat) -> Quantized:
        """Load a weight."""
        own = (module, weight_format) in self._bytes
        return super().load(module, weight_format) if own else self._base.load(module, weight_format)
