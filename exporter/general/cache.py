"""The explicit cache that transformers' models read and write while one step of them is traced or computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from llm_edge.model.attention import append_to_cache


class KeyValueLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of a layer.

    Attributes:
        past: keys [B, K, P, D] and values [B, K, P, E] before the step.
        present: after it, [B, K, T, D] and [B, K, T, E].
        index: keys by which the tokens to attend to are selected, [B, 1, P, D], then [B, 1, T, D]; None without them.
        windows: of the attention that read it in the step; 0 for all tokens.
        whole: hand out the keys and values of all tokens, for models whose attention does not take them from here
            unchanged; otherwise those of the new tokens, for attention that reads the past itself.
    """

    is_compileable = False
    is_sliding = False

    def __init__(
        self, past: tuple[Tensor, Tensor], attention_mask: Tensor, index: Tensor | None = None, *, whole: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.past = self.present = past
        self.index = index
        self.whole = whole
        self.mask = attention_mask
        self.new: tuple[Tensor, Tensor] | None = None
        self.windows: set[int] = set()
        self.is_initialized = True

    def lazy_initialization(self, *_: Any) -> None:
        """Do nothing: the past exists."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the new tokens; return those to attend to, see `whole`."""
        if not self.whole:
            self.new = key_states, value_states
            return self.new
        past_key, past_value = self.past
        present_key, key = append_to_cache(past_key, key_states, self.mask)
        present_value, value = append_to_cache(past_value, value_states, self.mask)
        self.present = present_key, present_value
        return key, value

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Add the index of the new tokens, [B, S, D]; return that of all, [B, T, D]."""
        return self.update_index(indexer_key_states.unsqueeze(1)).squeeze(1)

    def update_index(self, idx_k: Tensor) -> Tensor:
        """Add the index of the new tokens, [B, 1, S, D]; return that of all, [B, 1, T, D]."""
        assert self.index is not None
        index: Tensor
        self.index, index = append_to_cache(self.index, idx_k, self.mask)
        return index

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Return the number of past and new tokens, and the first one."""
        return self.mask.shape[1], 0  # not from the past, whose buffer may have room for more tokens

    def get_seq_length(self) -> int:
        """Return the number of past tokens."""
        return step().past_length

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1


class StateLayer(LinearAttentionLayer):
    """States of fixed size of a layer.

    Attributes:
        convolutions: inputs of the last tokens of each convolution, [B, C, W - 1].
        states: the other states.
    """

    def __init__(self, convolutions: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        LinearAttentionLayer.__init__(self, max(1, len(convolutions), len(states)))
        self.convolutions, self.states = list(convolutions), list(states)
        self.record_past = True
        self.has_previous_state = dict.fromkeys(self.has_previous_state, True)
        self.conv_states = dict(enumerate(convolutions)) or {0: None}
        self.recurrent_states = dict(enumerate(states)) or {0: None}

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Return the inputs of a convolution over the new tokens.

        Where the convolution is an operator that reads the state itself, these are the new inputs only.
        """
        del conv_kernel_size  # known since the layer was created
        step().start_scan(self)
        past = self.convolutions[state_idx]
        if step().reads_convolutions:
            step().convolved[id(conv_states)] = self, state_idx
            step().alive.append(conv_states)
            return conv_states
        whole = torch.cat([past, conv_states], dim=-1)
        self.convolutions[state_idx] = whole[..., whole.shape[-1] - past.shape[-1] :]
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep a new state."""
        self.states[state_idx] = recurrent_states
        return recurrent_states


class HybridLayer(StateLayer, KeyValueLayer):  # type: ignore[override, no-untyped-call]
    """A layer with keys and values as well as states."""

    def __init__(
        self,
        past: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        convolutions: Sequence[Tensor],
        states: Sequence[Tensor],
        *,
        whole: bool,
    ) -> None:
        KeyValueLayer.__init__(self, past, attention_mask, whole=whole)
        StateLayer.__init__(self, convolutions, states)


class _StepCache(Cache):
    def __init__(self, layers: Sequence[KeyValueLayer | StateLayer]) -> None:
        super().__init__(layers=list(layers))

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return the number of past tokens, also if no layer has keys."""
        return step().past_length


class Step:
    """One forward call: what the functions that transformers' modules call need to know of it.

    Attributes:
        attention_mask: 1 for tokens, 0 for padding, int64 [B, T].
        past_length: number of past tokens.
        cache: of transformers, over the layers.
        convolved: layer and number of the state of a convolution whose inputs `update_conv_state` returned.
        alive: tensors whose identities are in use.
        operator: attention is the operator `cached_attention`; otherwise the model's own code over all keys.
        reads_convolutions: convolutions are an operator that reads the state itself.
    """

    def __init__(
        self,
        layers: Sequence[KeyValueLayer | StateLayer],
        attention_mask: Tensor,
        length: int,
        *,
        operator: bool,
        reads_convolutions: bool,
    ) -> None:
        self.attention_mask = attention_mask
        self.past_length: int = attention_mask.shape[1] - length
        self.cache = _StepCache(layers)
        self.convolved: dict[int, tuple[StateLayer, int]] = {}
        self.alive: list[Tensor] = []
        self.operator = operator
        self.reads_convolutions = reads_convolutions
        self._scanned: Iterator[Tensor] = iter(())
        self._state_layers = (layer for layer in layers if isinstance(layer, StateLayer))

    def start_scan(self, layer: StateLayer) -> None:
        """Make `next_state` return this layer's state, or those of its heads one after another."""
        state = layer.states[0] if layer.states else None
        self._scanned = iter(() if state is None else [state] if state.ndim == 3 else state.unbind(1))

    def next_state(self) -> Tensor:
        """Return the state before the step for a scan that gets none, [B, C, N]."""
        return next(self._scanned)

    def next_state_layer(self) -> StateLayer:
        """Return the layers with states one after another, for modules that do not use transformers' cache for them."""
        return next(self._state_layers)

    def owner(self, key: Tensor) -> KeyValueLayer | None:
        """Return the layer whose `update` returned these keys; several layers may attend to them."""
        for layer in self.cache.layers:
            if isinstance(layer, KeyValueLayer) and layer.new is not None and layer.new[0] is key:
                return layer
        return None

    def __enter__(self) -> Step:
        _steps.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _steps.pop()


_steps: list[Step] = []


def step() -> Step:
    """Return the current step."""
    return _steps[-1]
