"""Estimates how much each quantized weight changes what a model predicts.

Near the weights of a model, the KL divergence of a quantized model is half the mean square of `sum(g * e)` over all
outputs and positions. `e` is the error of an output, and `g` the gradient of the log-likelihood of tokens drawn from
the model, because the second derivative of the divergence is the Fisher information (Martens, arXiv:1412.1193). One
backward pass, layer by layer, therefore serves all formats of all weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from llm_edge.exporter.bfloat16 import fast_projections, multiply
from llm_edge.exporter.layerwise import LayerwiseDecoder
from llm_edge.exporter.module_names import EMBEDDING, HEAD
from llm_edge.exporter.quantization.blocks import QuantizedBlocks
from llm_edge.exporter.quantization.formats.base import Quantized, WeightFormat
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.head import measure_head
from llm_edge.exporter.quantization.journal import Journal
from llm_edge.exporter.quantization.kinds import Means, Positions, finite
from llm_edge.exporter.quantization.observe import CallRecorder, projections_of
from llm_edge.exporter.quantization.store import QuantizedStore, Stored
from llm_edge.exporter.texts import Window

Q8_0 = Blocks(bits=8, size=32, symmetric=True)
"""Weights and activations rounded to the nearest level, as GGUF's type of this name is computed with."""
_RESULT = "sensitivity"  # name of the last step


def probe_inputs(layer: int) -> str:
    """Return the name, in the journal, of the inputs of a layer on the probes."""
    return f"inputs-{layer}"


def _step(number: int) -> str:
    """Return the name of the step that measures a layer, or the head as the one after the last."""
    return f"sensitivity {number}"


def _gradients(number: int) -> str:
    """Return the name of the gradients of a layer's inputs."""
    return f"gradients-{number}"


def _to_json(measured: Mapping[Stored, Means | Change]) -> list[object]:
    return [[module, each.label, found.to_list()] for (module, each), found in measured.items()]


@dataclass(frozen=True, slots=True)
class Change:
    """How far the error of a weight moves the log-likelihood of the drawn tokens.

    Attributes:
        squares: means of the squares of the changes at each position.
        windows: sum of the squares of the changes in each window: errors at different positions may cancel each other.
    """

    squares: Means
    windows: float

    def to_list(self) -> list[float]:
        """Return the numbers as they are stored in the journal."""
        return [self.windows, *self.squares.to_list()]

    @staticmethod
    def from_list(values: Sequence[float]) -> Change:
        """Reverse `to_list`."""
        return Change(Means.from_list(values[1:]), values[0])


