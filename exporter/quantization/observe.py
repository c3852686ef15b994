"""Runs a text through a model layer by layer, and yields the inputs of all projections."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llm_edge.exporter.quantization.rotate import RotatedWeights
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder


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


@torch.inference_mode()
def observe(
    config: ModelConfig, weights: RotatedWeights, windows: Tensor, threads: Executor
) -> Iterator[ObservedLayer]:
    """Run windows of a text, int64 [count, S], that each start from an empty context; yield one layer after another.

    Weights are read one layer at a time.
    """
    decoder = _decoder_without_weights(config)
    mask = torch.ones(1, windows.shape[1], dtype=torch.int64)
    if config.learned_positions:
        decoder.load_parameters(weights, ["embed_positions.weight"])
    states = [decoder.embed(embeddings[None], mask) for embeddings in weights.embed(windows)]  # each [1, S, hidden]
    empty = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim)
    current = _Recorder()

    @torch.inference_mode()  # holds for one thread
    def run(number: int, state: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        current.inputs = {}
        state, present = decoder.run_layer(number, state, (empty, empty), mask)
        return state, current.inputs, [tensor.abs().amax((0, 2)) for tensor in present]

    for number, layer in enumerate(decoder.layers):
        decoder.load_parameters(weights, [f"layers.{number}.{name}" for name, _ in layer.named_parameters()])
        projections = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for name, module in projections.items():
            module.register_forward_pre_hook(partial(current.record, name))
        results = list(threads.map(partial(run, number), states))
        values = {name: module.weight.detach() for name, module in projections.items()}
        layer.to_empty(device="meta")  # frees its weights
        states = [state for state, _, _ in results]
        inputs = {name: torch.cat([found.pop(name) for _, found, _ in results]) for name in list(results[0][1])}
        ranges = [torch.stack(each).amax(0) for each in zip(*(found for *_, found in results), strict=True)]
        del results
        yield ObservedLayer(number, values, inputs, CacheRange(*ranges))


class _Recorder(threading.local):
    """Records the inputs of projections, in each thread those of the window that it runs."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}

    def record(self, name: str, _: nn.Module, arguments: tuple[Tensor]) -> None:
        """Record the inputs [1, S, K] of a projection: called before it."""
        self.inputs[name] = arguments[0][0]


def _decoder_without_weights(config: ModelConfig) -> Decoder:
    """Return a decoder on the meta device, but for its rotary tables."""
    with torch.device("meta"):
        decoder = Decoder(config, standalone=True).eval()
    decoder.set_rotary_tables()
    return decoder
