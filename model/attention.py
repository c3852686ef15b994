"""Attention over a KV cache in plain PyTorch, and the operator `llm_edge::cached_attention`, which traces keep whole.

Shapes: B batch, S new tokens, P past tokens, T = P + S, H query heads, K key/value heads, D head size, E size of a
value head, which differs from D only in the general route.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_edge.model.operator import define_operator


class AttentionInputs(NamedTuple):
    """Arguments of rotary causal attention over a cache.

    Attributes:
        query: queries of the new tokens, [B, S, H * D]; if `key` and `value` are None, keys and values are packed
            after them, [B, S, (H + 2K) * D].
        key: keys of the new tokens, [B, S, K * D]; of all T tokens if there is no `past_key`.
        value: values of the new tokens, [B, S, K * E]; of all T tokens if there is no `past_value`.
        past_key: rotated keys of the past tokens, [B, K, P, D]; None if the caller caches something else, from which it
            computes the keys and values of all tokens.
        past_value: values of the past tokens, [B, K, P, E], or None.
        attention_mask: 1 for tokens, 0 for padding, over past and new slots, int64 [B, T].
        cos: cosines of the rotary angles, [max positions, rotated part of D / 2], see `Rope.tables`; None disables
            rotation.
        sin: sines, like `cos`.
        num_heads: H.
        num_kv_heads: K.
        scale: factor of query · key.
        window: number of tokens a position attends to, including itself; 0 for all tokens before it.
        long_from: sequences with more positions than this use the second half of the tables; 0 if there is none.
        softcap: bound c of the scores, which become c * tanh(score / c); 0 for no bound.
        growth_rate: of queries by their position, see `QueryGrowth`.
        growth_length: likewise; 0 for no growth.
        sinks: logit of each head that takes part in the softmax without a value, [H], or None.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    past_key: Tensor | None
    past_value: Tensor | None
    attention_mask: Tensor
    cos: Tensor | None
    sin: Tensor | None
    num_heads: int
    num_kv_heads: int
    scale: float
    window: int
    long_from: int
    softcap: float
    growth_rate: float
    growth_length: int
    sinks: Tensor | None


@dataclass(frozen=True)
class Documents:
    """Documents that are packed into one row of S tokens and do not see each other; their positions start at 0.

    Attributes:
        lengths: number of tokens of each document, in the order of the row; their sum is S.
    """

    lengths: tuple[int, ...]

    def positions(self, device: torch.device) -> Tensor:
        """Return the position of each token in its document, int64 [S]."""
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])

    def rotary_rows(self, long_from: int, length: int, device: torch.device) -> Tensor:
        """Return the row of the rotary tables for each token, int64 [S].

        Documents of more than `long_from` tokens use the second half of the tables, which begins at row `length`; see
        `AttentionInputs.long_from`.
        """
        starts = [length if long_from and count > long_from else 0 for count in self.lengths]
        return torch.cat(
            [torch.arange(start, start + n, device=device) for start, n in zip(starts, self.lengths, strict=True)]
        )


class PackedInputs(NamedTuple):
    """Arguments of rotary causal attention within the documents of a row.

    Attributes:
        packed: queries, keys and values of the tokens, [S, (H + 2K) * D].
        documents: of the row.
        cos: cosine of each token's rotary angles, [S, rotated part of D / 2]; None disables rotation.
        sin: sines, like `cos`.
        num_heads: H.
        num_kv_heads: K.
        scale: factor of query · key.
        window: see `AttentionInputs`.
        softcap: see `AttentionInputs`.
        growth_rate: see `AttentionInputs`.
        growth_length: see `AttentionInputs`.
    """

    packed: Tensor
    documents: Documents
    cos: Tensor | None
    sin: Tensor | None
    num_heads: int
    num_kv_heads: int
    scale: float
    window: int
    softcap: float
    growth_rate: float
    growth_length: int


def attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Compute rotary causal attention over a cache.

    Returns:
        attended values [B, S, H * E], present keys [B, K, T, D] and values [B, K, T, E]; without past, [B, K, 0, …].
    """
    query, key, value, past_key, past_value, attention_mask, cos, sin, num_heads, num_kv_heads, *_ = inputs
    batch, length, width = query.shape
    if key is None or value is None:
        head_dim = width // (num_heads + 2 * num_kv_heads)
        query, key, value = torch.split(query, [n * head_dim for n in (num_heads, num_kv_heads, num_kv_heads)], dim=-1)
    query, key, value = (
        x.reshape(batch, x.shape[1], heads, -1).transpose(1, 2)
        for x, heads in ((query, num_heads), (key, num_kv_heads), (value, num_kv_heads))
    )
    if cos is not None and sin is not None:
        positions = positions_of(attention_mask, length)
        if inputs.long_from:
            positions = positions + (positions.max() >= inputs.long_from).long() * (cos.shape[0] // 2)
        query, key = (_rotate(x, cos[positions], sin[positions]) for x in (query, key))
    if inputs.growth_length:
        query = query * _growth(positions_of(attention_mask, length), inputs)[:, None, :, None]
    present = key[:, :, :0].clone(), value[:, :, :0].clone()
    if past_key is not None and past_value is not None:
        key = torch.cat([past_key, key], dim=2)  # [B, K, T, D]
        value = torch.cat([past_value, value], dim=2)
        present = key, value

    slots = torch.arange(attention_mask.shape[1], device=query.device)
    new_slots = slots[attention_mask.shape[1] - length :, None]  # [S, 1]
    visible = (slots <= new_slots) & attention_mask[:, None, None, :].bool()  # [B, 1, S, T]
    if inputs.window:
        visible = visible & (slots > new_slots - inputs.window)
    visible = visible | (slots == new_slots)  # padding attends to itself, so that its softmax is finite
    if inputs.softcap or inputs.sinks is not None:
        attended = explicit_attention(query, key, value, visible, inputs.scale, inputs.softcap, inputs.sinks)
    else:
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=inputs.scale, enable_gqa=True
        )  # [B, H, S, D]
    return attended.transpose(1, 2).flatten(2), *present


def packed_attention(inputs: PackedInputs) -> Tensor:
    """Compute rotary causal attention within each document of a row; differentiable, without a cache.

    Returns:
        attended values [S, H * D].
    """
    packed, documents, cos, sin, num_heads, num_kv_heads, scale, window, softcap, *_ = inputs
    length = packed.shape[0]
    heads = packed.reshape(1, length, num_heads + 2 * num_kv_heads, -1).transpose(1, 2)  # [1, heads, S, D]
    if cos is None or sin is None:
        query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    else:
        rotated, value = torch.split(heads, [num_heads + num_kv_heads, num_kv_heads], dim=1)
        query, key = torch.split(_rotate(rotated, cos[None], sin[None]), [num_heads, num_kv_heads], dim=1)
    if inputs.growth_length:
        query = query * _growth(documents.positions(query.device), inputs)[:, None]
    # One call per document: a mask over the whole row would cost the square of its length.
    lengths = list(documents.lengths)
    parts = list(zip(*(torch.split(x, lengths, dim=2) for x in (query, key, value)), strict=True))
    if softcap:
        capped = [
            explicit_attention(query, key, value, _causal_mask(query, window), scale, softcap)
            for query, key, value in parts
        ]
        return torch.cat(capped, dim=2).transpose(1, 2).reshape(length, -1)
    attended = [
        F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_window_mask(query, window),
            is_causal=not 0 < window < query.shape[2],
            scale=scale,
            enable_gqa=num_kv_heads != num_heads,
        )
        for query, key, value in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).reshape(length, -1)


def _growth(positions: Tensor, inputs: AttentionInputs | PackedInputs) -> Tensor:
    """Return the factors of queries at these positions."""
    return 1 + inputs.growth_rate * torch.log(1 + (positions // inputs.growth_length).to(inputs[0].dtype))


def _window_mask(query: Tensor, window: int) -> Tensor | None:
    """Return which positions see which, bool [L, L], or None if a window does not restrict a document of L tokens."""
    return _causal_mask(query, window) if 0 < window < query.shape[2] else None


def _causal_mask(query: Tensor, window: int) -> Tensor:
    """Return which positions of a document see which, bool [L, L]; a window of 0 does not restrict them."""
    length = query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    return seen.triu(1 - window) if 0 < window < length else seen


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return attended values [B, H, S, E] with bounded scores or sinks; `visible` is bool [..., S, T]."""
    batch, num_kv_heads, _, head_dim = key.shape
    grouped = query.reshape(batch, num_kv_heads, -1, query.shape[2], head_dim)  # [B, K, H / K, S, D]
    key, value = key.unsqueeze(2), value.unsqueeze(2)
    scores = (grouped * scale) @ key.transpose(3, 4)  # [B, K, H / K, S, T]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible.unsqueeze(-3), -torch.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.reshape(1, num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return (weights @ value).flatten(1, 2)


