"""Refinement of quantized weights: a layer's 4-bit integers are trained until its output is closest to the original's.

GPTQ minimizes the error of each projection on its own. Here the projections of a layer are trained together, by
gradients through the rounding (straight-through estimator), as in block reconstruction (BRECQ, arXiv:2102.05426).
Memory holds one layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llm_edge.exporter.layerwise import LayerwiseDecoder
from llm_edge.exporter.parallel import worker_threads
from llm_edge.exporter.progress import ItemProgress
from llm_edge.exporter.quantization.blocks import QuantizedBlocks
from llm_edge.exporter.quantization.calibrate import CalibratedWeights, StoredFormat
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.observe import projections_of
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.quantization.rotate import RotatedWeights
from llm_edge.exporter.quantization.store import OverlayStore
from llm_edge.exporter.texts import Texts, Window
from llm_edge.model.config import ModelConfig

_TRAINED_BITS = 4
_LEARNING_RATE = 3e-3  # levels per step, falling to 0
_BETAS, _EPSILON = (0.9, 0.95), 1e-20
_WINDOW = 128  # tokens
_WINDOWS_PER_STEP = 2  # each in a thread of its own: the number of cores does not change the result
_MAX_TOKENS = 25_000  # in several passes over the text

Forward = Callable[[Tensor], Tensor]
"""Runs a layer, with the present weights of its projections, on an input [1, S, hidden]."""


def can_refine(recipe: Recipe) -> bool:
    """Return whether a recipe may store projections in blocks that are trained."""
    formats = [each for choices in recipe.choices.values() for each in choices]
    return any(isinstance(each, Blocks) and each.bits == _TRAINED_BITS for each in formats)


@dataclass(frozen=True, slots=True)
class LayerSamples:
    """Inputs [1, S, hidden] of a quantized layer for each window of a text, and the outputs of the original model."""

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]


def refine(
    config: ModelConfig,
    weights: RotatedWeights,
    calibrated: CalibratedWeights,
    texts: Texts,
    folder: Path,
    progress: ItemProgress,
) -> CalibratedWeights:
    """Train the integers of all projections in 4-bit blocks, on the calibration text.

    Args:
        config: of the rotated model.
        weights: of the rotated model.
        calibrated: quantized weights.
        texts: a layer is changed only if its error on the probes falls.
        folder: for the refined weights.
        progress: called with the completed fraction and the current item.

    Returns:
        the weights with those that were refined.
    """
    decoder = LayerwiseDecoder(config, weights)
    refined = OverlayStore(folder, calibrated.store)
    formats = dict(calibrated.formats)
    original = [decoder.embed(_short(windows)) for windows in (texts.calibration, texts.probes)]
    quantized = [list(part) for part in original]
    with worker_threads() as threads:
        for number, layer in enumerate(decoder.layers()):
            progress(number / config.num_hidden_layers, f"layer {number + 1}")

            def forward(state: Tensor, number: int = number) -> Tensor:
                return decoder.run_layer(number, state)[0]

            original = [_run(forward, part, threads) for part in original]
            modules = projections_of(layer)
            blocks = _trained_blocks(modules, number, calibrated)
            shapes = {name: modules[name].weight.shape for name in blocks}
            text, probes = (LayerSamples(*pair) for pair in zip(quantized, original, strict=True))
            found = refine_layer(forward, {name: modules[name] for name in blocks}, blocks, text, probes, threads)
            for name, result in found.items():
                module = f"layers.{number}.{name}"
                formats[module] = StoredFormat(formats[module].format)  # its error is no longer known
                refined.add(module, formats[module].format, (shapes[name][0], shapes[name][1]), result)
            quantized = [_run(forward, part, threads) for part in quantized]
    return dataclasses.replace(calibrated, formats=formats, store=refined)


def refine_layer(
    forward: Forward,
    modules: Mapping[str, nn.Linear],
    blocks: Mapping[str, QuantizedBlocks],
    text: LayerSamples,
    probes: LayerSamples,
    threads: Executor,
) -> dict[str, QuantizedBlocks]:
    """Train the integers of a layer's projections, whose modules hold the better weights afterwards.

    Args:
        forward: runs the layer.
        modules: the projections by name, with their original weights.
        blocks: the quantized projections.
        text: to train on.
        probes: to decide whether the result is kept.
        threads: of one core each.

    Returns:
        the refined projections, or an empty mapping if the error on the probes does not fall.
    """
    if not blocks:
        return {}
    latents = {name: _Latent(modules[name].weight, blocks[name]) for name in blocks}
    _load(modules, latents)
    before = _error(forward, probes, threads)
    _train(forward, modules, latents, text, threads)
    _load(modules, latents)
    if _error(forward, probes, threads) < before:
        return {name: blocks[name].with_levels(latent.levels()) for name, latent in latents.items()}
    for name, module in modules.items():
        module.weight = _fixed(blocks[name].dequantized(module.in_features))
    return {}


class _Latent:
    """A weight in units of its levels, trained by Adam; its rounded values are the integers."""

    def __init__(self, weight: Tensor, blocks: QuantizedBlocks) -> None:
        width = weight.shape[1]
        integers = torch.from_numpy(blocks.levels())
        size = integers.shape[1] // blocks.scales.shape[1]
        self._scales = torch.from_numpy(blocks.scales).repeat_interleave(size, 1)[:, :width]
        self._zeros = torch.from_numpy(blocks.zeros()).float().repeat_interleave(size, 1)[:, :width]
        self._max_level = float(2**blocks.bits - 1)
        levels = integers[:, :width].float()
        exact = weight.detach() / self._scales.where(self._scales > 0, 1.0) + self._zeros
        self._values = exact.clamp(levels - 0.49, levels + 0.49)  # rounds to the same levels
        self._means, self._squares = torch.zeros(2, *weight.shape)

    def levels(self) -> Tensor:
        """Return the integers as float32 [N, K]."""
        return self._values.round().clamp_(0, self._max_level)

    def rounded(self) -> Tensor:
        """Return the quantized weight, float32 [N, K]."""
        return self.levels().sub_(self._zeros).mul_(self._scales)

    def step(self, gradient: Tensor, number: int, rate: float) -> None:
        """Make a step, given the gradient by the quantized weight; `number` counts from 1."""
        gradient = gradient * self._scales
        self._means.lerp_(gradient, 1 - _BETAS[0])
        self._squares.lerp_(gradient.square_(), 1 - _BETAS[1])
        denominator = (self._squares / (1 - _BETAS[1] ** number)).add_(_EPSILON).sqrt_()
        self._values.addcdiv_(self._means, denominator, value=-rate / (1 - _BETAS[0] ** number))
        self._values.clamp_(-0.49, self._max_level + 0.49)


def _train(
    forward: Forward,
    modules: Mapping[str, nn.Linear],
    latents: Mapping[str, _Latent],
    text: LayerSamples,
    threads: Executor,
) -> None:
    def gradients(window: int) -> tuple[Tensor, ...]:
        output = forward(text.inputs[window].clone())
        error = _relative_error(output, text.outputs[window]).sum()
        return torch.autograd.grad(error, [module.weight for module in modules.values()])

    batches = list(_batches([output.shape[1] for output in text.outputs]))
    for number, batch in enumerate(batches):
        _load(modules, latents, trained=True)
        found = list(threads.map(gradients, batch))
        for index, latent in enumerate(latents.values()):
            gradient = torch.stack([each[index] for each in found]).sum(0)
            latent.step(gradient, number + 1, _LEARNING_RATE * (1 - number / len(batches)))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the windows of each step: passes over the text, each in an order of its own."""
    for number in range(max(_MAX_TOKENS // sum(lengths), 1)):
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(number)).tolist()
        for start in range(0, len(order), _WINDOWS_PER_STEP):
            yield order[start : start + _WINDOWS_PER_STEP]


def _load(modules: Mapping[str, nn.Linear], latents: Mapping[str, _Latent], *, trained: bool = False) -> None:
    """Give the modules the quantized weights; `trained` ones get gradients."""
    for name, latent in latents.items():
        modules[name].weight = _fixed(latent.rounded()).requires_grad_(trained)


def _fixed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _run(forward: Forward, states: Sequence[Tensor], threads: Executor) -> list[Tensor]:
    """Return the outputs of a layer for each window."""
    return list(threads.map(torch.no_grad()(forward), states))


def _error(forward: Forward, samples: LayerSamples, threads: Executor) -> float:
    """Return the mean error of a layer's outputs."""
    outputs = _run(forward, samples.inputs, threads)
    pairs = zip(outputs, samples.outputs, strict=True)
    return torch.cat([_relative_error(*pair)[0] for pair in pairs]).mean().item()


def _relative_error(output: Tensor, expected: Tensor) -> Tensor:
    """Return the mean square of each token's error relative to that of its expected output, [1, S]."""
    return (output - expected).square().mean(-1) / expected.square().mean(-1).clamp(min=1e-20)


def _trained_blocks(
    modules: Mapping[str, nn.Linear], number: int, calibrated: CalibratedWeights
) -> dict[str, QuantizedBlocks]:
    """Return the quantized projections of a layer in 4-bit blocks; the modules of all others stay as they are."""
    loaded = {name: calibrated.load(f"layers.{number}.{name}") for name in modules}
    return {
        name: blocks
        for name, blocks in loaded.items()
        if isinstance(blocks, QuantizedBlocks) and blocks.bits == _TRAINED_BITS
    }


def _short(windows: Sequence[Window]) -> list[tuple[int, ...]]:
    """Split windows into parts of up to `_WINDOW` tokens."""
    return [
        window.tokens[start : start + _WINDOW] for window in windows for start in range(0, len(window.tokens), _WINDOW)
    ]
