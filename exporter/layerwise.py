"""Runs the decoder layer by layer over all windows of a text, so that memory holds the weights of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llm_edge.exporter.module_names import EMBEDDING, HEAD
from llm_edge.exporter.progress import ItemProgress
from llm_edge.exporter.quantization.rotate import RotatedWeights
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder

_EMBEDDING_WEIGHT, _POSITIONS_WEIGHT = f"{EMBEDDING}.weight", "embed_positions.weight"


def decoder_without_weights(config: ModelConfig) -> Decoder:
    """Return a decoder on the meta device, but for its rotary tables."""
    with torch.device("meta"):
        decoder = Decoder(config, standalone=True).eval()
    decoder.set_rotary_tables()
    return decoder


class LayerwiseDecoder:
    """The reference decoder with the weights of one layer in memory at a time; the head's after `run`."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self._weights = weights
        self._decoder = decoder_without_weights(config)

    @torch.inference_mode()
    def run(self, windows: Sequence[Sequence[int]], progress: ItemProgress = lambda *_: None) -> list[Tensor]:
        """Return the output of the last layer [S, hidden] for each window, each from an empty context."""
        config, decoder, weights = self.config, self._decoder, self._weights
        masks = [torch.ones(1, len(window), dtype=torch.int64) for window in windows]
        if config.learned_positions:
            decoder.load_parameters(weights, [_POSITIONS_WEIGHT])
        rows = self._embed(torch.tensor([token for window in windows for token in window]))
        parts = torch.split(rows, [len(window) for window in windows])
        states = [decoder.embed(part[None], mask) for part, mask in zip(parts, masks, strict=True)]
        empty = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim)
        for number, layer in enumerate(decoder.layers):
            progress(number / len(decoder.layers), f"layer {number + 1}")
            decoder.load_parameters(weights, [f"layers.{number}.{name}" for name, _ in layer.named_parameters()])
            for index, (state, mask) in enumerate(zip(states, masks, strict=True)):
                states[index], _ = decoder.run_layer(number, state, (empty, empty), mask)
            layer.to_empty(device="meta")  # frees its weights
        self._load_head()
        return [state[0] for state in states]

    @torch.inference_mode()
    def hidden_states(self, state: Tensor) -> Tensor:
        """Return transformers' `last_hidden_state` for the output of the last layer."""
        normalized: Tensor = self._decoder.norm(state)
        return normalized * self.config.hidden_scale

    @torch.inference_mode()
    def logits(self, state: Tensor) -> Tensor:
        """Return the logits [S, V] for the output [S, hidden] of the last layer."""
        logits: Tensor = self._decoder.lm_head(self._decoder.normalize(state))
        return logits

    def _embed(self, tokens: Tensor) -> Tensor:
        if isinstance(self._weights, RotatedWeights):
            return self._weights.embed(tokens)
        return self._weights[_EMBEDDING_WEIGHT][tokens].float()

    def _load_head(self) -> None:
        """Load what follows the layers."""
        decoder, tied = self._decoder, self.config.tie_word_embeddings
        names = [name for name, _ in decoder.named_parameters() if name.split(".")[0] in ("norm", "head_mix")]
        decoder.load_parameters(self._weights, [*names, _EMBEDDING_WEIGHT if tied else f"{HEAD}.weight"])
        if tied:
            decoder.lm_head.weight = decoder.embed_tokens.weight
