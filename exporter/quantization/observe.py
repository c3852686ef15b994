"""Runs texts through a model layer by layer, and yields the inputs of all projections."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llm_edge.exporter.bfloat16 import fast_projections, matmul_dtype
from llm_edge.exporter.layerwise import LayerwiseDecoder


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
        inputs: of its projections, each [tokens, K] in `matmul_dtype`.
        cache: ranges of its cache.
    """

    number: int
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    cache: CacheRange


class Observer:
    """Runs windows of a text that each start from an empty context.

    Attributes:
        states: outputs of the last layer that was run, one per window, each [1, S, hidden].
    """

    def __init__(self, decoder: LayerwiseDecoder, windows: Sequence[Sequence[int]], threads: Executor) -> None:
        self._decoder = decoder
        self._threads = threads
        self._current = CallRecorder()
        self.states = decoder.embed(windows)

    def run(self, number: int) -> None:
        """Run a layer, whose weights are in memory, over the outputs of the one before."""
        self.states = list(self._threads.map(partial(self._run_window, number), self.states))

    def observe(self, number: int, layer: nn.Module) -> ObservedLayer:
        """Run a layer like `run`, and return what it computes."""
        with self._current.recording(layer):
            results = list(self._threads.map(partial(self._observe_window, number), self.states))
        self.states = [state for state, _, _ in results]
        projections = projections_of(layer)
        inputs = {name: torch.cat([found.pop(name) for _, found, _ in results]) for name in projections}
        ranges = [torch.stack(each).amax(0) for each in zip(*(found for *_, found in results), strict=True)]
        values = {name: module.weight.detach() for name, module in projections.items()}
        return ObservedLayer(number, values, inputs, CacheRange(*ranges))

    @torch.inference_mode()  # holds for one thread, as `fast_projections` does
    def _run_window(self, number: int, state: Tensor) -> Tensor:
        with fast_projections():
            state, _ = self._decoder.run_layer(number, state)
        return state

    @torch.inference_mode()
    def _observe_window(self, number: int, state: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        self._current.calls = {}
        with fast_projections():
            state, present = self._decoder.run_layer(number, state)
        dtype = matmul_dtype()
        inputs = {name: call[0][0].to(dtype) for name, call in self._current.calls.items()}
        return state, inputs, [tensor.abs().amax((0, 2)) for tensor in present]


class CallRecorder(threading.local):
    """Records the inputs and outputs of projections, in each thread those of its last window.

    Attributes:
        calls: by path in the layer, input [1, S, K] and output [1, S, N].
    """

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def recording(self, layer: nn.Module) -> Iterator[None]:
        """Record the calls of a layer's projections."""
        hooks = [
            module.register_forward_hook(partial(self._record, name)) for name, module in projections_of(layer).items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, name: str, _: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        self.calls[name] = (arguments[0], output)


def projections_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the projections of a layer by their path in it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
