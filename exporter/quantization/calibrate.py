"""Runs a text through a model, layer by layer, and rounds each projection so that its output suffers least.

The inputs of every projection are those of the unrounded model, so one run serves all precisions. Weights are read a
layer at a time and what was rounded waits on disk: memory holds one layer, whatever the size of the model. Knows
nothing of checkpoints' formats or of graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llm_edge.exporter.quantization.activations import QuantizedInteger, product, quantize_integer
from llm_edge.exporter.quantization.blocks import QuantizedBlocks, quantize_blocks
from llm_edge.exporter.quantization.recipes import Blocks, Format, Integer, Recipe
from llm_edge.exporter.quantization.rotate import RotatedWeights
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Layer, rotary_tables
from llm_edge.runtime.errors import CheckpointError

WINDOW = 512
TOKENS = 16 * WINDOW
"""Of the text are run at most; of small models, a few times as many as their widest projection has inputs."""
_FEWEST = 4 * WINDOW
_BETTER = "+"  # behind a module's path: rounded in the format of an upgrade
_TOKENS_PER_INPUT = 8
_ROWS = 1024  # of a projection's inputs that are kept to fix scales and measure errors

Quantized = QuantizedBlocks | QuantizedInteger


@dataclass(frozen=True, slots=True)
class Observed:
    """What a projection was given.

    Attributes:
        hessian: float32 [K, K], mean outer product of the inputs.
        inputs: float32 [rows, K], some of them.
    """

    hessian: Tensor
    inputs: Tensor


@dataclass(frozen=True, slots=True)
class CacheRange:
    """The largest absolute keys (rotated) and values that a layer put into its cache, float32 [K, D]."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """How a projection came out: its format, and its error relative to the output, token by token on average."""

    form: Format
    error: float


class Rounding:
    """The rounded projections of one recipe, on disk.

    Attributes:
        choices: by module path, for example `layers.0.mlp.down`.
        caches: of each layer.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.choices: dict[str, Choice] = {}
        self.caches: list[CacheRange] = []

    def add(self, module: str, choice: Choice, quantized: Quantized) -> None:
        """Keep a projection."""
        self.choices[module] = choice
        fields = {field.name: getattr(quantized, field.name) for field in dataclasses.fields(quantized)}
        with self._path(module).open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: value for name, value in fields.items() if value is not None})

    def upgrade(self, role: str, share: float) -> None:
        """Take the better format for a share of the projections of a role, those that err most without."""
        modules = [name for name in self.choices if name.rpartition(".")[2] == role]
        modules.sort(key=lambda name: self.choices[name].error, reverse=True)
        for number, module in enumerate(modules):
            better = self.choices.pop(module + _BETTER)
            if number < round(share * len(modules)):
                self.choices[module] = better
                self._path(module + _BETTER).replace(self._path(module))

    def load(self, module: str) -> Quantized:
        """A projection that was kept."""
        kind = QuantizedInteger if isinstance(self.choices[module].form, Integer) else QuantizedBlocks
        with np.load(self._path(module)) as found:
            fields = {field.name: found.get(field.name) for field in dataclasses.fields(kind)}
        return kind(
            **{name: value.item() if value is not None and not value.ndim else value for name, value in fields.items()}
        )

    def _path(self, module: str) -> Path:
        return self._folder / module


def calibrate(
    config: ModelConfig,
    weights: RotatedWeights,
    recipes: Sequence[Recipe],
    tokens: Sequence[int],
    folder: Path,
    progress: Callable[[float, str], None],
) -> dict[str, Rounding]:
    """Round the projections of all layers for each recipe.

    Args:
        config: of the rotated model.
        weights: of the rotated model.
        recipes: those that are calibrated.
        tokens: the calibration text.
        folder: an empty folder for what is rounded.
        progress: is told the share that is done, and of what.

    Returns:
        by name of the recipe.
    """
    roundings = {}
    for recipe in recipes:
        (folder / recipe.name).mkdir()
        roundings[recipe.name] = Rounding(folder / recipe.name)
    for layer, observed, cache in observe(config, weights, tokens):
        for rounding in roundings.values():
            rounding.caches.append(cache)
        for part, (name, found) in enumerate(observed.items()):
            progress((layer + part / len(observed)) / config.num_hidden_layers, f"layer {layer + 1}: {name}")
            module = f"layers.{layer}.{name}"
            weight = weights[f"{module}.weight"]
            made: dict[tuple[Format, Format | None, float], tuple[Choice, Quantized]] = {}
            for recipe in recipes:
                wishes = {module: recipe.format_of(module)}
                if name.rpartition(".")[2] in recipe.upgrades:
                    wishes[module + _BETTER] = recipe.upgrades[name.rpartition(".")[2]][0]
                for key, form in wishes.items():
                    wish = (form, recipe.fallback, recipe.limit)
                    if wish not in made:
                        try:
                            made[wish] = _round(weight, *wish, found)
                        except CheckpointError as error:
                            raise CheckpointError(f"{module}.weight: {error}") from error
                    roundings[recipe.name].add(key, *made[wish])
    for recipe in recipes:
        for role, (_, share) in recipe.upgrades.items():
            roundings[recipe.name].upgrade(role, share)
    return roundings


