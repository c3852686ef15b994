"""`GeneralDecoder`: a causal language model of transformers with the signature of `model.decoder.Decoder`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from llm_edge.exporter.general.cache import HybridLayer, KeyValueLayer, StateLayer, Step
from llm_edge.exporter.general.functions import (
    IMPLEMENTATION,
    KeysChangedError,
    UnsupportedModelError,
    short_reason,
)
from llm_edge.exporter.general.modules import states_outside_of_cache
from llm_edge.exporter.general.replacements import reads_convolutions, replaced
from llm_edge.model.attention import positions_of
from llm_edge.runtime.model_shape import CacheTensor

_CACHE_NAMES = ("past_key_values", "cache_params")
"""Of the cache as an argument and in the outputs of transformers' models."""

_INDEX_NAMES = ("indexer_keys", "idx_keys")
"""Of the keys in a layer of the cache that select tokens, [B, T, D] and [B, 1, T, D]."""


class AttentionMode(Enum):
    """How the attention of a model reads the cache.

    OPERATOR: by the operator `cached_attention`, from the cache.
    WHOLE: by that operator, from keys and values that the model computes from what is cached, as with latents.
    OWN: the model's own code.
    """

    OPERATOR = "operator"
    WHOLE = "whole"
    OWN = "own"


class GeneralDecoder(nn.Module):
    """A causal language model of transformers over an explicit cache.

    Args:
        model: transformers' model.
        mode: how its attention reads the cache.

    Attributes:
        caches: what each layer keeps.
    """

    def __init__(self, model: Any, mode: AttentionMode = AttentionMode.OPERATOR) -> None:
        super().__init__()
        self.model = model
        self.mode = mode
        self.caches = cache_layout(model)
        if model._can_set_experts_implementation():
            model.set_experts_implementation(IMPLEMENTATION)
        model.set_attn_implementation("eager" if mode is AttentionMode.OWN else IMPLEMENTATION)
        self.windows: tuple[int, ...] = ()  # of the caches of all layers, after a step; 0 for all tokens
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._cache_name = next((name for name in _CACHE_NAMES if name in parameters), _CACHE_NAMES[0])
        self._reads_convolutions = reads_convolutions(model)
        ends = {id(model.get_input_embeddings()): "embed_tokens", id(model.get_output_embeddings()): "lm_head"}
        self._renamed = {path: ends[id(module)] for path, module in model.named_modules() if id(module) in ends}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[list[Tensor]]
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """Run S new tokens; see `model.decoder.Decoder`. `past` has the tensors of each layer in `caches`."""
        whole = self.mode is not AttentionMode.OPERATOR
        layers = [_layer(*each, attention_mask, whole=whole) for each in zip(self.caches, past, strict=True)]
        positions = {}
        if self._takes_positions:
            positions["position_ids"] = positions_of(attention_mask, input_ids.shape[1])
        step = Step(
            layers,
            attention_mask,
            input_ids.shape[1],
            operator=self.mode is not AttentionMode.OWN,
            reads_convolutions=self._reads_convolutions,
        )
        with step, replaced(self.model):
            logits: Tensor = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=True,
                **{self._cache_name: step.cache},
                **positions,
            ).logits
        self.windows = tuple(_window(layer) for layer in layers)
        return logits, [_tensors(layer) for layer in layers]

    def public_name(self, path: str) -> str:
        """Return the name of a parameter or module, as graphs and weights have it, for its path in this module.

        The token embedding and the output head have the names that they have in our own decoder; all others lack the
        prefix of the base model.
        """
        inner = path.removeprefix("model.")
        for module, name in (
            (self.model.get_input_embeddings(), "embed_tokens"),
            (self.model.get_output_embeddings(), "lm_head"),
        ):
            for known, each in self.model.named_modules():
                if each is module and (inner == known or inner.startswith(f"{known}.")):
                    return name + inner[len(known) :]
        return inner.removeprefix(f"{self.model.base_model_prefix}.")

    def empty_past(self, batch_size: int = 1, length: int = 0) -> list[list[Tensor]]:
        """Return a cache of `length` zero tokens and empty states."""
        like = next(self.model.parameters())
        return [[like.new_zeros(batch_size, *tensor.sized(length)) for tensor in layer] for layer in self.caches]


def general_decoder(model: Any) -> GeneralDecoder:
    """Return the decoder of transformers' model, in the first mode in which its attention finds what it needs.

    The model may be on the meta device.

    Raises:
        UnsupportedModelError: there is none.
    """
    reason: UnsupportedModelError | None = None
    for mode in AttentionMode:
        decoder = GeneralDecoder(model, mode).eval()
        device = next(model.parameters()).device
        tokens = torch.ones(1, 3, dtype=torch.int64, device=device)
        past = decoder.empty_past()
        try:
            with torch.no_grad():
                _, present = decoder(tokens, tokens, past)
        except KeysChangedError:
            continue
        except Exception as error:
            if isinstance(error, UnsupportedModelError):
                reason = error
            if mode is AttentionMode.OWN:
                raise reason or UnsupportedModelError(f"it cannot use this cache ({short_reason(error)})") from error
            continue
        pairs = [
            (kind, old, new)
            for kinds, *tensors in zip(decoder.caches, past, present, strict=True)
            for kind, old, new in zip(kinds, *tensors, strict=True)
        ]
        if not any(kind.grows and old is new for kind, old, new in pairs):
            return decoder
    raise reason or UnsupportedModelError("its attention does not read the cache")


