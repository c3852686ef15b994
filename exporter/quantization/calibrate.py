"""Calibration: runs a text through a model layer by layer, and quantizes each projection for the inputs it gets.

The inputs of every projection are those of the unquantized model, so that one run serves all precisions. Weights are
read one layer at a time and quantized weights are stored on disk: memory holds one layer, whatever the model's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llm_edge.exporter.layerwise import decoder_without_weights
from llm_edge.exporter.quantization.formats.base import ObservedInputs, Quantized, WeightFormat
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.quantization.rotate import RotatedWeights
from llm_edge.model.config import ModelConfig
from llm_edge.runtime.errors import CheckpointError

WINDOW = 512
MAX_TOKENS = 16 * WINDOW
"""Maximum length of the calibration text; small models use a multiple of the width of their widest projection."""
_MIN_TOKENS = 4 * WINDOW
_TOKENS_PER_INPUT = 8
_SAMPLES = 1024  # inputs of a projection that are kept to fix scales and to measure errors
_UPGRADE = "+"  # suffix of a module path: quantized in the format of an upgrade


@dataclass(frozen=True, slots=True)
class CacheRange:
    """The largest absolute keys (rotated) and values in the cache of a layer, float32 [K, D]."""

    key: Tensor
    value: Tensor


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
    tokens: Sequence[int],
    folder: Path,
    progress: Callable[[float, str], None],
) -> dict[str, CalibratedWeights]:
    """Quantize the projections of a rotated model, of shape `config`, for each calibrated recipe, to an empty folder.

    `progress` is called with the completed fraction and the current projection. The result is by recipe name.
    """
    calibrated = [CalibratedWeights(recipe, folder / recipe.name) for recipe in recipes]
    for layer, observed, cache in observe(config, weights, tokens):
        for stored in calibrated:
            stored.caches.append(cache)
        for number, (name, inputs) in enumerate(observed.items()):
            progress((layer + number / len(observed)) / config.num_hidden_layers, f"layer {layer + 1}: {name}")
            _quantize_projection(f"layers.{layer}.{name}", weights, inputs, calibrated)
    for stored in calibrated:
        stored.apply_upgrades()
    return {stored.recipe.name: stored for stored in calibrated}


def _quantize_projection(
    module: str, weights: RotatedWeights, observed: ObservedInputs, calibrated: Sequence[CalibratedWeights]
) -> None:
    """Quantize a projection for each recipe; recipes that agree in its format share the result."""
    role = module.rpartition(".")[2]
    weight = weights[f"{module}.weight"]
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


@torch.inference_mode()
def observe(
    config: ModelConfig, weights: RotatedWeights, tokens: Sequence[int]
) -> Iterator[tuple[int, dict[str, ObservedInputs], CacheRange]]:
    """Run a text; yield for each layer its number, the inputs of its projections, and its cache range."""
    length = min(WINDOW, config.max_position_embeddings)
    limit = min(max(_TOKENS_PER_INPUT * config.intermediate_size, _MIN_TOKENS), MAX_TOKENS)
    count = max(min(len(tokens), limit) // length, 1)
    windows = torch.tensor(tokens[: count * length]).reshape(count, -1)
    decoder = decoder_without_weights(config)
    mask = torch.ones(1, windows.shape[1], dtype=torch.int64)
    if config.learned_positions:
        decoder.load_parameters(weights, ["embed_positions.weight"])
    states = [decoder.embed(embeddings[None], mask) for embeddings in weights.embed(windows)]  # each [1, S, hidden]
    empty = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim)
    step = max(windows.shape[1] // max(_SAMPLES // count, 1), 1)
    for number, layer in enumerate(decoder.layers):
        decoder.load_parameters(weights, [f"layers.{number}.{name}" for name, _ in layer.named_parameters()])
        hessians: dict[str, Tensor] = {}
        samples: dict[str, list[Tensor]] = {}
        ranges: list[Tensor] = []
        hooks = [
            module.register_forward_pre_hook(partial(_record, name, hessians, samples, step))
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]
        for index, state in enumerate(states):
            states[index], present = decoder.run_layer(number, state, (empty, empty), mask)
            largest = [tensor.abs().amax((0, 2)) for tensor in present]
            ranges = largest if not ranges else [torch.maximum(a, b) for a, b in zip(ranges, largest, strict=True)]
        for hook in hooks:
            hook.remove()
        layer.to_empty(device="meta")  # frees its weights
        positions = windows.numel()
        observed = {
            name: ObservedInputs(hessian.div_(positions), torch.cat(samples[name]))
            for name, hessian in hessians.items()
        }
        yield number, observed, CacheRange(*ranges)


def _record(
    name: str,
    hessians: dict[str, Tensor],
    samples: dict[str, list[Tensor]],
    step: int,
    _: nn.Module,
    arguments: tuple[Tensor],
) -> None:
    """Add the inputs [1, S, K] of a projection to its Hessian, and every `step`-th of them to its samples."""
    x = arguments[0][0]
    hessians[name] = hessians[name].addmm_(x.T, x) if name in hessians else x.T @ x
    samples.setdefault(name, []).append(x[::step].clone())
