"""The reference decoder: plain PyTorch with an explicit KV cache. Knows nothing of files, ONNX or quantization.

Shapes: B batch, S new tokens, P past tokens, T = P + S, H query heads, K key/value heads, D head size,
V vocabulary. Everything the exporter proves is proven against this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_edge.model.attention import attention, cached_attention, positions_of
from llm_edge.model.config import Activation, LayerConfig, ModelConfig, Norm, QKNorm

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, both [B, K, P, D]; P may be 0."""

_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.RELU: F.relu,
}


def _norm(config: ModelConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm is Norm.RMS else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class Attention(nn.Module):
    """Packed projections around `cached_attention`.

    Args:
        config: of the model.
        layer: of this layer.
        standalone: call attention as plain PyTorch instead of as the registered operator.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, standalone: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.window = layer.window if layer.window and layer.window < config.max_position_embeddings else 0
        self.attend = attention if standalone else cached_attention
        width = config.query_size + 2 * config.key_value_size
        self.qkv = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.output = nn.Linear(config.query_size, config.hidden_size, bias=config.output_bias)
        if config.qk_norm is not QKNorm.NONE:
            full = config.qk_norm is QKNorm.FULL
            sizes = (config.query_size, config.key_value_size) if full else (config.head_dim, config.head_dim)
            self.query_norm, self.key_norm = (nn.RMSNorm(size, eps=config.norm_eps) for size in sizes)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor], mask: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, S, hidden] -> the same shape, and the layer's present keys and values."""
        query, key, value = self._normalised(self.qkv(x))
        rope = self.layer.rope
        attended, *present = self.attend(
            query,
            key,
            value,
            *past,
            mask,
            cos,
            sin,
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.config.scale,
            self.window,
            rope.long_from if rope is not None else 0,
        )
        return self.output(attended), (present[0], present[1])

    def _normalised(self, packed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries, keys and values [B, S, heads * D] with their norms applied; packed in the first where none are."""
        config = self.config
        if config.qk_norm is QKNorm.NONE:
            return packed, None, None
        end = config.query_size + config.key_value_size
        query, key = packed[..., : config.query_size], packed[..., config.query_size : end]
        if config.qk_norm is QKNorm.FULL:
            query, key = self.query_norm(query), self.key_norm(key)
        else:
            heads = (*packed.shape[:-1], -1, config.head_dim)
            query = self.query_norm(query.reshape(heads)).flatten(-2)
            key = self.key_norm(key.reshape(heads)).flatten(-2)
        return query, key, packed[..., end:]


class FeedForward(nn.Module):
    """Gated (SwiGLU and its kin, arXiv:2002.05202; gate and up packed into one projection) or plain."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.intermediate_size
        self.gated = config.gated_mlp
        self.activation = _ACTIVATIONS[config.activation]
        if self.gated:
            self.gate_up = nn.Linear(config.hidden_size, 2 * self.width, bias=config.mlp_bias)
        else:
            self.up = nn.Linear(config.hidden_size, self.width, bias=config.mlp_bias)
        self.down = nn.Linear(self.width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, hidden] -> the same shape."""
        if self.gated:
            gate, up = torch.split(self.gate_up(x), [self.width, self.width], dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(self.up(x))
        down: Tensor = self.down(inner)
        return down


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, standalone: bool = False) -> None:
        super().__init__()
        self.parallel = config.parallel_blocks
        self.attention_norm = _norm(config) if config.pre_norm else nn.Identity()
        self.attention = Attention(config, layer, standalone=standalone)
        self.attention_post_norm = _norm(config) if config.post_norm else nn.Identity()
        self.mlp_norm = _norm(config) if config.pre_norm else nn.Identity()
        self.mlp = FeedForward(config)
        self.mlp_post_norm = _norm(config) if config.post_norm else nn.Identity()

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor], mask: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, S, hidden] -> the same shape, and the layer's present keys and values."""
        attended, present = self.attention(self.attention_norm(x), past, mask, cos, sin)
        after = x + self.attention_post_norm(attended)
        inner = self.mlp(self.mlp_norm(x if self.parallel else after))
        return after + self.mlp_post_norm(inner), present


class Decoder(nn.Module):
    """The whole model. Its parameter names are the names of the ONNX initializers.

    A tied output head is the embedding itself: `lm_head` then has no weight of its own.

    Args:
        config: the shape.
        standalone: call attention as plain PyTorch instead of as the registered operator, so that a trace of this
            module needs nothing of ours.
    """

    def __init__(self, config: ModelConfig, *, standalone: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer, standalone=standalone) for layer in config.layers)
        self.norm = _norm(config)
        if config.head_mix:
            self.head_mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._set_tables()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Past, num_logits_to_keep: int = 0
    ) -> tuple[Tensor, Past]:
        """One step over S new tokens.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, T], see `cached_attention`. A batch of unequal lengths is padded on the right.
            past: one pair a layer, as the previous step returned it (`empty_past` before the first).
            num_logits_to_keep: logits of the last n positions only; 0 keeps all.

        Returns:
            logits [B, n or S, V] and the present keys and values.
        """
        x = self.embed_tokens(input_ids)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.config.learned_positions:
            x = x + self.embed_positions(positions_of(attention_mask, input_ids.shape[1]))
        ropes = self.config.ropes
        presents: Past = []
        for layer, layer_config, layer_past in zip(self.layers, self.config.layers, past, strict=True):
            index = None if layer_config.rope is None else ropes.index(layer_config.rope)
            tables = (None, None) if index is None else (getattr(self, f"cos_{index}"), getattr(self, f"sin_{index}"))
            x, present = layer(x, layer_past, attention_mask, *tables)
            presents.append(present)
        x = self.norm(x[:, -num_logits_to_keep:] if num_logits_to_keep else x)
        if self.config.head_mix:
            x = self.head_mix(x)
        logits: Tensor = self.lm_head(x)
        return logits, presents

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights as float32, one at a time; also for a decoder that was made on the meta device."""
        for name, parameter in list(self.named_parameters()):
            module, _, attribute = name.rpartition(".")
            loaded = nn.Parameter(weights[name].to(torch.float32), requires_grad=parameter.requires_grad)
            setattr(self.get_submodule(module), attribute, loaded)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._set_tables()

    def empty_past(self, batch_size: int = 1, length: int = 0) -> Past:
        """Zeros in the shape of a cache of `length` tokens, on the device and in the type of the weights."""
        shape = (batch_size, self.config.num_key_value_heads, length, self.config.head_dim)
        like = self.embed_tokens.weight
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers]

    def _set_tables(self) -> None:
        for name, table in rotary_tables(self.config).items():
            self.register_buffer(name, table, persistent=False)


def rotary_tables(config: ModelConfig) -> dict[str, Tensor]:
    """Tables of all rotary positions, `cos_0`, `sin_0` and so on in the order of `config.ropes`; see `Rope.tables`."""
    tables = {}
    for index, rope in enumerate(config.ropes):
        tables[f"cos_{index}"], tables[f"sin_{index}"] = rope.tables(config.max_position_embeddings)
    return tables


def count_parameters(config: ModelConfig) -> int:
    """Number of weights, a tied output head counted once."""
    with torch.device("meta"):
        one = Decoder(dataclasses.replace(config, layers=config.layers[:1]))
    layer = sum(parameter.numel() for parameter in one.layers.parameters())
    return sum(parameter.numel() for parameter in one.parameters()) + (config.num_hidden_layers - 1) * layer
