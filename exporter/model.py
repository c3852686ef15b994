"""The reference decoder: plain PyTorch with an explicit KV cache. Knows nothing of files, ONNX or quantization.

Shapes: B batch, S new tokens, P past tokens, T = P + S, H query heads, K key/value heads, D head size,
V vocabulary. Everything the exporter proves is proven against this module.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_edge.exporter.config import ModelConfig

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, both [B, K, P, D]; P may be 0."""


@torch.library.custom_op("llm_edge::cached_attention", mutates_args=())
def cached_attention(
    qkv: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary causal attention over a cache: the one operator with two ONNX forms (see `graph.py`).

    Args:
        qkv: packed query, key and value projections of the new tokens, [B, S, (H + 2K) * D].
        past_key: rotated keys so far, [B, K, P, D].
        past_value: values so far, [B, K, P, D].
        attention_mask: 1 where a slot of past and new tokens counts, 0 where it is padding, [B, T].
        cos: cosines of the rotary angles, [max positions, D / 2] (RoFormer, arXiv:2104.09864; half-split form).
        sin: sines, like `cos`.
        num_heads: H.
        num_kv_heads: K.

    Returns:
        attended values [B, S, H * D], present keys and present values [B, K, T, D].
    """
    batch, length, _ = qkv.shape
    head_dim = past_key.shape[-1]
    total = past_key.shape[2] + length
    if attention_mask.shape != (batch, total):
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, past and input make {(batch, total)}")

    heads = qkv.view(batch, length, num_heads + 2 * num_kv_heads, head_dim).transpose(1, 2)  # [B, H + 2K, S, D]
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -length:]  # [B, S]
    query, key = (_rotate(x, cos[positions], sin[positions]) for x in (query, key))
    key = torch.cat([past_key, key], dim=2)  # [B, K, T, D]
    value = torch.cat([past_value, value], dim=2)

    slots = torch.arange(total, device=qkv.device)
    new_slots = slots[-length:, None]  # [S, 1]
    visible = (slots <= new_slots) & attention_mask[:, None, None, :].bool()  # [B, 1, S, T]
    visible = visible | (slots == new_slots)  # a padding row sees itself, so that its softmax is finite
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    return attended.transpose(1, 2).reshape(batch, length, num_heads * head_dim), key, value


@cached_attention.register_fake
def _(
    qkv: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    attention_mask: Tensor,
    cos: Tensor,  # noqa: ARG001
    sin: Tensor,  # noqa: ARG001
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _ = qkv.shape
    head_dim = past_key.shape[-1]
    present = (batch, num_kv_heads, attention_mask.shape[1], head_dim)
    return (
        qkv.new_empty(batch, length, num_heads * head_dim),
        past_key.new_empty(present),
        past_value.new_empty(present),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head; x [B, heads, S, D], cos and sin [B, S, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, both float32 [max positions, D / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Packed projections around `cached_attention`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.qkv = nn.Linear(config.hidden_size, config.query_size + 2 * config.key_value_size, bias=False)
        self.output = nn.Linear(config.query_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor], mask: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, S, hidden] -> the same shape, and the layer's present keys and values."""
        attended, key, value = cached_attention(self.qkv(x), *past, mask, cos, sin, self.num_heads, self.num_kv_heads)
        return self.output(attended), (key, value)


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202) with gate and up packed into one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.intermediate_size
        self.gate_up = nn.Linear(config.hidden_size, 2 * self.width, bias=False)
        self.down = nn.Linear(self.width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, hidden] -> the same shape."""
        gate, up = torch.split(self.gate_up(x), [self.width, self.width], dim=-1)
        down: Tensor = self.down(F.silu(gate) * up)
        return down


class Layer(nn.Module):
    """One decoder layer, pre-normalised (RMSNorm, arXiv:1910.07467)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor], mask: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, S, hidden] -> the same shape, and the layer's present keys and values."""
        attended, present = self.attention(self.attention_norm(x), past, mask, cos, sin)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), present


class Decoder(nn.Module):
    """The whole model. Its parameter names are the names of the ONNX initializers.

    A tied output head is the embedding itself: `lm_head` then has no weight of its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

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
        presents: Past = []
        for layer, layer_past in zip(self.layers, past, strict=True):
            x, present = layer(x, layer_past, attention_mask, self.cos, self.sin)
            presents.append(present)
        x = self.norm(x[:, -num_logits_to_keep:] if num_logits_to_keep else x)
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
        self.cos, self.sin = rotary_tables(self.config)

    def empty_past(self, batch_size: int = 1, length: int = 0) -> Past:
        """Zeros in the shape of a cache of `length` tokens, on the device and in the type of the weights."""
        shape = (batch_size, self.config.num_key_value_heads, length, self.config.head_dim)
        return [(self.norm.weight.new_zeros(shape), self.norm.weight.new_zeros(shape)) for _ in self.layers]
