"""What replaces methods of single architectures that a trace cannot follow or that onnxruntime cannot run."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_edge.exporter.general.cache import step
from llm_edge.exporter.general.functions import UnsupportedModelError, attend, find_gate, mask_padding, valid_tokens
from llm_edge.model.attention import positions_of
from llm_edge.model.experts import experts
from llm_edge.model.recurrence import causal_convolution, linear_attention, new_tokens

_NOTHING_KEPT = -1e4  # whose exponential is 0


def gaussian_topk(self: Any, inputs: Tensor) -> Tensor:
    """Compute Gemma 3n's activation sparsity with a constant quantile: ONNX has no inverse of erf."""
    quantile = statistics.NormalDist().inv_cdf(self.activation_sparsity)
    deviation = inputs.std(dim=-1, keepdim=True, unbiased=False)
    return F.relu(inputs - (inputs.mean(dim=-1, keepdim=True) + deviation * quantile))


# ---- rotary positions as complex numbers, which ONNX lacks


def polar(magnitude: Tensor, angle: Tensor) -> Tensor:
    """Return real and imaginary parts, [..., 2]."""
    return torch.stack([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)


def rotate_pairs(heads: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a function that rotates pairs of neighbours in queries and keys, whose heads are this dimension."""

    def rotate(query: Tensor, key: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = frequencies.unsqueeze(heads).unbind(-1)
        pairs = ((x[..., ::2], x[..., 1::2]) for x in (query, key))
        query, key = (torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2) for a, b in pairs)
        return query, key

    return rotate


# ---- attention


def japanese_attention(self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, None]:
    """Attend in GPT-NeoX Japanese; [B, H, S, D]."""
    return attend(self, query, key, value, scaling=1 / self.norm_factor)[0].transpose(1, 2), None


def neo_attention(self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, None]:
    """Attend in GPT-Neo, whose local layers have a window; [B, H, S, D]."""
    window = self.config.window_size if self.attention_type == "local" else None
    return attend(self, query, key, value, scaling=1.0, sliding_window=window)[0].transpose(1, 2), None


def minimax_selected(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: Any,
    positions: Tensor,
) -> Tensor:
    """Return whether tokens are in a block that MiniMax M3 selects for a query, [B, heads of the index, S, T].

    Blocks are the first columns of a matrix of T columns: ONNX files must not compute the sizes of tensors.
    """
    query, key = (
        norm(project(hidden_states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        for norm, project in ((self.q_norm, self.q_proj), (self.k_norm, self.k_proj))
    )
    cos, sin = (each[..., : self.head_dim] for each in position_embeddings)
    query, key = vars(sys.modules[type(self).__module__])["apply_rotary_pos_emb"](query, key, cos, sin)
    key = past_key_values.layers[self.layer_idx].update_index(key)
    slots = torch.arange(key.shape[2], device=key.device)
    scores = (query @ key.transpose(-1, -2)).masked_fill(slots > positions[:, None, :, None], -torch.inf)
    blocks = (slots // self.block_size).expand_as(scores)
    largest = torch.full_like(scores, -torch.inf).scatter_reduce(-1, blocks, scores, "amax")
    distance = positions[:, None, :, None] // self.block_size - slots
    largest = largest.masked_fill((distance >= 0) & (distance < self.local_blocks), torch.inf)
    top, chosen = largest.topk(torch.sym_min(self.topk_blocks, key.shape[2]), -1)  # type: ignore[no-untyped-call]
    counts = torch.zeros_like(scores).scatter_add(-1, chosen, (top > -torch.inf).to(scores.dtype))
    return counts.gather(-1, blocks) > 0


def minimax_mask(self: Any, selected: Tensor, *_: Any) -> Tensor:
    """Return what is added to the scores of MiniMax M3's queries, [B, heads, S, T]."""
    positions = positions_of(step().attention_mask, selected.shape[2])[:, None, :, None]
    visible = selected & (torch.arange(selected.shape[3], device=selected.device) <= positions)
    masked = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    return masked.repeat_interleave(self.config.num_attention_heads // selected.shape[1], 1)


# ---- experts


def dbrx_experts(self: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Apply all of DBRX's experts, whose projections are one matrix each, to tokens [N, 1, H]; [N, 1, H]."""
    width = self.ffn_hidden_size
    inner = self.mlp.activation_fn(F.linear(x, self.mlp.w1)) * F.linear(x, self.mlp.v1)
    shares = F.one_hot(chosen, self.num_experts).to(x.dtype) * weights[..., None]  # [N, k, E]
    inner = inner.reshape(*x.shape[:-1], -1, width) * shares.sum(-2).reshape(*x.shape[:-1], -1, 1)
    output: Tensor = inner.flatten(-2) @ self.mlp.w2
    return output


def jetmoe_experts(self: Any, x: Tensor) -> Tensor:
    """Apply JetMoE's experts to tokens [B, S, H]."""
    tokens = x.flatten(0, 1)
    chosen, weights = _jetmoe_route(self.router, tokens)
    gate = find_gate(lambda probe: self.activation(probe.chunk(2, -1)[0]) * probe.chunk(2, -1)[1], {}, gated=True)
    up, down = self.input_linear.weight, self.output_linear.weight
    applied: Tensor = experts(tokens, chosen, weights, up, None, down, None, False, *gate)
    output: Tensor = applied.reshape(x.shape) + self.bias
    return output


def jetmoe_queries(self: Any, x: Tensor) -> tuple[Tensor, None, tuple[Tensor, Tensor]]:
    """Project tokens [B, S, H] to the queries of their chosen experts, [B, S, k, D]."""
    tokens = x.flatten(0, 1)
    chosen, weights = _jetmoe_route(self.router, tokens)
    weight = self.input_linear.weight  # [E, D, H]
    queries = (weight.flatten(0, 1) @ tokens.T).reshape(*weight.shape[:2], -1)  # [E, D, N]
    chosen_queries = F.one_hot(chosen, weight.shape[0]).to(x.dtype) @ queries.permute(2, 0, 1)  # [N, k, D]
    return chosen_queries.reshape(*x.shape[:2], self.top_k, -1), None, (chosen, weights)


def jetmoe_outputs(self: Any, attended: Tensor, route: tuple[Tensor, Tensor]) -> Tensor:
    """Project what the queries attended to, [B, S, k, D], by their experts; [B, S, H]."""
    chosen, weights = route
    weight = self.output_linear.weight  # [E, H, D]
    shares = F.one_hot(chosen, weight.shape[0]).to(attended.dtype) * weights[..., None]  # [N, k, E]
    of_experts = shares.transpose(1, 2) @ attended.flatten(0, 1)  # [N, E, D]
    outputs = (weight @ of_experts.permute(1, 2, 0)).sum(0)  # [H, N]
    output: Tensor = outputs.T.reshape(*attended.shape[:2], -1) + self.bias
    return output


def _jetmoe_route(router: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chosen experts of tokens [N, H] and their weights, [N, k]."""
    top, chosen = router.layer(tokens).topk(router.top_k, dim=1)
    return chosen, top.softmax(1)


# ---- states that are not in layers of transformers' cache, or not as those of other models


def states_outside_of_cache(model: Any, cache: Any) -> dict[int, dict[str, Tensor]]:
    """Return the convolution's and other state by layer, after a step, and clear those that modules keep.

    The convolution's has all columns that are to be kept.
    """
    found: dict[int, dict[str, Tensor]] = {}
    kind = model.config.model_type
    if kind == "minimax":
        found = {number: {"state": each} for number, each in enumerate(cache.linear_cache) if isinstance(each, Tensor)}
    elif kind == "zaya":
        for number, layer in enumerate(cache.layers):
            found[number] = {"convolution": layer.conv_states[0], "state": layer.recurrent_states[0]}
    elif kind == "recurrent_gemma":
        for number, block in enumerate(layer.temporal_block for layer in model.model.layers):
            if hasattr(block, "rg_lru"):
                found[number] = {"convolution": block.conv1d_state, "state": block.rg_lru.recurrent_states}
                block.conv1d_state = block.rg_lru.recurrent_states = None
    return found


def lightning_attention(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Compute MiniMax's linear attention, which decays by a constant of each head, over tokens [B, S, H]."""
    layer = step().next_state_layer()
    inputs = mask_padding(self.act_fn(self.qkv_proj(hidden_states)))
    heads = inputs.reshape(*inputs.shape[:2], self.num_attention_heads, -1)
    query, key, value = torch.split(heads, self.head_dim, dim=3)
    decay = -self.slope_rate[:, 0, 0] * valid_tokens(hidden_states)  # [B, S, heads]
    output, layer.states[0] = linear_attention(query, key, value, decay, None, layer.states[0], 1.0)
    gated = self.output_gate(hidden_states).sigmoid() * self.norm(output.flatten(2))
    return self.out_proj(gated), None


def convolved_projection(
    self: Any, hidden_states: Tensor, past_key_values: Any, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens [B, S, H] to ZAYA's queries, keys and values, [B, S, heads, D]."""
    if self.v_proj_delayed.bias is not None:
        raise UnsupportedModelError("its projection of delayed values has a bias")
    layer, x = past_key_values.layers[self.layer_idx], mask_padding(hidden_states)
    queries, keys = self.q_proj(x), self.k_proj(x)
    shape, groups = (*x.shape[:2], -1, self.head_dim), self.num_key_value_groups
    query_rest = (queries.reshape(shape) + keys.reshape(shape).repeat_interleave(groups, 2)) / 2
    key_rest = query_rest.reshape(*shape[:3], groups, self.head_dim).mean(3)
    count = new_tokens(step().attention_mask, x.shape[1])

    past = layer.convolutions[0]  # [B, C, W - 1]
    joined = torch.cat([past, torch.cat([queries, keys], -1).transpose(1, 2)], -1)
    columns = count[:, None] + torch.arange(past.shape[2], device=x.device)
    layer.convolutions[0] = joined.gather(2, columns[:, None].expand(-1, past.shape[1], -1))
    mixed = _convolve(_convolve(joined, self.conv_qk_depthwise), self.conv_qk_grouped).transpose(1, 2)
    query, key = mixed[..., : queries.shape[2]], mixed[..., queries.shape[2] :]

    delayed = torch.cat([layer.states[0][:, None], self.v_proj_delayed(x)], 1)  # [B, 1 + S, C]
    layer.states[0] = delayed.gather(1, count[:, None, None].expand(-1, 1, delayed.shape[2])).squeeze(1)
    value = torch.cat([self.v_proj_current(x), delayed[:, :-1]], -1)
    return query.reshape(shape) + query_rest, key.reshape(shape) + key_rest, value.reshape(shape)


def _convolve(x: Tensor, module: Any) -> Tensor:
    """Convolve [B, C, T] within groups of channels, without padding, by products of matrices."""
    groups, width = module.groups, module.kernel_size[0]
    length, weight = x.shape[2] - width + 1, module.weight.reshape(groups, -1, *module.weight.shape[1:])
    by_group = x.reshape(x.shape[0], groups, -1, x.shape[2])
    products = [weight[..., tap] @ by_group[..., tap : tap + length] for tap in range(width)]
    total: Tensor = torch.stack(products).sum(0).flatten(1, 2) + module.bias[:, None]
    return total


def recurrent_block(self: Any, input_states: Tensor, position_ids: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Compute RecurrentGemma's recurrent block over tokens [B, S, H]."""
    layer, unit = step().next_state_layer(), self.rg_lru
    x, weight, bias = self.linear_x(input_states).transpose(1, 2), self.conv_1d.weight.squeeze(1), self.conv_1d.bias
    x, layer.convolutions[0] = causal_convolution(
        x, weight, bias, layer.convolutions[0], step().attention_mask, False
    )  # [B, C, S]
    unit.recurrent_states = layer.states[0]
    x = unit(x.transpose(1, 2), position_ids)
    layer.states[0], unit.recurrent_states = unit.recurrent_states, None
    return self.linear_out(x * self.act_fn(self.linear_y(input_states))), None


def recurrent_scan(
    self: Any,  # noqa: ARG001
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute RecurrentGemma's recurrence over [B, S, C] as linear attention with a head of one number per channel."""
    valid = valid_tokens(hidden_states)
    decay = (recurrent_gate * ~reset).log().clamp(min=_NOTHING_KEPT) * valid
    values = (hidden_states * valid)[..., None]
    ones = torch.ones_like(values)
    output, state = linear_attention(ones, ones, values, decay, None, recurrent_states[..., None, None], 1.0)
    return output.squeeze(3), state.flatten(1)
