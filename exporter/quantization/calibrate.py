"""Calibration: runs a text through a model layer by layer, and quantizes each projection for the inputs it gets.

The inputs of every projection are those of the unquantized model, so that one run serves all precisions. Weights are
read one layer at a time and quantized weights are stored on disk: memory holds one layer, whatever the model's size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm_edge.exporter.parallel import worker_threads
from llm_edge.exporter.quantization.formats.base import ObservedInputs, Quantized, WeightFormat
from llm_edge.exporter.quantization.gptq import Hessian
from llm_edge.exporter.quantization.observe import CacheRange, observe
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.quantization.rotate import RotatedWeights
from llm_edge.exporter.texts import Texts
from llm_edge.model.config import ModelConfig
from llm_edge.runtime.errors import CheckpointError

_SAMPLES = 1024  # inputs of a projection that are kept to fix scales and to measure errors
_TILE = 512  # rows and columns of a Hessian computed at once
_UPGRADE = "+"  # suffix of a module path: quantized in the format of an upgrade


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """How a weight is stored.

    Attributes:
        format: format of the weight.
        error: mean error of a projection's output per token, relative to the output; None if it was not measured.
    """

    format: WeightFormat
    error: float | None = None


Formats = Mapping[str, Mapping[str, StoredFormat]]
"""By recipe name, the formats of all projections and the embedding by module path; empty for TorchScript."""


class CalibratedWeights:
    """The quantized projections of one recipe, stored on disk.

    Attributes:
        recipe: the recipe.
        formats: by module path, for example `layers.0.mlp.down`.
        caches: value ranges of each layer's cache.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        folder.mkdir()
        self.recipe = recipe
        self._folder = folder
        self.formats: dict[str, StoredFormat] = {}
        self.caches: list[CacheRange] = []

    def add(self, module: str, stored: StoredFormat, quantized: Quantized) -> None:
        """Store a projection."""
        self.formats[module] = stored
        values = {field.name: getattr(quantized, field.name) for field in dataclasses.fields(quantized)}
        with self._path(module).open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: value for name, value in values.items() if value is not None})

    def apply_upgrades(self) -> None:
        """Use the upgraded formats for a fraction of the projections of a role, those with the largest error."""
        for role, (_, fraction) in self.recipe.upgrades.items():
            modules = [name for name in self.formats if name.rpartition(".")[2] == role]
            modules.sort(key=lambda name: self.formats[name].error or 0.0, reverse=True)
            for number, module in enumerate(modules):
                upgraded = self.formats.pop(module + _UPGRADE)
                if number < round(fraction * len(modules)):
                    self.formats[module] = upgraded
                    self._path(module + _UPGRADE).replace(self._path(module))

    def load(self, module: str) -> Quantized:
        """Load a stored projection."""
        kind = self.formats[module].format.quantized_type
        assert kind is not None
        with np.load(self._path(module)) as arrays:
            fields = {field.name: arrays.get(field.name) for field in dataclasses.fields(kind)}
        scalars = {name: value.item() for name, value in fields.items() if value is not None and not value.ndim}
        return kind(**fields | scalars)

    def _path(self, module: str) -> Path:
        return self._folder / module


def calibrate(
    config: ModelConfig,
    weights: RotatedWeights,
    recipes: Sequence[Recipe],
    texts: Texts,
    folder: Path,
    progress: Callable[[float, str], None],
) -> dict[str, CalibratedWeights]:
    """Quantize the projections of a rotated model, of shape `config`, for each calibrated recipe, to an empty folder.

    `progress` is called with the completed fraction and the current layer. The result is by recipe name.
    """
    calibrated = [CalibratedWeights(recipe, folder / recipe.name) for recipe in recipes]
    running: list[Future[None]] = []
    with worker_threads() as threads:
        for layer in observe(config, weights, [window.tokens for window in texts.calibration], threads):
            for stored in calibrated:
                stored.caches.append(layer.cache)
            observed = {name: _summarize(layer.inputs.pop(name), threads) for name in list(layer.inputs)}
            for task in running:
                task.result()
            progress(layer.number / config.num_hidden_layers, f"layer {layer.number + 1}")
            running = [
                threads.submit(
                    _quantize_projection, f"layers.{layer.number}.{name}", layer.weights[name], inputs, calibrated
                )
                for name, inputs in sorted(observed.items(), key=lambda item: -item[1].samples.shape[1])
            ]
        for task in running:
            task.result()
    for stored in calibrated:
        stored.apply_upgrades()
    return {stored.recipe.name: stored for stored in calibrated}


def _summarize(x: Tensor, threads: Executor) -> ObservedInputs:
    """Return what rounding needs of the inputs [tokens, K] of a projection."""
    return ObservedInputs(_hessian(x, threads), x[:: max(len(x) // _SAMPLES, 1)].clone())


def _quantize_projection(
    module: str, weight: Tensor, observed: ObservedInputs, calibrated: Sequence[CalibratedWeights]
) -> None:
    """Quantize a projection for each recipe; recipes that agree in its format share the result."""
    role = module.rpartition(".")[2]
    results: dict[tuple[WeightFormat, WeightFormat | None, float], tuple[StoredFormat, Quantized]] = {}
    for stored in calibrated:
        recipe = stored.recipe
        formats = {module: recipe.format_of(module)}
        if role in recipe.upgrades:
            formats[module + _UPGRADE] = recipe.upgrades[role][0]
        for key, weight_format in formats.items():
            request = (weight_format, recipe.fallback, recipe.max_error)
            if request not in results:
                try:
                    results[request] = _quantize(weight, *request, observed)
                except CheckpointError as error:
                    raise CheckpointError(f"{module}.weight: {error}") from error
            stored.add(key, *results[request])


def _quantize(
    weight: Tensor,
    weight_format: WeightFormat,
    fallback: WeightFormat | None,
    max_error: float,
    observed: ObservedInputs,
) -> tuple[StoredFormat, Quantized]:
    """Quantize a weight in a format, or in the fallback if static activations make its error too large."""
    weight_format = weight_format.for_width(weight.shape[1])
    quantized = weight_format.calibrate(weight, observed)
    error = _relative_error(quantized.apply(observed.samples), observed.samples @ weight.T)
    if weight_format.static_activations and fallback is not None and not error <= max_error:  # or error is NaN
        return _quantize(weight, fallback, None, max_error, observed)
    return StoredFormat(weight_format, error), quantized


def _relative_error(output: Tensor, expected: Tensor) -> float:
    errors = (output - expected).square().sum(-1) / expected.square().sum(-1).clamp(min=1e-20)
    return errors.mean().item()


def _hessian(x: Tensor, threads: Executor) -> Hessian:
    """Return the mean outer product of inputs [tokens, K]; tiles below the diagonal are mirrored."""
    width = x.shape[1]
    matrix = torch.empty(width, width)

    def compute(tile: tuple[slice, slice]) -> None:
        rows, columns = tile
        product = x[:, rows].T @ x[:, columns]
        matrix[rows, columns] = product.div_(len(x))
        matrix[columns, rows] = product.T

    slices = [slice(start, start + _TILE) for start in range(0, width, _TILE)]
    list(threads.map(compute, itertools.combinations_with_replacement(slices, 2)))
    return Hessian(matrix)
