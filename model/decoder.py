"""The reference decoder: plain PyTorch with an explicit KV cache. Exported graphs are verified against it.

Shapes: B batch, S new tokens, P past tokens, T = P + S, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from llm_edge.model import activations
from llm_edge.model.attention import (
    AttentionInputs,
    Documents,
    PackedInputs,
    attention,
    cached_attention,
    packed_attention,
    positions_of,
)
from llm_edge.model.config import LayerConfig, ModelConfig, Norm, QKNorm, QueryGrowth
from llm_edge.model.rope import Rope

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, each [B, K, P, D]; P may be 0."""

RunLayer = Callable[..., Tensor]
"""Calls a function with the arguments that follow it."""

_NO_GROWTH = QueryGrowth(0.0, 0)


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm is Norm.RMS:
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(
        config.hidden_size, config.norm_eps, elementwise_affine=config.norm_weight, bias=config.norm_bias
    )


class Attention(nn.Module):
    """Attention with packed query, key and value projections; see `Decoder` for `standalone`."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, standalone: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.window = layer.window if layer.window and layer.window < config.max_position_embeddings else 0
        self.standalone = standalone
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
        """Map x [B, S, hidden] to the same shape, and return the layer's present keys and values."""
        query, key, value = self._normalize(self.qkv(x))
        config, rope, growth = self.config, self.layer.rope, self.config.query_growth or _NO_GROWTH
        inputs = AttentionInputs(
            query, key, value, *past, mask, cos, sin,
            config.num_attention_heads, config.num_key_value_heads, config.scale, self.window,
            long_from=rope.long_from if rope is not None else 0,
            softcap=config.attention_softcap or 0.0, growth_rate=growth.rate, growth_length=growth.length, sinks=None,
        )  # fmt: skip
        attended, *present = attention(inputs) if self.standalone else cached_attention(*inputs)
        return self.output(attended), (present[0], present[1])

    def forward_packed(self, x: Tensor, documents: Documents, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Map x [S, hidden], a row of documents, to the same shape; see `Decoder.forward_packed`."""
        config, growth = self.config, self.config.query_growth or _NO_GROWTH
        query, key, value = self._normalize(self.qkv(x))
        packed = query if key is None or value is None else torch.cat([query, key, value], dim=-1)
        inputs = PackedInputs(
            packed, documents, cos, sin,
            config.num_attention_heads, config.num_key_value_heads, config.scale, self.window,
            softcap=config.attention_softcap or 0.0, growth_rate=growth.rate, growth_length=growth.length,
        )  # fmt: skip
        output: Tensor = self.output(packed_attention(inputs))
        return output

    def _normalize(self, packed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return queries, keys and values [B, S, heads * D] after their norms; without norms, packed in the first."""
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
    """Feed-forward network: gated (SwiGLU and variants, arXiv:2002.05202; gate and up are packed) or plain."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.intermediate_size
        self.gated = config.gated_mlp
        self.activation = activations.FUNCTIONS[config.activation]
        if self.gated:
            self.gate_up = nn.Linear(config.hidden_size, 2 * self.width, bias=config.mlp_bias)
        else:
            self.up = nn.Linear(config.hidden_size, self.width, bias=config.mlp_bias)
        self.down = nn.Linear(self.width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, S, hidden] to the same shape."""
        if self.gated:
            gate, up = torch.split(self.gate_up(x), [self.width, self.width], dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(self.up(x))
        down: Tensor = self.down(inner)
        return down


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, standalone: bool = False) -> None:
        super().__init__()
        self.parallel = config.parallel_blocks
        self.shared_norm = config.shared_norm
        self.attention_norm = _norm(config) if config.pre_norm else nn.Identity()
        self.attention = Attention(config, layer, standalone=standalone)
        self.attention_post_norm = _norm(config) if config.post_norm else nn.Identity()
        self.mlp_norm = _norm(config) if config.pre_norm and not config.shared_norm else nn.Identity()
        self.mlp = FeedForward(config)
        self.mlp_post_norm = _norm(config) if config.post_norm else nn.Identity()

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor], mask: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map x [B, S, hidden] to the same shape, and return the layer's present keys and values."""
        normalized = self.attention_norm(x)
        attended, present = self.attention(normalized, past, mask, cos, sin)
        return self._after_attention(x, normalized, attended), present

    def forward_packed(self, x: Tensor, documents: Documents, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Map x [S, hidden], a row of documents, to the same shape; see `Decoder.forward_packed`."""
        normalized = self.attention_norm(x)
        attended = self.attention.forward_packed(normalized, documents, cos, sin)
        return self._after_attention(x, normalized, attended)

    def _after_attention(self, x: Tensor, normalized: Tensor, attended: Tensor) -> Tensor:
        after = x + self.attention_post_norm(attended)
        inner = self.mlp(normalized if self.shared_norm else self.mlp_norm(x if self.parallel else after))
        output: Tensor = after + self.mlp_post_norm(inner)
        return output


class CappedHead(nn.Linear):
    """Output head with bounded logits, see `ModelConfig.logit_softcap`."""

    def __init__(self, hidden_size: int, vocab_size: int, softcap: float) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.softcap = softcap

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., hidden] to logits [..., V]."""
        return torch.tanh(super().forward(x) / self.softcap) * self.softcap


class Decoder(nn.Module):
    """The whole model. Its parameter names are the names of the ONNX initializers.

    A tied output head shares the weight of the embedding.

    Args:
        config: shape of the model.
        standalone: compute attention in plain PyTorch instead of by the registered operator, so that a trace of this
            module does not depend on this package.
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
        if config.logit_softcap is None:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        else:
            self.lm_head = CappedHead(config.hidden_size, config.vocab_size, config.logit_softcap)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.set_rotary_tables()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Past, num_logits_to_keep: int = 0
    ) -> tuple[Tensor, Past]:
        """Run S new tokens.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, T], see `AttentionInputs`. Sequences of unequal length are padded on the right.
            past: one pair per layer, as returned by the previous step (`empty_past` before the first).
            num_logits_to_keep: return logits of the last n positions only; 0 keeps all.

        Returns:
            logits [B, n or S, V] and the present keys and values.
        """
        x = self.embed(self.embed_tokens(input_ids), attention_mask)
        presents: Past = []
        for index, layer_past in zip(range(len(self.layers)), past, strict=True):
            x, present = self.run_layer(index, x, layer_past, attention_mask)
            presents.append(present)
        logits: Tensor = self.lm_head(self.normalize(x[:, -num_logits_to_keep:] if num_logits_to_keep else x))
        return logits, presents

    def forward_packed(self, input_ids: Tensor, documents: Documents, run: RunLayer | None = None) -> Tensor:
        """Run a row of packed documents for training: differentiable, without a cache.

        Args:
            input_ids: int64 [S].
            documents: of the row.
            run: calls `Layer.forward_packed` of a layer with its arguments, to checkpoint the layers; None calls it.

        Returns:
            output of the last layer, [S, hidden]; the input of the head is its `normalize`.
        """
        device = input_ids.device
        x = self._embed(self.embed_tokens(input_ids), lambda: documents.positions(device))
        angles: dict[Rope | None, tuple[Tensor | None, Tensor | None]] = {None: (None, None)}
        for number, rope in enumerate(self.config.ropes):
            rows = documents.rotary_rows(rope.long_from, self.config.max_position_embeddings, device)
            angles[rope] = getattr(self, f"cos_{number}")[rows], getattr(self, f"sin_{number}")[rows]
        for index, layer in enumerate(self.layers):
            forward = cast("Layer", layer).forward_packed
            arguments = (x, documents, *angles[self.config.layers[index].rope])
            x = forward(*arguments) if run is None else run(forward, *arguments)
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Return the input of the output head for the output [..., hidden] of the last layer."""
        x = self.norm(x)
        return self.head_mix(x) if self.config.head_mix else x

    def embed(self, token_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the input of the first layer, [B, S, hidden]: scaled token embeddings and learned positions."""
        return self._embed(token_embeddings, lambda: positions_of(attention_mask, token_embeddings.shape[1]))

    def _embed(self, x: Tensor, positions: Callable[[], Tensor]) -> Tensor:
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.config.learned_positions:
            x = x + self.embed_positions(positions())
        return x

    def run_layer(
        self, index: int, x: Tensor, past: tuple[Tensor, Tensor], attention_mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run one layer over x [B, S, hidden]; returns the same shape, and the layer's present keys and values."""
        rope = self.config.layers[index].rope
        number = None if rope is None else self.config.ropes.index(rope)
        tables = (None, None) if number is None else (getattr(self, f"cos_{number}"), getattr(self, f"sin_{number}"))
        result: tuple[Tensor, tuple[Tensor, Tensor]] = self.layers[index](x, past, attention_mask, *tables)
        return result

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load all weights as float32, one at a time; also into a decoder created on the meta device."""
        self.load_parameters(weights, [name for name, _ in self.named_parameters()])
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.set_rotary_tables()

    def load_parameters(self, weights: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Replace some parameters by their weights as float32, one at a time."""
        for name in names:
            module, _, attribute = name.rpartition(".")
            parameter = self.get_parameter(name)
            loaded = nn.Parameter(weights[name].to(torch.float32), requires_grad=parameter.requires_grad)
            setattr(self.get_submodule(module), attribute, loaded)

    def empty_past(self, batch_size: int = 1, length: int = 0) -> Past:
        """Return a cache of `length` zero tokens, on the device and in the dtype of the weights."""
        shape = (batch_size, self.config.num_key_value_heads, length, self.config.head_dim)
        like = self.embed_tokens.weight
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers]

    def set_rotary_tables(self) -> None:
        """Compute the rotary tables; a decoder created on the meta device has none."""
        for name, table in rotary_tables(self.config).items():
            self.register_buffer(name, table, persistent=False)


def rotary_tables(config: ModelConfig) -> dict[str, Tensor]:
    """Return the rotary tables `cos_0`, `sin_0` and so on in the order of `config.ropes`; see `Rope.tables`."""
    tables = {}
    for index, rope in enumerate(config.ropes):
        tables[f"cos_{index}"], tables[f"sin_{index}"] = rope.tables(config.max_position_embeddings)
    return tables


def count_parameters(config: ModelConfig) -> int:
    """Return the number of weights, counting a tied output head once."""
    with torch.device("meta"):
        first_layer_only = Decoder(dataclasses.replace(config, layers=config.layers[:1]))
    per_layer = sum(parameter.numel() for parameter in first_layer_only.layers.parameters())
    total = sum(parameter.numel() for parameter in first_layer_only.parameters())
    return total + (config.num_hidden_layers - 1) * per_layer
