"""Calibration: quantizes each weight in several formats for the inputs it gets on a text, and chooses among them.

A forward pass, layer by layer, quantizes all projections; the inputs are those of the unquantized model, so that one
pass serves all precisions. A backward pass measures what each format changes; see `sensitivity`. Weights are read one
layer at a time and quantized weights are stored on disk: memory holds one layer, whatever the model's size.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from llm_edge.exporter.layerwise import LayerwiseDecoder
from llm_edge.exporter.module_names import EMBEDDING, HEAD
from llm_edge.exporter.parallel import worker_threads
from llm_edge.exporter.quantization.allocation import Option, frontier
from llm_edge.exporter.quantization.blocks import BlockLayout
from llm_edge.exporter.quantization.formats.base import ObservedInputs, Quantized, WeightFormat, apply, naming
from llm_edge.exporter.quantization.goals import MeasuredModel
from llm_edge.exporter.quantization.head import quantize_rows
from llm_edge.exporter.quantization.hessian import Hessian
from llm_edge.exporter.quantization.journal import Journal
from llm_edge.exporter.quantization.kinds import Means
from llm_edge.exporter.quantization.observe import CacheRange, Observer
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.quantization.rotate import RotatedWeights
from llm_edge.exporter.quantization.sensitivity import Q8_0, SensitivityPass, probe_inputs
from llm_edge.exporter.quantization.store import QuantizedStore, Stored
from llm_edge.exporter.texts import Texts
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import count_parameters

_SAMPLES = 1024  # inputs of a projection that are kept to fix scales and to measure errors
_ERROR_STEP = 4  # every fourth sample measures errors
_GOOD_ERROR = 1e-4  # of static activations, at which 8-bit blocks are not tried
_QUANTIZE_FRACTION = 0.75  # of the time
_GRAPH_BYTES = 16_000  # of a layer in the graph, without weights


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """How a weight is stored.

    Attributes:
        format: format of the weight.
        error: mean error of a projection's output per token, relative to the output; None if it was not measured.
        divergence: estimated mean KL divergence by the weight alone, in nats; None if it was not measured.
    """

    format: WeightFormat
    error: float | None = None
    divergence: float | None = None


@dataclass(frozen=True, slots=True)
class StoredPrecision:
    """How the weights of a precision are stored.

    Attributes:
        formats: of all projections and the embedding by module path.
        frontier: see `CalibratedWeights`; empty for a precision that is not calibrated.
    """

    formats: Mapping[str, StoredFormat] = field(default_factory=dict)
    frontier: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True)
class CalibratedWeights:
    """The quantized weights of one recipe, stored on disk.

    Attributes:
        formats: by module path, for example `layers.0.mlp.down`.
        caches: value ranges of each layer's cache.
        store: holds the weights.
        frontier: size in bytes and estimated mean KL divergence, in nats, of the best mixes.
    """

    formats: Mapping[str, StoredFormat]
    caches: Sequence[CacheRange]
    store: QuantizedStore
    frontier: Sequence[tuple[int, float]]

    def load(self, module: str) -> Quantized:
        """Load a weight; the embedding by the path of the head if that is tied to it."""
        return self.store.load(module, self.formats[module].format)


def calibrate(
    config: ModelConfig,
    weights: RotatedWeights,
    recipes: Sequence[Recipe],
    texts: Texts,
    journal: Journal,
    progress: Callable[[float, str], None],
) -> dict[str, CalibratedWeights]:
    """Quantize a rotated model, of shape `config`, for each calibrated recipe, to the folder of a journal.

    Steps that the journal lists are not repeated. `progress` is called with the completed fraction and the current
    item. The result is by recipe name.
    """
    return _Calibration(config, weights, recipes, journal).run(texts, progress)


class _Calibration:
    def __init__(
        self, config: ModelConfig, weights: RotatedWeights, recipes: Sequence[Recipe], journal: Journal
    ) -> None:
        self._config = config
        self._recipes = recipes
        self._journal = journal
        self._store = QuantizedStore(journal.folder / "weights")
        self._decoder = LayerwiseDecoder(config, weights)
        self._errors: dict[Stored, float] = {}
        self._caches: list[CacheRange] = []

    def run(self, texts: Texts, progress: Callable[[float, str], None]) -> dict[str, CalibratedWeights]:
        """See `calibrate`."""
        with worker_threads() as threads:
            self._quantize(texts, lambda done, item: progress(_QUANTIZE_FRACTION * done, item), threads)
            sensitivity = SensitivityPass(self._decoder, texts.probes, self._store, threads, self._journal)
            start = _QUANTIZE_FRACTION
            divergences = sensitivity.measure(lambda done: progress(start + (1 - start) * done, "sensitivity"))
        return self._choose(divergences)

    def _quantize(self, texts: Texts, progress: Callable[[float, str], None], threads: Executor) -> None:
        """Quantize all weights in all formats, and store the inputs of all layers on the probes."""
        done = 0
        while self._restore(f"layer {done}"):
            self._caches.append(CacheRange(*self._journal.load(f"cache-{done}")))
            done += 1
        if self._restore(HEAD):
            return
        states = self._quantize_layers(done, texts, progress, threads)
        progress(1.0, "head")
        self._quantize_head(states, threads)
        self._complete(HEAD, [HEAD, EMBEDDING])

    def _quantize_layers(
        self, start: int, texts: Texts, progress: Callable[[float, str], None], threads: Executor
    ) -> list[Tensor]:
        """Quantize all layers from one on; returns the outputs of the last layer."""
        decoder, layers, journal = self._decoder, self._config.num_hidden_layers, self._journal
        observer = Observer(decoder, [window.tokens for window in texts.calibration], threads)
        probes = Observer(decoder, [window.tokens for window in texts.probes], threads)
        if start:
            observer.states, probes.states = journal.load(f"outputs-{start - 1}"), journal.load(probe_inputs(start))
        running: list[Future[None]] = []
        for number, layer in zip(range(start, layers), decoder.layers(range(start, layers)), strict=True):
            journal.save(probe_inputs(number), probes.states, always=True)
            probes.run(number)
            found = observer.observe(number, layer)
            self._caches.append(found.cache)
            journal.save(f"outputs-{number}", observer.states)
            journal.save(f"cache-{number}", [found.cache.key, found.cache.value])
            self._complete_layer(number - 1, running)  # before this layer's Hessians take memory
            observed = {name: _summarize(found.inputs.pop(name), threads) for name in list(found.inputs)}
            progress(number / layers, f"layer {number + 1}")
            running = [
                threads.submit(self._quantize_projection, f"layers.{number}.{name}", found.weights[name], inputs)
                for name, inputs in sorted(observed.items(), key=lambda item: -item[1].samples.shape[1])
            ]
        journal.save(probe_inputs(layers), probes.states, always=True)
        self._complete_layer(layers - 1, running)
        return observer.states

    def _complete_layer(self, number: int, running: Sequence[Future[None]]) -> None:
        """Wait until a layer's projections are quantized; the next layer's inputs are stored by then."""
        for task in running:
            task.result()
        if running:
            prefix = f"layers.{number}."
            modules = [name for name in self._store.shapes if name.startswith(prefix)]
            self._complete(f"layer {number}", modules)
            self._journal.discard(f"outputs-{number - 1}")

    def _complete(self, step: str, modules: Sequence[str]) -> None:
        """Add quantized weights to the journal."""
        stored = [(module, each) for module in modules for each in self._store.formats(module)]
        self._journal.complete(
            step,
            [
                [
                    module,
                    each.label,
                    self._store.shapes[module],
                    self._store.bytes(module, each),
                    self._errors.get((module, each)),
                ]
                for module, each in stored
            ],
            [self._store.path(module, each) for module, each in stored],
        )

    def _restore(self, step: str) -> bool:
        """Take over the weights of a step; returns whether it was completed."""
        if step not in self._journal.steps:
            return False
        for module, label, (rows, columns), size, error in self._journal.steps[step]:
            weight_format = next(each for each in self._formats(module, columns) if each.label == label)
            self._store.restore(module, weight_format, (rows, columns), size)
            if error is not None:
                self._errors[module, weight_format] = error
        return True

    def _quantize_projection(self, module: str, weight: Tensor, observed: ObservedInputs) -> None:
        samples = observed.samples[::_ERROR_STEP]
        expected = samples @ weight.T
        least = math.inf  # error of formats with static activations
        for weight_format in self._formats(module, weight.shape[1]):
            if least < _GOOD_ERROR and isinstance(weight_format, BlockLayout) and weight_format.bits == 8:
                continue  # 8-bit blocks are slower, and better only for inputs with outliers
            with naming(f"{module}.weight"):
                quantized = weight_format.calibrate(weight, observed)
            error = relative_error(apply(quantized, samples), expected)
            least = min(least, error) if weight_format.static_activations else least
            self._errors[module, weight_format] = error
            self._store.add(module, weight_format, (len(weight), weight.shape[1]), quantized)

    def _quantize_head(self, states: Sequence[Tensor], threads: Executor) -> None:
        """Quantize the head, and the embedding unless it is tied to it: 4 bits of the head with GPTQ."""
        decoder, config = self._decoder, self._config
        decoder.load_norm()
        with torch.inference_mode():
            inputs = torch.cat([decoder.normalize(state)[0] for state in states])
        self._quantize_rows(HEAD, decoder.head_rows(), Hessian.of(inputs, threads), threads)
        if not config.tie_word_embeddings:
            self._quantize_rows(EMBEDDING, decoder.embedding_rows(), None, threads)

    def _quantize_rows(
        self, module: str, rows: Callable[[Tensor], Tensor], hessian: Hessian | None, threads: Executor
    ) -> None:
        """Quantize the embedding or the head, whose rows are read by number."""
        shape = (self._config.vocab_size, self._config.hidden_size)
        for weight_format in self._formats(module, shape[1]):
            assert isinstance(weight_format, BlockLayout)
            compensated = hessian if weight_format.bits == 4 else None  # 8 bits are accurate enough
            self._store.add(
                module, weight_format, shape, quantize_rows(rows, shape[0], weight_format, compensated, threads)
            )

    def _formats(self, module: str, width: int, recipes: Sequence[Recipe] | None = None) -> list[WeightFormat]:
        """Return the formats of a weight that the recipes choose from."""
        role = module.rpartition(".")[2]
        choices = [each.for_width(width) for recipe in recipes or self._recipes for each in recipe.choices[role]]
        return list(dict.fromkeys(choices))

    def _choose(self, divergences: Mapping[Stored, Means]) -> dict[str, CalibratedWeights]:
        """Choose a mix for each recipe, and delete all other weights."""
        weights = dict(sorted(self._store.shapes.items()))  # threads add them in any order
        model = MeasuredModel(
            self._config,
            other_bytes=_other_bytes(self._config, sum(map(math.prod, weights.values()))),
        )
        q8_0 = reduce(operator.add, (divergences[module, Q8_0] for module in weights))
        stored = {module: self._store.formats(module) for module in weights}
        chosen = {}
        for recipe in self._recipes:
            assert recipe.goal is not None
            options = {
                module: [
                    Option(
                        each,
                        self._store.bytes(module, each),
                        divergences[module, each].whole,
                        divergences[module, each].relative_to(q8_0),
                        each.prefill_cost * math.prod(shape),
                    )
                    for each in self._formats(module, shape[1], [recipe])
                    if each in stored[module]
                ]
                for module, shape in weights.items()
            }
            mix = recipe.goal.choose(options, model)
            points = [(size + model.other_bytes, divergence) for size, divergence in frontier(options)]
            formats = {
                module: StoredFormat(option.format, self._errors.get((module, option.format)), option.divergence)
                for module, option in mix.items()
            }
            chosen[recipe.name] = CalibratedWeights(formats, self._caches, self._store, points)
        self._store.keep({(module, it.format) for each in chosen.values() for module, it in each.formats.items()})
        return chosen


def _other_bytes(config: ModelConfig, quantized: int) -> int:
    """Return the approximate size of the graph and of all weights but those that are `quantized`."""
    return 4 * (count_parameters(config) - quantized) + _GRAPH_BYTES * config.num_hidden_layers


def _summarize(x: Tensor, threads: Executor) -> ObservedInputs:
    """Return what rounding needs of the inputs [tokens, K] of a projection."""
    samples = x[:: max(len(x) // _SAMPLES, 1)]
    return ObservedInputs(Hessian.of(x, threads), samples.to(torch.float32, copy=True))


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Return the mean squared error of outputs [rows, N], each relative to the square of what is expected."""
    errors = (output - expected).square().sum(-1) / expected.square().sum(-1).clamp(min=1e-20)
    return errors.mean().item()
