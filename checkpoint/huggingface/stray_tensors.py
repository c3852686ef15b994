"""Finds tensors of a checkpoint that its model does not use, and decides which of them may be left aside.

transformers leaves all of them aside with a warning. Here, those that would belong to the model if its config were
different are errors: other loaders, such as llama.cpp, do use them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_edge.model.config import ModelConfig
from llm_edge.model.weights import WeightTable, unused_tensors
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import short_repr

# Buffers that old versions of models saved, of rotary positions, masks, batch norms and averages of weights.
_BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.\w+|rotary_pos_emb\.\w+|inv_freq|cos_cached|sin_cached|freqs_cis|freqs_cos|freqs_sin|position_ids"
    r"|causal_mask|masked_bias|num_batches_tracked|n_averaged|_extra_state)"
)
# Statistics that quantizers leave beside weights that are not quantized, and scales of a quantized KV cache.
_QUANTIZER = re.compile(
    r".*(\.|_)(amax|k_scale|v_scale|q_scale|prob_scale|kv_scale|observer\.\w+|activation_post_process\.\w+)"
)
_ADAPTER = re.compile(r".*(\.|^)(lora_\w+|original_module|modules_to_save)\..+")


@dataclass(frozen=True, slots=True)
class StrayTensors:
    """Tensors to leave aside, and notes about those that the user may miss."""

    names: frozenset[str]
    notes: tuple[str, ...]


def find_stray_tensors(
    config: ModelConfig,
    table: WeightTable,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], Tensor],
    where: str,
) -> StrayTensors:
    """Return the unused tensors that cannot change the result; the others are left to `bind_weights`.

    Args:
        config: of the model.
        table: of the family.
        shapes: shapes of all tensors by name.
        load: reads a tensor.
        where: path, for messages.

    Raises:
        CheckpointError: the checkpoint has LoRA weights that are not merged, or more layers than the config.
    """
    outer = {_module(source.name) for name in table.outer for source in table.sources(name)}
    layer = re.compile(re.escape(table.layer_prefix).replace(re.escape("{}"), r"(\d{1,6})") + ".+")
    silent, zero, outside = [], [], []
    for name in unused_tensors(config, table, shapes):
        number = layer.fullmatch(name)
        if _ADAPTER.fullmatch(name):
            raise CheckpointError(
                f"{where}: {short_repr(name)} is of a LoRA adapter that is not merged: save the model after "
                "merge_and_unload(), or export its base model with --adapter"
            )
        if number and int(number[1]) >= config.num_hidden_layers:
            raise CheckpointError(
                f"{where}: unexpected tensor {name}: the config has only {config.num_hidden_layers} layers: correct "
                "num_hidden_layers"
            )
        if _BUFFERS.fullmatch(name) or _QUANTIZER.fullmatch(name):
            silent.append(name)
        elif not number and _module(name) not in outer:
            outside.append(name)
        elif name.endswith(".bias") and len(shapes[name]) == 1 and not torch.any(load(name)):
            zero.append(name)
    notes = [
        f"{_list(names)} left out: {reason}"
        for names, reason in (
            (zero, "biases of zeros that the config does not have"),
            (outside, "not used by the model"),
        )
        if names
    ]
    return StrayTensors(frozenset((*silent, *zero, *outside)), tuple(notes))


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _list(names: list[str]) -> str:
    """Return the first names and the number of the others."""
    shown = ", ".join(ascii(name)[1:-1][:100] for name in names[:2])
    more = f" and {len(names) - 2} more tensors" if len(names) > 2 else ""
    return f"{shown}{more}"
