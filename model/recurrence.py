"""Layers with a state of fixed size in plain PyTorch, and their operators, which traces keep whole.

Shapes: B batch, S new tokens, T past and new tokens, C channels, W width of a convolution, H heads, D size of a key
head, E size of a value head. Rows of unequal length are padded on the right, where in a step of several tokens no past
tokens may precede, as in fused graphs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_edge.model.operator import define_operator


class ConvolutionInputs(NamedTuple):
    """Arguments of a causal depthwise convolution over the new tokens and the inputs of the last past ones.

    Attributes:
        x: inputs of the new tokens, [B, C, S].
        weight: [C, W].
        bias: [C], or None.
        state: inputs of the last past tokens, [B, C, W - 1].
        attention_mask: 1 for tokens, 0 for padding, int64 [B, T].
        silu: apply SiLU to the output.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor
    attention_mask: Tensor
    silu: bool


def convolution(inputs: ConvolutionInputs) -> tuple[Tensor, Tensor]:
    """Return the output [B, C, S] and the new state [B, C, W - 1]."""
    x, weight, bias, state, attention_mask, silu = inputs
    whole = torch.cat([state, x], dim=-1)
    output = F.conv1d(whole, weight.unsqueeze(1), bias, groups=x.shape[1])
    columns = new_tokens(attention_mask, x.shape[2])[:, None] + torch.arange(state.shape[2], device=x.device)
    kept = whole.gather(2, columns[:, None].expand(-1, x.shape[1], -1))
    return (F.silu(output) if silu else output), kept


def new_tokens(attention_mask: Tensor, length: int) -> Tensor:
    """Return how many of the `length` new slots of each row hold tokens, int64 [B]."""
    return attention_mask.sum(1).clamp(max=length)


def _fake_convolution(inputs: ConvolutionInputs) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs.x), torch.empty_like(inputs.state)


class LinearAttentionInputs(NamedTuple):
    """Arguments of linear attention, whose state [D, E] of each head decays and is updated by each token.

    With a state M, a token with log decay g, key k and value v makes it exp(g) M + k vᵀ or, with a factor beta (the
    gated delta rule, arXiv:2412.06464), exp(g) M + beta k (v - exp(g) Mᵀ k)ᵀ. Its output is scale Mᵀ q.

    Attributes:
        query: [B, S, H, D].
        key: [B, S, H, D].
        value: [B, S, H, E].
        decay: g, [B, S, H], or [B, S, H, D] for each row of the state; 0 on padding.
        beta: [B, S, H], 0 on padding; None without delta rule, then values of padding are 0.
        state: [B, H, D, E].
        scale: factor of the output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    beta: Tensor | None
    state: Tensor
    scale: float


def linear_recurrence(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    """Return the output [B, S, H, E] and the new state [B, H, D, E]."""
    query, key, value, decay, beta, state, scale = inputs
    state, kept, outputs = state.clone(), decay.exp(), []
    for token in range(query.shape[1]):
        state = state * kept[:, token].reshape(*state.shape[:2], -1, 1)
        k, update = key[:, token, :, :, None], value[:, token]
        if beta is not None:
            update = beta[:, token, :, None] * (update - (state * k).sum(2))
        state = state + k * update[:, :, None]
        outputs.append((state * query[:, token, :, :, None]).sum(2) * scale)
    return torch.stack(outputs, dim=1), state


def _fake_linear_attention(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs.value), torch.empty_like(inputs.state)


causal_convolution = define_operator("causal_convolution", ConvolutionInputs, 2, convolution, _fake_convolution)
linear_attention = define_operator(
    "linear_attention", LinearAttentionInputs, 2, linear_recurrence, _fake_linear_attention
)
