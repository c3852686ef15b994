"""Replaces functions and methods of transformers' modeling modules while one step of a model is traced or computed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from llm_edge.exporter.general import functions, modules
from llm_edge.exporter.general.cache import step

_MISSING = object()


def _window_mask(_: Callable[..., Any]) -> Callable[..., Any]:
    def mask(config: Any, inputs_embeds: Tensor, *_: Any, **__: Any) -> functions.Window | Tensor:
        size = config.sliding_window
        return functions.Window(size) if step().operator else functions.window_mask(inputs_embeds, size)

    return mask


def _chunk_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    def mask(config: Any, *given: Any, **named: Any) -> Any:
        return functions.Chunk(config.attention_chunk_size) if step().operator else original(config, *given, **named)

    return mask


_FUNCTIONS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "create_sliding_window_causal_mask": _window_mask,
    "create_chunked_causal_mask": _chunk_mask,
    "create_recurrent_attention_mask": functions.recurrent_mask,
    "apply_mask_to_padding_states": lambda _: functions.mask_padding,
    "causal_conv1d_fn": functions.convolution,
    "torch_chunk_gated_delta_rule": lambda _: functions.delta_rule,
    "chunk_kimi_delta_attention": lambda _: functions.delta_rule,
    "mamba2_chunk_scan": lambda _: functions.scan_heads,
    "mamba_selective_scan": lambda _: functions.scan_channels,
}
"""Functions of transformers' modeling modules by name, and what replaces them during a step."""

_INDEXED = ("axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4")

_ATTRIBUTES: dict[tuple[str, str, str], Any] = {
    **{(architecture, "", "min"): torch.sym_min for architecture in _INDEXED},  # of a constant and a symbolic size
    ("dbrx", "DbrxExperts", "forward"): modules.dbrx_experts,
    ("deepseek_v2", "", "apply_rotary_emb"): modules.rotate_pairs(1),
    ("deepseek_v2", "torch", "polar"): modules.polar,
    ("gemma3n", "Gemma3nTextMLP", "_gaussian_topk"): modules.gaussian_topk,
    ("jetmoe", "JetMoeMoA", "map"): modules.jetmoe_queries,
    ("jetmoe", "JetMoeMoA", "reduce"): modules.jetmoe_outputs,
    ("jetmoe", "JetMoeMoE", "forward"): modules.jetmoe_experts,
    ("llama4", "", "apply_rotary_emb"): modules.rotate_pairs(2),
    ("llama4", "torch", "polar"): modules.polar,
}
"""Attributes of single modeling modules, or of what they contain, and what replaces them."""

_ATTRIBUTES_IN_STEPS: dict[tuple[str, str, str], Any] = {
    ("gpt_neo", "GPTNeoSelfAttention", "_attn"): modules.neo_attention,
    ("gpt_neox_japanese", "GPTNeoXJapaneseAttention", "_attn"): modules.japanese_attention,
    ("llama4", "Llama4TextAttention", "attn_temperature_tuning"): property(lambda _: False),  # see `attend`
    ("minimax", "", "MiniMaxCache"): Cache,
    ("minimax", "MiniMaxLightningAttention", "forward"): modules.lightning_attention,
    ("minimax_m3_vl", "MiniMaxM3VLIndexer", "build_block_mask"): modules.minimax_mask,
    ("minimax_m3_vl", "MiniMaxM3VLIndexer", "forward"): modules.minimax_selected,
    ("recurrent_gemma", "RecurrentGemmaRecurrentBlock", "forward"): modules.recurrent_block,
    ("zaya", "ZayaCCAProjection", "forward"): modules.convolved_projection,
    ("recurrent_gemma", "RecurrentGemmaRglru", "_rnn_scan"): modules.recurrent_scan,
    ("recurrent_gemma", "SqrtBoundDerivative", "apply"): torch.sqrt,
}
"""Likewise, for what needs the `Step` of a call."""


def _modules(model: nn.Module) -> set[Any]:
    return {sys.modules[type(module).__module__] for module in model.modules() if ".models." in type(module).__module__}


def reads_convolutions(model: nn.Module) -> bool:
    """Return whether a model's convolutions are calls of a function that is replaced."""
    return any(hasattr(module, "causal_conv1d_fn") for module in _modules(model))


@contextlib.contextmanager
def replaced(model: nn.Module, *, in_step: bool = True) -> Iterator[None]:
    """Replace the functions that the modules of a model call; without a step only those that do not need it."""
    attributes = _ATTRIBUTES | _ATTRIBUTES_IN_STEPS if in_step else _ATTRIBUTES
    undo: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    try:
        for module in _modules(model):
            for name, make in _FUNCTIONS.items():
                if in_step and name in vars(module):
                    replace(module, name, make(getattr(module, name)))
            for (architecture, owner, name), value in attributes.items():
                if module.__name__.endswith(f".modeling_{architecture}"):
                    replace(getattr(module, owner) if owner else module, name, value)
        yield
    finally:
        for owner, name, value in reversed(undo):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