def cache_layout(model: Any) -> list[list[CacheTensor]]:
    """Return what each layer of a model keeps, found in a step over a few tokens; also on the meta device.

    Leaves the model with its own implementations of attention and experts.
    """
    model.set_attn_implementation("eager")
    device = next(model.parameters()).device
    experts = model.config._experts_implementation if model._can_set_experts_implementation() else None
    if experts is not None:
        model.set_experts_implementation("batched_mm")  # the default needs bfloat16 on the meta device
    with torch.no_grad(), replaced(model, in_step=False):
        cache = _created_cache(model, torch.ones(1, 3, dtype=torch.int64, device=device))
    elsewhere = states_outside_of_cache(model, cache)
    layout = []
    for number in range(max([len(cache.layers), *(each + 1 for each in elsewhere)])):
        layer: Any = cache.layers[number] if number < len(cache.layers) else None
        found: list[CacheTensor] = []
        if getattr(layer, "keys", None) is not None:
            for name, tensor in (("key", layer.keys), ("value", layer.values)):
                found.append(CacheTensor(f"{number}.{name}", (tensor.shape[1], tensor.shape[3]), grows=True))
        index = next((tensor for name in _INDEX_NAMES if (tensor := getattr(layer, name, None)) is not None), None)
        if index is not None:
            found.append(CacheTensor(f"{number}.index", (1, index.shape[-1]), grows=True))
        if isinstance(layer, LinearAttentionCacheLayerMixin) and number not in elsewhere:
            for index, state in layer.conv_states.items():
                width = layer.conv_kernel_size[index]
                if state is not None and width is not None:
                    shape = (state.shape[1], width - 1)
                    found.append(CacheTensor(f"{number}.convolution.{index}", shape, grows=False))
            for index, state in layer.recurrent_states.items():
                if state is not None:
                    found.append(CacheTensor(f"{number}.state.{index}", tuple(state.shape[1:]), grows=False))
        for name, state in elsewhere.get(number, {}).items():
            found.append(CacheTensor(f"{number}.{name}.0", tuple(state.shape[1:]), grows=False))
        layout.append(found)
    return layout


def _created_cache(model: Any, tokens: Tensor) -> Cache:
    """Return the cache that a model fills in a step over tokens [B, S]."""
    outputs = model(input_ids=tokens, use_cache=True)
    cache: Any = next(filter(None, (getattr(outputs, name, None) for name in _CACHE_NAMES)), None)
    if cache is None and _CACHE_NAMES[0] in inspect.signature(model.forward).parameters:  # it is not returned
        cache = DynamicCache(config=model.config)
        model(input_ids=tokens, use_cache=True, past_key_values=cache)
    if cache is None:
        raise UnsupportedModelError("it has no cache")
    if not isinstance(cache, Cache):
        raise UnsupportedModelError("its cache is not one of transformers' layers")
    return cache


def _layer(
    kinds: Sequence[CacheTensor], tensors: Sequence[Tensor], attention_mask: Tensor, *, whole: bool
) -> KeyValueLayer | StateLayer:
    """Return a layer of the cache over its tensors."""
    named = list(zip([kind.name.split(".")[1] for kind in kinds], tensors, strict=True))
    grown = [tensor for kind, tensor in named if kind in ("key", "value")]
    index = dict(named).get("index")
    convolutions = [tensor for kind, tensor in named if kind == "convolution"]
    states = [tensor for kind, tensor in named if kind == "state"]
    if not grown:
        return StateLayer(convolutions, states)
    past = (grown[0], grown[1])
    if convolutions or states:
        return HybridLayer(past, attention_mask, convolutions, states, whole=whole)
    return KeyValueLayer(past, attention_mask, index, whole=whole)


def _window(layer: KeyValueLayer | StateLayer) -> int:
    """Return the window of all attention that reads a layer of the cache; 0 if some of it reads all tokens."""
    found = layer.windows if isinstance(layer, KeyValueLayer) else set()
    return max(found, default=0) if all(found) else 0


def _tensors(layer: KeyValueLayer | StateLayer) -> list[Tensor]:
    """Return the tensors of a layer after a step, in the order of `cache_layout`."""
    grown = layer.present if isinstance(layer, KeyValueLayer) else ()
    index = [layer.index] if isinstance(layer, KeyValueLayer) and layer.index is not None else []
    fixed = (*layer.convolutions, *layer.states) if isinstance(layer, StateLayer) else ()
    return [*grown, *index, *fixed]
