"""The architectures of llama.cpp that are exported through transformers: their configs and tensor names.

To add one, write an entry of `GENERAL_ARCHITECTURES`; see `architectures.py` for where its facts come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_edge.checkpoint.gguf.architectures import Architecture, Entries
from llm_edge.checkpoint.gguf.config import hf_config
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.gguf.metadata import Metadata

_EXPERTS = frozenset(("expert_count", "expert_used_count", "expert_feed_forward_length"))
_SIGMOID = 2  # of llama.cpp's `expert_gating_func`


@dataclass(frozen=True, slots=True)
class GeneralTensor:
    """A parameter of transformers' model: tensors of the file, and what makes them one."""

    sources: tuple[str, ...]
    convert: Callable[..., Tensor] = lambda tensor: tensor

    def load(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return the parameter, given what reads a tensor of the file."""
        return self.convert(*map(read, self.sources))


Tensors = Mapping[str, GeneralTensor]


def _named(names: Mapping[str, str], kind: str = "weight") -> Tensors:
    """Return the parameters that are stored unchanged."""
    return {f"{name}.{kind}": GeneralTensor((f"{source}.{kind}",)) for name, source in names.items()}


@dataclass(frozen=True, slots=True)
class GeneralArchitecture:
    """How files of an architecture are read.

    Attributes:
        settings: of its config; `model_type` is that of transformers.
        outer: parameters outside the layers.
        layer: parameters of a layer, without `model.layers.N.` and `blk.N.`; each layer has some of them.
    """

    settings: Architecture
    outer: Tensors
    layer: Tensors


# ---- entries of configs


def _experts(meta: Metadata) -> Entries:
    return {
        "num_experts_per_tok": meta.integer("expert_used_count"),
        "moe_intermediate_size": meta.integer("expert_feed_forward_length"),
    }


def _qwen3_moe(meta: Metadata, _: Entries) -> Entries:
    """As in llama.cpp, all layers have experts, and the weights of the chosen ones sum to 1."""
    return {**_experts(meta), "num_experts": meta.integer("expert_count"), "norm_topk_prob": True}


def _qwen2_moe(meta: Metadata, _: Entries) -> Entries:
    shared = meta.integer("expert_shared_feed_forward_length")
    return {
        **_experts(meta),
        "num_experts": meta.integer("expert_count"),
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": shared,
    }


def _gpt_oss(meta: Metadata, config: Entries) -> Entries:
    """The file does not say that the borders of YaRN are not rounded."""
    window, scaling = meta.integer("attention.sliding_window"), config["rope_scaling"]
    return {
        "num_local_experts": meta.integer("expert_count"),
        "num_experts_per_tok": meta.integer("expert_used_count"),
        "intermediate_size": meta.integer("expert_feed_forward_length", config["intermediate_size"]),
        "sliding_window": window,
        "layer_types": meta.layer_types(config["num_hidden_layers"], 2, window),
        "rope_scaling": None if scaling is None else {**scaling, "truncate": False},
    }


def _lfm2(meta: Metadata, config: Entries) -> Entries:
    heads = meta.integers("attention.head_count_kv", config["num_hidden_layers"])
    return {
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "conv_L_cache": meta.integer("shortconv.l_cache"),
        "block_auto_adjust_ff_dim": False,  # the size in the file is adjusted already
    }


def _lfm2_moe(meta: Metadata, config: Entries) -> Entries:
    gate = meta.integer("expert_gating_func", _SIGMOID, minimum=0)
    if gate != _SIGMOID:
        meta.file.fail(f"{meta.architecture}.expert_gating_func is {gate}; only {_SIGMOID} is supported")
    return {
        **_lfm2(meta, config),
        **_experts(meta),
        "num_experts": meta.integer("expert_count"),
        "num_dense_layers": meta.integer("leading_dense_block_count", 0, minimum=0),
        "norm_topk_prob": True,
        "use_expert_bias": True,
    }


# ---- tensors


def _joined(gate: Tensor, up: Tensor) -> Tensor:
    """Return gates and values of experts, each [E, F, H], as [E, 2F, H]."""
    return torch.cat([gate, up], dim=1)


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Return gates and values of experts, each [E, F, H], as [E, H, 2F], or biases [E, F] as [E, 2F]."""
    found = torch.stack([gate, up], dim=2).flatten(1, 2)
    return found.transpose(1, 2).contiguous() if found.dim() == 3 else found


def _expert_tensors(module: str) -> Tensors:
    return {
        f"{module}.experts.gate_up_proj": GeneralTensor(("ffn_gate_exps.weight", "ffn_up_exps.weight"), _joined),
        f"{module}.experts.down_proj": GeneralTensor(("ffn_down_exps.weight",)),
        f"{module}.gate.weight": GeneralTensor(("ffn_gate_inp.weight",)),
    }


_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INPUTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
_ATTENTION = {"input_layernorm": "attn_norm", **_INPUTS, "self_attn.o_proj": "attn_output"}
_MLP_NORM = {"post_attention_layernorm": "ffn_norm"}
_QWEN_MOE: Tensors = {**_named(_ATTENTION | _MLP_NORM), **_expert_tensors("mlp")}
_SHARED = {f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}
_LFM2_OUTER = {"model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm"}
_LFM2 = {
    "operator_norm": "attn_norm",
    **_INPUTS,
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
_LFM2_LAYER: Tensors = {
    **_named(_LFM2),
    "conv.conv.weight": GeneralTensor(("shortconv.conv.weight",), lambda kernel: kernel.unsqueeze(1)),
}

GENERAL_ARCHITECTURES: Mapping[str, GeneralArchitecture] = {
    "gpt-oss": GeneralArchitecture(
        Architecture("gpt_oss", _gpt_oss, _EXPERTS),
        _named(_OUTER),
        {
            **_named({**_ATTENTION, "post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp"}),
            **_named({**_INPUTS, "self_attn.o_proj": "attn_output", "mlp.router": "ffn_gate_inp"}, "bias"),
            "self_attn.sinks": GeneralTensor(("attn_sinks.weight",)),
            "mlp.experts.gate_up_proj": GeneralTensor(("ffn_gate_exps.weight", "ffn_up_exps.weight"), _interleaved),
            "mlp.experts.gate_up_proj_bias": GeneralTensor(("ffn_gate_exps.bias", "ffn_up_exps.bias"), _interleaved),
            "mlp.experts.down_proj": GeneralTensor(
                ("ffn_down_exps.weight",), lambda weight: weight.transpose(1, 2).contiguous()
            ),
            "mlp.experts.down_proj_bias": GeneralTensor(("ffn_down_exps.bias",)),
        },
    ),
    "lfm2": GeneralArchitecture(
        Architecture("lfm2", _lfm2, frozenset({"shortconv.l_cache"}), eps="norm_eps", per_layer_heads=True),
        _named(_LFM2_OUTER),
        _LFM2_LAYER,
    ),
    "lfm2moe": GeneralArchitecture(
        Architecture(
            "lfm2_moe",
            _lfm2_moe,
            _EXPERTS | {"shortconv.l_cache", "leading_dense_block_count", "expert_gating_func"},
            eps="norm_eps",
            per_layer_heads=True,
        ),
        _named(_LFM2_OUTER),
        {
            **_LFM2_LAYER,
            **_expert_tensors("feed_forward"),
            "feed_forward.expert_bias": GeneralTensor(("exp_probs_b.bias",)),
        },
    ),
    "qwen2moe": GeneralArchitecture(
        Architecture("qwen2_moe", _qwen2_moe, _EXPERTS | {"expert_shared_feed_forward_length"}),
        _named(_OUTER),
        {
            **_QWEN_MOE,
            **_named(_INPUTS, "bias"),
            **_named(_SHARED),
            "mlp.shared_expert_gate.weight": GeneralTensor(
                ("ffn_gate_inp_shexp.weight",), lambda weight: weight.reshape(1, -1)
            ),
        },
    ),
    "qwen3moe": GeneralArchitecture(
        Architecture("qwen3_moe", _qwen3_moe, _EXPERTS),
        _named(_OUTER),
        {**_QWEN_MOE, **_named({"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"})},
    ),
}
"""By `general.architecture`."""


def general_config(file: GGUFFile) -> Entries:
    """Return the metadata of a file of `GENERAL_ARCHITECTURES` as transformers' config.

    Raises:
        CheckpointError: a setting is not supported.
    """
    config = hf_config(file, {name: each.settings for name, each in GENERAL_ARCHITECTURES.items()})
    rope = {**(config.pop("rope_scaling") or {"rope_type": "default"}), "rope_theta": config.pop("rope_theta")}
    return {**config, "rope_parameters": rope}


def general_tensors(file: GGUFFile, layers: int) -> Tensors:
    """Return the parameters of transformers' model that a file of `GENERAL_ARCHITECTURES` has, by their names.

    Raises:
        CheckpointError: a tensor of the file is part of no parameter.
    """
    architecture = GENERAL_ARCHITECTURES[file.meta_str("general.architecture")]
    wanted = dict(architecture.outer)
    for number in range(layers):
        for name, tensor in architecture.layer.items():
            sources = tuple(f"blk.{number}.{source}" for source in tensor.sources)
            wanted[f"model.layers.{number}.{name}"] = GeneralTensor(sources, tensor.convert)
    found = {name: tensor for name, tensor in wanted.items() if set(tensor.sources) <= file.tensors.keys()}
    used = {source for tensor in found.values() for source in tensor.sources}
    if unused := sorted(file.tensors.keys() - used):
        file.fail(f"unexpected tensor {ascii(unused[0])[1:-1][:200]}: this variant of the model is not supported")
    return found
