"""Runs a text through a model layer by layer, and yields the inputs of all projections."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llm_edge.exporter.layerwise import LayerwiseDecoder
from llm_edge.exporter.quantization.rotate import RotatedWeights
from llm_edge.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class CacheRange:
    """The largest absolute keys (rotated) and values in the cache of a layer, float32 [K, D]."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class ObservedLayer:
    """What a layer computes on a text.

    Attributes:
        number: index of the layer.
        weights: of its projections by their path in the layer, each float32 [N, K].
        inputs: of its projections, each float32 [tokens, K].
        cache: ranges of its cache.
    """

    number: int
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    cache: CacheRange


def observe(
    config: ModelConfig, weights: RotatedWeights, windows: Sequence[Sequence[int]], threads: Executor
) -> Iterator[ObservedLayer]:
    """Run windows of a text that each start from an empty context; yield one layer after another."""
    decoder = LayerwiseDecoder(config, weights)
    states = decoder.embed(windows)
    current = _Recorder()

    @torch.inference_mode()  # holds for one thread
    def run(number: int, state: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        current.inputs = {}
        state, present = decoder.run_layer(number, state)
        return state, current.inputs, [tensor.abs().amax((0, 2)) for tensor in present]

    for number, layer in enumerate(decoder.layers()):
        projections = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for name, module in projections.items():
            module.register_forward_pre_hook(partial(current.record, name))
        results = list(threads.map(partial(run, number), states))
        states = [state for state, _, _ in results]
        inputs = {name: torch.cat([found.pop(name) for _, found, _ in results]) for name in projections}
        ranges = [torch.stack(each).amax(0) for each in zip(*(found for *_, found in results), strict=True)]
        del results
        values = {name: module.weight.detach() for name, module in projections.items()}
        yield ObservedLayer(number, values, inputs, CacheRange(*ranges))


class _Recorder(threading.local):
    """Records the inputs of projections, in each thread those of the window that it runs."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}

    def record(self, name: str, _: nn.Module, arguments: tuple[Tensor]) -> None:
        """Record the inputs [1, S, K] of a projection: called before it."""
        self.inputs[name] = arguments[0][0]
