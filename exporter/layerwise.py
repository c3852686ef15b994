"""Runs the decoder layer by layer over all windows of a text, so that memory holds the weights of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from llm_edge.exporter.module_names import EMBEDDING, HEAD
from llm_edge.exporter.parallel import worker_threads
from llm_edge.exporter.progress import ItemProgress
from llm_edge.exporter.quantization.rotate import RotatedWeights
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder

_EMBEDDING_WEIGHT, _POSITIONS_WEIGHT, _HEAD_BIAS = f"{EMBEDDING}.weight", "embed_positions.weight", f"{HEAD}.bias"


def _decoder_without_weights(config: ModelConfig) -> Decoder:
    """Return a decoder on the meta device, but for its rotary tables."""
    with torch.device("meta"):
        decoder = Decoder(config, standalone=True).eval().requires_grad_(requires_grad=False)
    decoder.set_rotary_tables()
    return decoder


class LayerwiseDecoder:
    """The decoder with the weights of one layer in memory at a time; the head's after `run`.

    Its calls on windows are independent of each other, so that they can be made in threads.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self._weights = weights
        self._decoder = _decoder_without_weights(config)

    @torch.inference_mode()
    def embed(self, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the input of the first layer [1, S, hidden] for each window of a text."""
        if self.config.learned_positions:
            self._decoder.load_parameters(self._weights, [_POSITIONS_WEIGHT])
        rows = self.embedding_rows()(torch.tensor([token for window in windows for token in window]))
        parts = torch.split(rows, [len(window) for window in windows])
        return [self._decoder.embed(part[None], _mask(part[None])) for part in parts]

    def layers(self, numbers: Iterable[int] | None = None) -> Iterator[nn.Module]:
        """Yield one layer after another, or those of `numbers`, with its weights, which are freed before the next."""
        for number in range(self.config.num_hidden_layers) if numbers is None else numbers:
            layer = self._decoder.layers[number]
            names = [f"layers.{number}.{name}" for name, _ in layer.named_parameters()]
            self._decoder.load_parameters(self._weights, names)
            yield layer
            layer.to_empty(device="meta")

    def run_layer(self, number: int, state: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run a layer over a window [1, S, hidden] from an empty context; see `Decoder.run_layer`. Differentiable."""
        config = self.config
        empty = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim)
        return self._decoder.run_layer(number, state, (empty, empty), _mask(state))

    def run(self, windows: Sequence[Sequence[int]], progress: ItemProgress = lambda *_: None) -> list[Tensor]:
        """Return the output of the last layer [S, hidden] for each window."""
        run = torch.inference_mode()(self.run_layer)  # in each thread
        states = self.embed(windows)
        with worker_threads() as threads:
            for number, _ in enumerate(self.layers()):
                progress(number / self.config.num_hidden_layers, f"layer {number + 1}")
                states = [state for state, _ in threads.map(partial(run, number), states)]
        self.load_head()
        return [state[0] for state in states]

    @torch.inference_mode()
    def hidden_states(self, state: Tensor) -> Tensor:
        """Return transformers' `last_hidden_state` for the output of the last layer."""
        normalized: Tensor = self._decoder.norm(state)
        return normalized * self.config.hidden_scale

    @torch.inference_mode()
    def logits(self, state: Tensor) -> Tensor:
        """Return the logits [S, V] for the output [S, hidden] of the last layer."""
        logits: Tensor = self._decoder.lm_head(self.normalize(state))
        return logits

    def normalize(self, state: Tensor) -> Tensor:
        """Return the input of the head for the output of the last layer, both [..., hidden]. Differentiable."""
        return self._decoder.normalize(state)

    def embedding_rows(self) -> Callable[[Tensor], Tensor]:
        """Load the embedding; return a function that returns rows by number, float32 [tokens, hidden]."""
        return self._rows(_EMBEDDING_WEIGHT)

    def head_rows(self) -> Callable[[Tensor], Tensor]:
        """Load the head like the embedding."""
        return self._rows(_EMBEDDING_WEIGHT if self.config.tie_word_embeddings else f"{HEAD}.weight")

    def head_bias(self) -> Tensor | None:
        """Return the bias of the head, float32 [V], or None if it has none."""
        return self._weights[_HEAD_BIAS].float() if self.config.head_bias else None

    def _rows(self, name: str) -> Callable[[Tensor], Tensor]:
        if isinstance(self._weights, RotatedWeights):
            return self._weights.rows(name)
        weight = self._weights[name]
        return lambda rows: weight[rows].float()

    def load_norm(self) -> None:
        """Load what is between the layers and the head, for `normalize`."""
        names = [name for name, _ in self._decoder.named_parameters() if name.split(".")[0] in ("norm", "head_mix")]
        self._decoder.load_parameters(self._weights, names)

    def load_head(self) -> None:
        """Load what follows the layers, for `logits`."""
        self.load_norm()
        decoder, tied = self._decoder, self.config.tie_word_embeddings
        biases = [_HEAD_BIAS] if self.config.head_bias else []
        decoder.load_parameters(self._weights, [_EMBEDDING_WEIGHT if tied else f"{HEAD}.weight", *biases])
        if tied:
            decoder.lm_head.weight = decoder.embed_tokens.weight


def _mask(state: Tensor) -> Tensor:
    """Return the attention mask [1, S] of a window [1, S, hidden]."""
    return torch.ones(1, state.shape[1], dtype=torch.int64)
