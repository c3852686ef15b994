"""Attention over a KV cache in plain PyTorch, and the operator `llm_edge::cached_attention`, which traces keep whole.

Shapes: B batch, S new tokens, P past tokens, T = P + S, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionInputs(NamedTuple):
    """Arguments of rotary causal attention over a cache.

    Attributes:
        query: queries of the new tokens, [B, S, H * D]; if `key` and `value` are None, keys and values are packed
            after them, [B, S, (H + 2K) * D].
        key: keys of the new tokens, [B, S, K * D].
        value: values of the new tokens, [B, S, K * D].
        past_key: rotated keys of the past tokens, [B, K, P, D].
        past_value: values of the past tokens, [B, K, P, D].
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
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    past_key: Tensor
    past_value: Tensor
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
        attended values [B, S, H * D], present keys and present values [B, K, T, D].
    """
    query, key, value, past_key, past_value, attention_mask, cos, sin, num_heads, num_kv_heads, *_ = inputs
    batch, length, width = query.shape
    head_dim = past_key.shape[3]
    if key is None or value is None:
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, width - (num_heads + num_kv_heads) * head_dim]
        query, key, value = torch.split(query, sizes, dim=-1)
    query, key, value = (x.reshape(batch, length, -1, head_dim).transpose(1, 2) for x in (query, key, value))
    if cos is not None and sin is not None:
        positions = positions_of(attention_mask, length)
        if inputs.long_from:
            positions = positions + (positions.max() >= inputs.long_from).long() * (cos.shape[0] // 2)
        query, key = (_rotate(x, cos[positions], sin[positions]) for x in (query, key))
    if inputs.growth_length:
        query = query * _growth(positions_of(attention_mask, length), inputs)[:, None, :, None]
    key = torch.cat([past_key, key], dim=2)  # [B, K, T, D]
    value = torch.cat([past_value, value], dim=2)

    slots = torch.arange(attention_mask.shape[1], device=query.device)
    new_slots = slots[past_key.shape[2] :, None]  # [S, 1]
    visible = (slots <= new_slots) & attention_mask[:, None, None, :].bool()  # [B, 1, S, T]
    if inputs.window:
        visible = visible & (slots > new_slots - inputs.window)
    visible = visible | (slots == new_slots)  # padding attends to itself, so that its softmax is finite
    if inputs.softcap:
        attended = _capped_attention(query, key, value, visible, inputs.scale, inputs.softcap)
    else:
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=inputs.scale, enable_gqa=True
        )  # [B, H, S, D]
    return attended.transpose(1, 2).reshape(batch, length, num_heads * head_dim), key, value


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
            _capped_attention(query, key, value, _causal_mask(query, window), scale, softcap)
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


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, softcap: float
) -> Tensor:
    """Return attended values [B, H, S, D] with bounded scores; `visible` is bool [..., S, T]."""
    batch, num_kv_heads, _, head_dim = key.shape
    grouped = query.reshape(batch, num_kv_heads, -1, query.shape[2], head_dim)  # [B, K, H / K, S, D]
    key, value = key.unsqueeze(2), value.unsqueeze(2)
    scores = torch.tanh((grouped * scale) @ key.transpose(3, 4) / softcap) * softcap  # [B, K, H / K, S, T]
    attended = scores.masked_fill(~visible.unsqueeze(-3), -torch.inf).softmax(-1) @ value
    return attended.reshape(query.shape)


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


def _operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Check the shape of the mask and compute `attention`."""
    inputs = AttentionInputs(*arguments)
    expected = (inputs.query.shape[0], inputs.past_key.shape[2] + inputs.query.shape[1])
    if inputs.attention_mask.shape != expected:
        raise ValueError(
            f"attention_mask has the shape {tuple(inputs.attention_mask.shape)}, past and new tokens require {expected}"
        )
    return attention(inputs)


# The operator's schema is derived from a signature: its parameters are the fields of AttentionInputs.
_operator.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
        for name, annotation in get_type_hints(AttentionInputs).items()
    ],
    return_annotation=tuple[Tensor, Tensor, Tensor],
)
cached_attention = torch.library.custom_op("llm_edge::cached_attention", _operator, mutates_args=())


@cached_attention.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the right shapes, for tracing."""
    inputs = AttentionInputs(*arguments)
    batch, length, _ = inputs.query.shape
    head_dim = inputs.past_key.shape[-1]
    present = (batch, inputs.num_kv_heads, inputs.attention_mask.shape[1], head_dim)
    return (
        inputs.query.new_empty(batch, length, inputs.num_heads * head_dim),
        inputs.past_key.new_empty(present),
        inputs.past_value.new_empty(present),
    )