def positions_of(attention_mask: Tensor, length: int) -> Tensor:
    """Return the positions [B, S] of the last `length` slots: the number of tokens before each."""
    counted = (attention_mask.cumsum(1) - 1).clamp(min=0)
    slots = torch.arange(length, device=counted.device) + (attention_mask.shape[1] - length)
    return counted.index_select(1, slots)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the first part of each head; x [B, heads, S, D], cos and sin [B, S, part / 2]."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _checked(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Check the shape of the mask and compute `attention`."""
    new = (inputs.query if inputs.key is None else inputs.key).shape[1]
    past = 0 if inputs.past_key is None else inputs.past_key.shape[2]
    expected = (inputs.query.shape[0], past + new)
    if inputs.attention_mask.shape != expected:
        raise ValueError(
            f"attention_mask has the shape {tuple(inputs.attention_mask.shape)}, past and new tokens require {expected}"
        )
    return attention(inputs)


def _fake(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the right shapes, for tracing."""
    (batch, length, width), heads, kv_heads = inputs.query.shape, inputs.num_heads, inputs.num_kv_heads
    if inputs.key is None or inputs.value is None:
        key_size = value_size = width // (heads + 2 * kv_heads)
    else:
        key_size, value_size = inputs.key.shape[2] // kv_heads, inputs.value.shape[2] // kv_heads
    total = 0 if inputs.past_key is None else inputs.attention_mask.shape[1]
    return (
        inputs.query.new_empty(batch, length, heads * value_size),
        inputs.query.new_empty(batch, kv_heads, total, key_size),
        inputs.query.new_empty(batch, kv_heads, total, value_size),
    )


cached_attention = define_operator("cached_attention", AttentionInputs, 3, _checked, _fake)


class CacheInputs(NamedTuple):
    """Arguments of `append_to_cache`.

    Attributes:
        past: what a layer caches of the past tokens, [B, K, P, D].
        new: of the new tokens, [B, K, S, D].
        attention_mask: see `AttentionInputs`.
    """

    past: Tensor
    new: Tensor
    attention_mask: Tensor


def _append(inputs: CacheInputs) -> tuple[Tensor, Tensor]:
    """Return the cache after the new tokens twice, [B, K, T, D]: to keep and to read.

    They differ in a graph whose past and present share a buffer with room for more tokens.
    """
    whole = torch.cat([inputs.past, inputs.new], dim=2)
    return whole, whole.clone()  # an operator's outputs must not be the same tensor


def _fake_append(inputs: CacheInputs) -> tuple[Tensor, Tensor]:
    batch, heads, _, size = inputs.new.shape
    shape = (batch, heads, inputs.attention_mask.shape[1], size)
    return inputs.new.new_empty(shape), inputs.new.new_empty(shape)


append_to_cache = define_operator("append_to_cache", CacheInputs, 2, _append, _fake_append)