def _round(
    weight: Tensor, form: Format, fallback: Format | None, limit: float, observed: Observed
) -> tuple[Choice, Quantized]:
    """A projection in a format, or in the fallback where that errs too much."""
    if isinstance(form, Integer):
        integer = quantize_integer(weight, form, observed.hessian, observed.inputs)
        error = _error(product(observed.inputs, integer), weight, observed)
        if error <= limit or fallback is None:
            return Choice(form, error), integer
        form = fallback
    assert isinstance(form, Blocks)
    form = form.fitting(weight.shape[1])
    blocks = quantize_blocks(weight, form, observed.hessian)
    return Choice(form, _error(observed.inputs @ blocks.dequantized(weight.shape[1]).T, weight, observed)), blocks


def _error(found: Tensor, weight: Tensor, observed: Observed) -> float:
    wanted = observed.inputs @ weight.T
    shares = (found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-20)
    return shares.mean().item()


@torch.inference_mode()
def observe(
    config: ModelConfig, weights: RotatedWeights, tokens: Sequence[int]
) -> Iterator[tuple[int, dict[str, Observed], CacheRange]]:
    """Run the text through the layers; yields each layer's number, and what its projections and cache were given."""
    length = min(WINDOW, config.max_position_embeddings)
    enough = min(max(_TOKENS_PER_INPUT * config.intermediate_size, _FEWEST), TOKENS)
    count = max(min(len(tokens), enough) // length, 1)
    windows = torch.tensor(tokens[: count * length]).reshape(count, -1)
    states = list(_embedded(config, weights, windows)[:, None])
    tables = rotary_tables(config)
    kept = max(_ROWS // count, 1)
    for number in range(config.num_hidden_layers):
        layer = _layer(config, weights, number)
        hessians: dict[str, Tensor] = {}
        inputs: dict[str, list[Tensor]] = {}
        ranges: list[Tensor] = []
        for index, state in enumerate(states):
            given = _run(layer, config, number, state, tables)
            for name, x in given.inputs.items():
                hessians[name] = hessians[name].addmm_(x.T, x) if name in hessians else x.T @ x
                step = max(len(x) // kept, 1)
                inputs.setdefault(name, []).append(x[::step].clone())
            states[index] = given.output
            largest = [found.abs().amax((0, 2)) for found in given.present]
            ranges = largest if not ranges else [torch.maximum(a, b) for a, b in zip(ranges, largest, strict=True)]
        del layer, given
        positions = sum(state.shape[1] for state in states)
        yield (
            number,
            {name: Observed(hessian.div_(positions), torch.cat(inputs[name])) for name, hessian in hessians.items()},
            CacheRange(*ranges),
        )


@dataclass(frozen=True, slots=True)
class _Given:
    output: Tensor
    present: tuple[Tensor, Tensor]
    inputs: dict[str, Tensor]


def _run(layer: Layer, config: ModelConfig, number: int, state: Tensor, tables: Mapping[str, Tensor]) -> _Given:
    """A layer over a window [1, S, hidden]; what its projections were given, [S, K]."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_: nn.Module, given: tuple[Tensor]) -> None:
            inputs[name] = given[0][0]

        return hook

    hooks = [
        module.register_forward_pre_hook(keep(name))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    rope = config.layers[number].rope
    index = None if rope is None else config.ropes.index(rope)
    empty = state.new_zeros(1, config.num_key_value_heads, 0, config.head_dim)
    mask = torch.ones(1, state.shape[1], dtype=torch.int64)
    pair = (None, None) if index is None else (tables[f"cos_{index}"], tables[f"sin_{index}"])
    output, present = layer(state, (empty, empty), mask, *pair)
    for hook in hooks:
        hook.remove()
    return _Given(output, present, inputs)


def _embedded(config: ModelConfig, weights: RotatedWeights, tokens: Tensor) -> Tensor:
    """What the first layer is given for tokens [B, S], as `model.Decoder` makes it."""
    state = weights.embedded(tokens) * config.embedding_scale
    return state + weights["embed_positions.weight"][: tokens.shape[1]] if config.learned_positions else state


def _layer(config: ModelConfig, weights: RotatedWeights, number: int) -> Layer:
    """A layer with its weights."""
    with torch.device("meta"):
        layer = Layer(config, config.layers[number], standalone=True).eval()
    loaded = {name: weights[f"layers.{number}.{name}"].float() for name, _ in layer.named_parameters()}
    layer.load_state_dict(loaded, assign=True)
    return layer
