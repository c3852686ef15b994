"""What transformers' modules call instead of their own attention, experts, convolutions and recurrences.

All are the operators of `llm_edge.model`, whose ONNX forms onnxruntime computes with one kernel each.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llm_edge.exporter.general.cache import step
from llm_edge.model.attention import cached_attention
from llm_edge.model.config import Activation
from llm_edge.model.experts import ExpertsInputs, Gate, experts
from llm_edge.model.recurrence import causal_convolution, linear_attention, new_tokens

IMPLEMENTATION = "llm_edge"
"""Name of the functions for attention and experts in transformers' registries."""


class UnsupportedModelError(Exception):
    """The model does something that has no form here; the message says what."""


class KeysChangedError(Exception):
    """Attention got keys that no cache handed out: the model computes them from what it caches."""


class _Window:
    """In place of the mask of sliding-window attention: some models express the window by the mask alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, _: object) -> _Window:
        """Return the same for a part of the queries."""
        return self


# ---- attention


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _Window | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """Attend from queries [B, H, S, D] to the keys and values of the layer that handed them out; [B, S, H, E]."""
    current = step()
    if isinstance(attention_mask, _Window):
        sliding_window, attention_mask = attention_mask.size, None
    if attention_mask is not None:
        raise UnsupportedModelError("its attention has a mask of its own")
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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    flat = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
    attended, present_key, present_value = cached_attention(
        *flat, *past, current.attention_mask, None, None,
        query.shape[1], key.shape[1], float(scale), int(sliding_window or 0),
        0, float(softcap or 0), 0.0, 0, s_aux,
    )  # fmt: skip
    if layer is not None and layer.present is layer.past:
        layer.present = present_key, present_value
    return attended.unflatten(2, (query.shape[1], -1)), None


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
    gate = vars(module).get("_llm_edge_gate") or _find_gate(module)
    vars(module)["_llm_edge_gate"] = gate
    down, transposed = module.down_proj, module.is_transposed
    return ExpertsInputs(x, chosen, weights.to(x.dtype), up, up_bias, down, down_bias, transposed, *gate)


def are_experts(module: nn.Module) -> bool:
    """Return whether a module is one of experts whose weights are stacked."""
    return hasattr(module, "has_post_expert_norm")


def _find_gate(module: Any) -> Gate:
    """Return what reproduces a module's activation on random numbers."""
    numbers = vars(module.config) | vars(module)
    gated: bool = module.has_gate
    limits = [0.0, *(float(numbers[name]) for name in ("limit", "swiglu_limit") if numbers.get(name))]
    slopes = [1.0, *(float(numbers[name]) for name in ("alpha", "swiglu_alpha") if numbers.get(name))]
    choices: list[Sequence[Any]] = [[each.value for each in Activation], [False], [1.0], [0.0], [0.0]]
    if gated:
        choices[1:] = [False, True], slopes, [0.0, 1.0], limits
    generator = torch.Generator().manual_seed(0)
    with _outside_of_traces(), torch.no_grad():
        probe = torch.randn(4, 64, generator=generator) * 3 * max(1.0, *limits)
        wanted = (module._apply_gate if gated else module.act_fn)(probe)
        for activation, interleaved, slope, offset, limit in itertools.product(*choices):
            gate = Gate(activation, gated, interleaved, slope, offset, limit)
            if torch.allclose(gate.apply(probe), wanted):
                return gate
    raise UnsupportedModelError("the activation of its experts is unknown")


@contextlib.contextmanager
def _outside_of_traces() -> Iterator[None]:
    """Compute with real tensors while a model is traced with fake ones."""
    with torch._C._DisableTorchDispatch():
        yield


# ---- states


def _convolution(original: Callable[..., Any]) -> Callable[..., Any]:
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


def _delta_rule(
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
    """Compute the gated delta rule over [B, S, H, D]."""
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    repeats = value.shape[2] // key.shape[2]
    if repeats > 1:
        query, key = (x.repeat_interleave(repeats, 2) for x in (query, key))
    valid = _valid(query)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    assert initial_state is not None
    output: tuple[Tensor, Tensor] = linear_attention(
        query, key, value, g * valid, beta * valid, initial_state, float(factor)
    )
    return output


def _selective_scan(
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
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit) * _valid(dt)
    repeats = x.shape[2] // B.shape[2]
    key, query = (each.repeat_interleave(repeats, 2) for each in (B, C))
    assert initial_states is not None
    state = initial_states.transpose(2, 3)
    output, state = linear_attention(query, key, x * dt[..., None], A * dt, None, state, 1.0)
    return (output if D is None else output + x * D[:, None]), state.transpose(2, 3)


def _valid(x: Tensor) -> Tensor:
    """Return which of the new tokens of x [B, S, …] are not padding, float [B, S, 1]."""
    slots = torch.arange(x.shape[1], device=x.device)
    return (slots < new_tokens(step().attention_mask, x.shape[1])[:, None]).to(x.dtype)[..., None]


def _recurrent_mask(_: Callable[..., Any]) -> Callable[..., Any]:
    def mask(config: Any, inputs_embeds: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: ARG001
        return _valid(inputs_embeds)[..., 0]

    return mask


# ---- installing them


def _window_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    def mask(config: Any, *given: Any, **named: Any) -> Any:
        return _Window(config.sliding_window) if step().operator else original(config, *given, **named)

    return mask


def _chunk_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    def mask(config: Any, *given: Any, **named: Any) -> Any:
        if step().operator:
            raise UnsupportedModelError("it attends within chunks")
        return original(config, *given, **named)

    return mask


_REPLACEMENTS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "create_sliding_window_causal_mask": _window_mask,
    "create_chunked_causal_mask": _chunk_mask,
    "create_recurrent_attention_mask": _recurrent_mask,
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": lambda _: _delta_rule,
    "mamba2_chunk_scan": lambda _: _selective_scan,
}
"""Functions of transformers' modeling modules by name, and what replaces them during a step."""


def _modules(model: nn.Module) -> set[Any]:
    return {sys.modules[type(module).__module__] for module in model.modules() if ".models." in type(module).__module__}


def reads_convolutions(model: nn.Module) -> bool:
    """Return whether a model's convolutions are calls of a function that is replaced."""
    return any(hasattr(module, "causal_conv1d_fn") for module in _modules(model))


@contextlib.contextmanager
def replaced(model: nn.Module) -> Iterator[None]:
    """Replace the functions that the modules of a model call."""
    undo: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, value)

    try:
        for module in _modules(model):
            for name, make in _REPLACEMENTS.items():
                if name in vars(module):
                    replace(module, name, make(getattr(module, name)))
            if hasattr(module, "Gemma3nTextMLP"):
                replace(module.Gemma3nTextMLP, "_gaussian_topk", _gaussian_topk)
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def _gaussian_topk(self: Any, inputs: Tensor) -> Tensor:
    """Compute Gemma 3n's activation sparsity with a constant quantile: ONNX has no inverse of erf."""
    quantile = statistics.NormalDist().inv_cdf(self.activation_sparsity)
    deviation = inputs.std(dim=-1, keepdim=True, unbiased=False)
    return F.relu(inputs - (inputs.mean(dim=-1, keepdim=True) + deviation * quantile))


AttentionInterface.register(IMPLEMENTATION, _attention)  # without a mask function of this name, masks stay None
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
