"""Sizes of the GGUF files that llama.cpp's quantization makes of a model, without an importance matrix."""

from __future__ import annotations

from collections.abc import Iterator

from llm_edge.model.config import ModelConfig

_BITS = {"F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_0": 5.5, "Q4_0": 4.5, "Q4_K": 4.5}  # per weight
_FALLBACKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # for rows that are not a multiple of 256


def gguf_bytes(config: ModelConfig, file_type: str) -> int:
    """Return the size of the weights in a file of a type: `Q4_0` or `Q4_K_M`.

    The types of tensors are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp: the head, or the
    embedding tied to it, has Q6_K; Q4_K_M has Q6_K for the values and `down` of some layers.
    """
    plain = "Q4_0" if file_type == "Q4_0" else "Q4_K"
    total = sum(_tensor_bytes(rows, width, kind) for rows, width, kind in _tensors(config, plain))
    norms = 4 * config.hidden_size * (2 * config.num_hidden_layers + 1)
    return int(total) + norms


def _tensors(config: ModelConfig, plain: str) -> Iterator[tuple[int, int, str]]:
    """Yield rows, width and type of all matrices."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    yield config.vocab_size, hidden, "Q6_K"
    if not config.tie_word_embeddings:
        yield config.vocab_size, hidden, plain
    for layer in range(layers):
        better = "Q6_K" if plain == "Q4_K" and _uses_more_bits(layer, layers) else plain
        yield config.query_size + config.key_value_size, hidden, plain
        yield config.key_value_size, hidden, better
        yield hidden, config.query_size, plain
        yield (2 * inner if config.gated_mlp else inner), hidden, plain
        yield hidden, inner, better


def _uses_more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is in the first or last eighth, or every third one between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _tensor_bytes(rows: int, width: int, kind: str) -> float:
    if width % 256 and kind in _FALLBACKS:
        kind = _FALLBACKS[kind]
    if width % 32:
        kind = "F16"
    return rows * width * _BITS[kind] / 8
