"""Attention over a KV cache: plain PyTorch, registered as the one operator with ONNX forms of its own (`graph.py`).

Shapes as in `model.py`: B batch, S new tokens, P past tokens, T = P + S, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    attention_mask: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    long_from: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary causal attention over a cache.

    Args:
        query: queries of the new tokens, [B, S, H * D]; without `key` and `value` these are packed behind them,
            [B, S, (H + 2K) * D].
        key: keys of the new tokens, [B, S, K * D].
        value: values of the new tokens, [B, S, K * D].
        past_key: rotated keys so far, [B, K, P, D].
        past_value: values so far, [B, K, P, D].
        attention_mask: 1 where a slot of past and new tokens counts, 0 where it is padding, int64 [B, T].
        cos: cosines of the rotary angles, [max positions, rotated part of D / 2], see `Rope.tables`; None does not
            rotate.
        sin: sines, like `cos`.
        num_heads: H.
        num_kv_heads: K.
        scale: factor of query · key.
        window: tokens a position attends to, itself included; 0 for all before it.
        long_from: where a text has more positions than this, the tables' second half counts; 0 where there is none.

    Returns:
        attended values [B, S, H * D], present keys and present values [B, K, T, D].
    """
    batch, length, width = query.shape
    head_dim = past_key.shape[3]
    if key is None or value is None:
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, width - (num_heads + num_kv_heads) * head_dim]
        query, key, value = torch.split(query, sizes, dim=-1)
    query, key, value = (x.reshape(batch, length, -1, head_dim).transpose(1, 2) for x in (query, key, value))
    if cos is not None and sin is not None:
        positions = positions_of(attention_mask, length)
        if long_from:
            positions = positions + (positions.max() >= long_from).long() * (cos.shape[0] // 2)
        query, key = (_rotate(x, cos[positions], sin[positions]) for x in (query, key))
    key = torch.cat([past_key, key], dim=2)  # [B, K, T, D]
    value = torch.cat([past_value, value], dim=2)

    slots = torch.arange(attention_mask.shape[1], device=query.device)
    new_slots = slots[past_key.shape[2] :, None]  # [S, 1]
    visible = (slots <= new_slots) & attention_mask[:, None, None, :].bool()  # [B, 1, S, T]
    if window:
        visible = visible & (slots > new_slots - window)
    visible = visible | (slots == new_slots)  # a padding row sees itself, so that its softmax is finite
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2).reshape(batch, length, num_heads * head_dim), key, value


def positions_of(attention_mask: Tensor, length: int) -> Tensor:
    """Positions [B, S] of the last `length` tokens: how many tokens that count stand before each."""
    counted = (attention_mask.cumsum(1) - 1).clamp(min=0)
    slots = torch.arange(length, device=counted.device) + (attention_mask.shape[1] - length)
    return counted.index_select(1, slots)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head's first part; x [B, heads, S, D], cos and sin [B, S, part / 2]."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@torch.library.custom_op("llm_edge::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    attention_mask: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    long_from: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention` as an operator, which a trace keeps whole."""
    if attention_mask.shape != (query.shape[0], past_key.shape[2] + query.shape[1]):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, "
            f"past and input make {(query.shape[0], past_key.shape[2] + query.shape[1])}"
        )
    attended, present_key, present_value = attention(
        query, key, value, past_key, past_value, attention_mask, cos, sin,
        num_heads, num_kv_heads, scale, window, long_from,
    )  # fmt: skip
    return attended, present_key, present_value


@cached_attention.register_fake
def _(
    query: Tensor,
    key: Tensor | None,  # noqa: ARG001
    value: Tensor | None,  # noqa: ARG001
    past_key: Tensor,
    past_value: Tensor,
    attention_mask: Tensor,
    cos: Tensor | None,  # noqa: ARG001
    sin: Tensor | None,  # noqa: ARG001
    num_heads: int,
    num_kv_heads: int,
    scale: float,  # noqa: ARG001
    window: int,  # noqa: ARG001
    long_from: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _ = query.shape
    head_dim = past_key.shape[-1]
    present = (batch, num_kv_heads, attention_mask.shape[1], head_dim)
    return (
        query.new_empty(batch, length, num_heads * head_dim),
        past_key.new_empty(present),
        past_value.new_empty(present),
    )