class SensitivityPass:
    """The backward pass over short windows of a text.

    Args:
        decoder: of the unquantized model.
        windows: of several kinds of text.
        store: weights in all formats.
        threads: of one core each.
        journal: holds the inputs of all layers (see `probe_inputs`) and, after them, the outputs of the last; lists the
            layers that were measured, which are not measured again.
    """

    def __init__(
        self,
        decoder: LayerwiseDecoder,
        windows: Sequence[Window],
        store: QuantizedStore,
        threads: Executor,
        journal: Journal,
    ) -> None:
        self._decoder = decoder
        self._windows = windows
        self._positions = Positions(windows)
        self._store = store
        self._threads = threads
        self._journal = journal
        self._recorder = CallRecorder()

    def measure(self, progress: Callable[[float], None]) -> dict[Stored, Means]:
        """Return the mean KL divergence, in nats, of each stored weight, and of all weights in Q8_0."""
        known = self._restore(_RESULT)
        if known is None:
            upstream, found = self._measure_or_restore_head()
            upstream, changes = self._measure_layers(upstream, progress)
            found |= self._divergences(changes)
            self._measure_embedding(upstream, found)
            self._journal.complete(_RESULT, _to_json(found))
            return found
        return {stored: Means.from_list(values) for stored, values in known.items()}

    def _measure_or_restore_head(self) -> tuple[list[Tensor], dict[Stored, Means]]:
        """Return the gradients of the last layer's outputs, empty if later ones are stored, and divergences."""
        layers = self._decoder.config.num_hidden_layers
        head = self._restore(_step(layers))
        if head is not None:
            return [], {stored: Means.from_list(values) for stored, values in head.items()}
        found: dict[Stored, Means] = {}
        upstream = self._measure_head(found)
        self._complete(layers, upstream, found)
        return upstream, found

    def _measure_layers(
        self, upstream: list[Tensor], progress: Callable[[float], None]
    ) -> tuple[list[Tensor], dict[Stored, Change]]:
        """Return the gradients of the first layer's inputs, and the changes by all projections."""
        first = layers = self._decoder.config.num_hidden_layers  # `first` of those that were measured before
        changes: dict[Stored, Change] = {}
        while (restored := self._restore(_step(first - 1))) is not None:
            changes |= {stored: Change.from_list(values) for stored, values in restored.items()}
            first -= 1
        upstream = upstream or self._journal.load(_gradients(first))
        numbers = range(first - 1, -1, -1)
        for number, layer in zip(numbers, self._decoder.layers(numbers), strict=True):
            progress(1 - (number + 1) / layers)
            with self._recorder.recording(layer):
                results = list(self._threads.map(partial(self._differentiate, number), self._inputs(number), upstream))
            upstream = [gradient for gradient, _ in results]
            tasks = [
                self._threads.submit(
                    self._score, f"layers.{number}.{name}", module, [calls[name] for _, calls in results]
                )
                for name, module in projections_of(layer).items()
            ]
            measured = {stored: change for task in tasks for stored, change in task.result().items()}
            changes |= measured
            self._complete(number, upstream, measured)
        return upstream, changes

    def _complete(self, number: int, upstream: Sequence[Tensor], measured: Mapping[Stored, Means | Change]) -> None:
        """Add a layer, or the head as the one after the last, to the journal, with the gradients of its inputs."""
        self._journal.save(_gradients(number), upstream)
        self._journal.complete(_step(number), _to_json(measured))
        self._journal.discard(_gradients(number + 1))

    def _restore(self, step: str) -> dict[Stored, list[float]] | None:
        """Return what was measured in a step, or None if it was not completed."""
        if step not in self._journal.steps:
            return None
        formats: dict[str, dict[str, WeightFormat]] = {}
        for module, *_ in self._journal.steps[step]:
            formats[module] = {each.label: each for each in (*self._store.formats(module), Q8_0)}
        return {(module, formats[module][label]): values for module, label, values in self._journal.steps[step]}

    def _differentiate(
        self, number: int, state: Tensor, upstream: Tensor
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Return the gradient of a layer's input, and the inputs [S, K] and gradients [S, N] of its projections."""
        self._recorder.calls = {}
        state = state.clone().requires_grad_()
        with fast_projections():
            output, _ = self._decoder.run_layer(number, state)
        calls = self._recorder.calls
        gradients = torch.autograd.grad(output, [state, *(result for _, result in calls.values())], upstream)
        found = {
            name: (x.detach()[0], gradient[0])
            for (name, (x, _)), gradient in zip(calls.items(), gradients[1:], strict=True)
        }
        return gradients[0], found

    @torch.inference_mode()
    def _score(
        self,
        module: str,
        linear: nn.Linear,
        calls: Sequence[tuple[Tensor, Tensor]],
    ) -> dict[Stored, Change]:
        """Return the changes by the errors of a projection in each of its formats."""
        x = torch.cat([each for each, _ in calls])
        gradients = torch.cat([gradient for _, gradient in calls])
        lengths = [len(each) for each, _ in calls]
        input_gradients = multiply(gradients, linear.weight)
        found = {}

        def add(weight_format: WeightFormat, quantized: Quantized) -> None:
            # The change of `gradients * (x @ weight.T)`, of which only errors are rounded to bfloat16.
            rounded, weight = quantized.factors(x)
            change = rounded * multiply(gradients, weight.sub_(linear.weight)) + (rounded - x) * input_gradients
            change = change.sum(-1, dtype=torch.float64)
            sums = torch.stack([part.sum() for part in torch.split(change, lengths)])
            squares = self._positions.means(change.square())
            found[module, weight_format] = Change(squares, finite(sums.square()).sum().item())

        for weight_format in self._store.formats(module):
            add(weight_format, self._store.load(module, weight_format))
        add(Q8_0, Q8_0.quantize({module: linear.weight}, module))
        return found

    def _divergences(self, changes: dict[Stored, Change]) -> dict[Stored, Means]:
        """Return the mean divergences for changes by projections.

        Sums over windows would be right, but those of a few windows are noise. Sums of squares over positions, times
        how both relate for all projections of a role, are right on average.
        """
        tokens = sum(len(window.tokens) for window in self._windows)
        positions: dict[str, float] = defaultdict(float)
        windows: dict[str, float] = defaultdict(float)
        for (module, weight_format), change in changes.items():
            if weight_format == Q8_0:  # so that a precision does not depend on others that are exported with it
                role = module.rpartition(".")[2]
                positions[role] += change.squares.whole * tokens
                windows[role] += change.windows
        factors = {role: windows[role] / max(positions[role], 1e-30) for role in positions}
        return {
            stored: change.squares.scaled(factors[stored[0].rpartition(".")[2]] / 2)
            for stored, change in changes.items()
        }

    def _measure_head(self, found: dict[Stored, Means]) -> list[Tensor]:
        """Add the divergences of the head; return the gradients of the last layer's outputs."""
        decoder = self._decoder
        decoder.load_norm()
        states = [state.clone().requires_grad_() for state in self._inputs(decoder.config.num_hidden_layers)]
        outputs = [decoder.normalize(state) for state in states]
        candidates = self._load_blocks(HEAD)
        head = measure_head(decoder, torch.cat(outputs, 1)[0].detach(), candidates, Q8_0, self._threads)
        found.update({(HEAD, each): self._positions.means(values) for each, values in head.divergences.items()})
        upstream = torch.split(head.gradients, [state.shape[1] for state in states])
        pairs = zip(outputs, states, upstream, strict=True)
        return [torch.autograd.grad(output, state, gradient[None])[0] for output, state, gradient in pairs]

    @torch.inference_mode()
    def _measure_embedding(self, upstream: Sequence[Tensor], found: dict[Stored, Means]) -> None:
        """Add the divergences of the embedding; those of one tied to the head belong to the head."""
        decoder = self._decoder
        tokens = torch.tensor([token for window in self._windows for token in window.tokens])
        gradients = torch.cat([gradient[0] for gradient in upstream]) * decoder.config.embedding_scale
        rows = decoder.embedding_rows()(tokens)
        module = HEAD if decoder.config.tie_word_embeddings else EMBEDDING
        candidates = {each: whole.rows(tokens) for each, whole in self._load_blocks(module).items()}
        candidates[Q8_0] = Q8_0.quantize({EMBEDDING: rows}, EMBEDDING)
        for each, quantized in candidates.items():
            errors = quantized.dequantized(rows.shape[1]) - rows
            divergence = self._positions.means((errors * gradients).sum(-1).square() / 2)
            known = found.get((module, each))
            found[module, each] = divergence if known is None else known + divergence

    def _inputs(self, layer: int) -> list[Tensor]:
        return self._journal.load(probe_inputs(layer))

    def _load_blocks(self, module: str) -> dict[Blocks, QuantizedBlocks]:
        """Return the embedding or the head in all formats, which are blocks."""
        return {
            each: cast("QuantizedBlocks", self._store.load(module, each))
            for each in cast("list[Blocks]", self._store.formats(module))
        }
