"""What transformers' modules call instead of their own attention, experts, convolutions and recurrences.

All are the operators of `llm_edge.model`, whose ONNX forms onnxruntime computes with one kernel each.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llm_edge.exporter.general.cache import step
from llm_edge.model.attention import cached_attention, explicit_attention, positions_of
from llm_edge.model.config import Activation
from llm_edge.model.experts import ExpertsInputs, Gate, experts
from llm_edge.model.recurrence import causal_convolution, linear_attention, new_tokens

IMPLEMENTATION = "llm_edge"
"""Name of the functions for attention and experts in transformers' registries."""


class UnsupportedModelError(Exception):
    """The model does something that has no form here; the message says what."""


class KeysChangedError(Exception):
    """Attention got keys that no cache handed out: the model computes them from what it caches."""


def short_reason(error: Exception) -> str:
    """Return an error of transformers or PyTorch in a line."""
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return f"which operations it needs depends on values ({error})"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class Window:
    """In place of the mask of sliding-window attention: some models express the window by the mask alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, _: object) -> Window:
        """Return the same for a part of the queries."""
        return self


class Chunk(Window):
    """In place of the mask of attention within chunks, whose first positions are multiples of their size."""


# ---- attention


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Window | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """Attend from queries [B, H, S, D] to the keys and values of the layer that handed them out; [B, S, H, E]."""
    current = step()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if vars(module).get("attn_temperature_tuning") and not getattr(module, "use_rope", False):
        query = query * _temperature(module, query.shape[2])
    if isinstance(attention_mask, Chunk):
        if current.owner(key) is not None:
            raise KeysChangedError
        return _attend_within_chunk(query, key, value, attention_mask.size, float(scale)), None
    if isinstance(attention_mask, Window):
        sliding_window, attention_mask = attention_mask.size, None
    if attention_mask is not None:
        raise UnsupportedModelError("its attention has a mask of its own")
    if given.get("block_indices") is not None:
        raise UnsupportedModelError("its attention selects blocks of tokens")
    if given.get("position_bias") is not None:
        raise UnsupportedModelError("its attention has a bias by position")
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError("its attention is not causal")
    layer = current.owner(key)
    past = (None, None) if layer is None else layer.past
    if layer is not None and layer.new is not None and layer.new[1] is not value:
        raise KeysChangedError
    if layer is None and not all(each.whole for each in current.cache.layers if hasattr(each, "whole")):
        raise KeysChangedError
    flat = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
    attended, present_key, present_value = cached_attention(
        *flat, *past, current.attention_mask, None, None,
        query.shape[1], key.shape[1], float(scale), int(sliding_window or 0),
        0, float(softcap or 0), 0.0, 0, s_aux,
    )  # fmt: skip
    if layer is not None:
        layer.windows.add(int(sliding_window or 0))
    if layer is not None and layer.present is layer.past:
        layer.present = present_key, present_value
    return attended.unflatten(2, (query.shape[1], -1)), None


def window_mask(like: Tensor, size: int) -> Tensor:
    """Return what a model's own attention adds to its scores [B, heads, S, T] in a window, [B, 1, S, T].

    transformers' own mask takes the past of all rows for equally long.
    """
    mask = step().attention_mask
    positions = positions_of(mask, like.shape[1])[:, None, :, None]
    slots = torch.arange(mask.shape[1], device=mask.device)
    visible = (slots <= positions) & (slots > positions - size)
    return torch.where(visible, 0.0, torch.finfo(like.dtype).min).to(like.dtype)


def _attend_within_chunk(query: Tensor, key: Tensor, value: Tensor, size: int, scale: float) -> Tensor:
    """Attend to the tokens of a query's own chunk, among keys and values of all tokens; [B, S, H, E]."""
    positions = positions_of(step().attention_mask, query.shape[2])[:, None, :, None]
    slots = torch.arange(key.shape[2], device=key.device)
    visible = (slots <= positions) & (slots // size == positions // size)
    attended: Tensor = explicit_attention(query, key, value, visible, scale, 0.0)
    return attended.transpose(1, 2)


def _temperature(module: Any, length: int) -> Tensor:
    """Return Llama 4's factor of queries at the positions of the new tokens, [B, 1, S, 1]."""
    positions = positions_of(step().attention_mask, length)[:, None, :, None]
    steps = ((positions + 1) // module.floor_scale).float()
    return 1 + torch.log1p(steps) * float(module.attn_scale)


# ---- experts


def _experts(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Apply a module of experts to tokens [N, H]."""
    result: Tensor = experts(*experts_inputs(module, x, chosen, weights))
    return result


def experts_inputs(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> ExpertsInputs:
    """Return what a module of experts computes from tokens [N, H], their experts, and the weights of these [N, k]."""
    if module.has_post_expert_norm:
        raise UnsupportedModelError("its experts have a norm of their own")
    up_bias = down_bias = None
    up = module.gate_up_proj if module.has_gate else module.up_proj
    if module.has_bias:
        up_bias, down_bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias, module.down_proj_bias
    gate = vars(module).get("_llm_edge_gate")
    if gate is None:
        apply = module._apply_gate if module.has_gate else module.act_fn
        gate = find_gate(apply, vars(module.config) | vars(module), gated=module.has_gate)
        vars(module)["_llm_edge_gate"] = gate
    down, transposed = module.down_proj, module.is_transposed
    return ExpertsInputs(x, chosen, weights.to(x.dtype), up, up_bias, down, down_bias, transposed, *gate)


def are_experts(module: nn.Module) -> bool:
    """Return whether a module is one of experts whose weights are stacked."""
    return hasattr(module, "has_post_expert_norm")


_ROUNDING = 1e-4  # of activations, which depends on strides; GELU and its tanh approximation differ by 2e-3


def find_gate(apply: Callable[[Tensor], Tensor], numbers: Mapping[str, Any], *, gated: bool) -> Gate:
    """Return what reproduces a function on random numbers, where `numbers` may have its limits and slopes."""
    limits = [0.0, *(float(numbers[name]) for name in ("limit", "swiglu_limit") if numbers.get(name))]
    slopes = [1.0, *(float(numbers[name]) for name in ("alpha", "swiglu_alpha") if numbers.get(name))]
    choices: list[Sequence[Any]] = [[each.value for each in Activation], [False], [1.0], [0.0], [0.0]]
    if gated:
        choices[1:] = [False, True], slopes, [0.0, 1.0], limits
    generator = torch.Generator().manual_seed(0)
    with outside_of_traces(), torch.no_grad():
        probe = torch.randn(4, 64, generator=generator) * 3 * max(1.0, *limits)
        wanted = apply(probe)
        for activation, interleaved, slope, offset, limit in itertools.product(*choices):
            gate = Gate(activation, gated, interleaved, slope, offset, limit)
            if torch.allclose(gate.apply(probe), wanted, rtol=_ROUNDING, atol=_ROUNDING):
                return gate
    raise UnsupportedModelError("the activation of its experts is unknown")


@contextlib.contextmanager
def outside_of_traces() -> Iterator[None]:
    """Compute with real tensors while a model is traced with fake ones."""
    with torch._C._DisableTorchDispatch():
        yield


# ---- states


def convolution(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what convolves inputs that `update_conv_state` returned by the operator, and others as before."""

    def convolve(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **given: Any
    ) -> Any:
        found = step().convolved.get(id(x))
        if found is None:
            return original(x, weight, bias, activation=activation, **given)
        layer, number = found
        if activation not in (None, "silu", "swish"):
            raise UnsupportedModelError(f"its convolution has the activation {activation}")
        state, mask = layer.convolutions[number], step().attention_mask
        output, layer.convolutions[number] = causal_convolution(x, weight, bias, state, mask, activation is not None)
        return output

    return convolve


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    scale: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the gated delta rule over [B, S, H, D]; g is [B, S, H], or [B, S, H, D] for a decay of each channel."""
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    repeats = value.shape[2] // key.shape[2]
    if repeats > 1:
        query, key = (x.repeat_interleave(repeats, 2) for x in (query, key))
    valid = valid_tokens(query)
    decay = g * (valid if g.ndim == 3 else valid[..., None])
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    assert initial_state is not None
    output: tuple[Tensor, Tensor] = linear_attention(
        query, key, value, decay, beta * valid, initial_state, float(factor)
    )
    return output


def scan_heads(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 (transformers' names)
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    chunk_size: int = 0,  # noqa: ARG001
    D: Tensor | None = None,  # noqa: N803
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute Mamba 2's scan of x [B, S, H, E] as linear attention with B for keys and C for queries."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit) * valid_tokens(dt)
    repeats = x.shape[2] // B.shape[2]
    key, query = (each.repeat_interleave(repeats, 2) for each in (B, C))
    assert initial_states is not None
    state = initial_states.transpose(2, 3)
    output, state = linear_attention(query, key, x * dt[..., None], A * dt, None, state, 1.0)
    return (output if D is None else output + x * D[:, None]), state.transpose(2, 3)


def scan_channels(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute Mamba's scan of x [B, C, S] as linear attention with a head for each channel and values of one number.

    transformers passes no initial state: it is that of the layer whose convolution was last.
    """
    dt = dt if delta_bias is None else dt + delta_bias[:, None]
    x_by_token, dt = x.transpose(1, 2), (F.softplus(dt) if delta_softplus else dt).transpose(1, 2)  # [B, S, C]
    dt = dt * valid_tokens(dt)
    same = x.new_ones(x.shape[1], 1)
    key, query = (each.transpose(1, 2)[:, :, None] * same for each in (B, C))  # [B, S, C, N]
    state = step().next_state()
    output, state = linear_attention(
        query, key, (x_by_token * dt)[..., None], A * dt[..., None], None, state[..., None], 1.0
    )
    output = output.squeeze(3).transpose(1, 2)
    output = output if D is None else output + x * D[:, None]
    return (output if z is None else output * F.silu(z)), state.squeeze(3)


def valid_tokens(x: Tensor) -> Tensor:
    """Return which of the new tokens of x [B, S, …] are not padding, float [B, S, 1]."""
    slots = torch.arange(x.shape[1], device=x.device)
    return (slots < new_tokens(step().attention_mask, x.shape[1])[:, None]).to(x.dtype)[..., None]


def mask_padding(x: Tensor, _: Tensor | None = None) -> Tensor:
    """Return [B, S, C] with zeros for padding."""
    return x * valid_tokens(x)


def recurrent_mask(_: Callable[..., Any]) -> Callable[..., Any]:
    """Return what masks the inputs of layers with a state, float [B, S]."""

    def mask(config: Any, inputs_embeds: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: ARG001
        return valid_tokens(inputs_embeds)[..., 0]

    return mask


AttentionInterface.register(IMPLEMENTATION, attend)  # without a mask function of this name, masks stay None
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
