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
    """A parameter of transformers' model: tensors of the file, and what makes them one.

    Attributes:
        sources: names of the tensors.
        convert: returns the parameter, given the tensors.
        dense: other names that they have in models without experts.
    """

    sources: tuple[str, ...]
    convert: Callable[..., Tensor] = lambda tensor: tensor
    dense: tuple[str, ...] = ()

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


def _granite_hybrid(meta: Metadata, config: Entries) -> Entries:
    """Files with rotary positions are Bamba's, whose config differs."""
    if meta.file.meta_bool(f"{meta.architecture}.rope.scaling.finetuned", default=True):
        meta.file.fail(f"{meta.architecture}.rope.scaling.finetuned is True; only False is supported")
    heads, inner = meta.integer("ssm.time_step_rank"), meta.integer("ssm.inner_size")
    if inner % config["hidden_size"] or inner % heads:
        meta.file.fail(f"{meta.architecture}.ssm.inner_size ({inner}) is not a multiple of embedding_length and heads")
    kinds = meta.integers("attention.head_count_kv", config["num_hidden_layers"])
    head_dim = config["head_dim"]
    return {
        "layer_types": ["attention" if count else "mamba" for count in kinds],
        "position_embedding_type": None,
        "attention_multiplier": meta.number("attention.scale", 0.0) or head_dim**-0.5,
        "embedding_multiplier": meta.number("embedding_scale", 1.0),
        "residual_multiplier": meta.number("residual_scale", 1.0),
        "logits_scaling": meta.number("logit_scale", 1.0),
        "num_local_experts": meta.integer("expert_count", 0, minimum=0),
        "num_experts_per_tok": meta.integer("expert_used_count", 0, minimum=0),
        "shared_intermediate_size": meta.integer("expert_shared_feed_forward_length"),
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // config["hidden_size"],
        "mamba_n_groups": meta.integer("ssm.group_count"),
        "mamba_d_state": meta.integer("ssm.state_size"),
        "mamba_d_conv": meta.integer("ssm.conv_kernel"),
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

_GRANITE_HYBRID: Tensors = {
    # Rows of queries and keys are in the order of rotary positions, which are not used: products stay the same.
    **_named(_ATTENTION | _MLP_NORM | {"mamba.in_proj": "ssm_in", "mamba.out_proj": "ssm_out"}),
    "mamba.A_log": GeneralTensor(("ssm_a",), lambda decay: decay.neg().log().flatten()),
    "mamba.D": GeneralTensor(("ssm_d",), torch.flatten),
    "mamba.dt_bias": GeneralTensor(("ssm_dt.bias",)),
    "mamba.conv1d.weight": GeneralTensor(("ssm_conv1d.weight",), lambda kernel: kernel.unsqueeze(1)),
    "mamba.conv1d.bias": GeneralTensor(("ssm_conv1d.bias",)),
    "mamba.norm.weight": GeneralTensor(("ssm_norm.weight",), torch.flatten),
    "block_sparse_moe.router.weight": GeneralTensor(("ffn_gate_inp.weight",)),
    "block_sparse_moe.experts.gate_up_proj": GeneralTensor(("ffn_gate_exps.weight", "ffn_up_exps.weight"), _joined),
    "block_sparse_moe.experts.down_proj": GeneralTensor(("ffn_down_exps.weight",)),
    "shared_mlp.input_linear.weight": GeneralTensor(
        ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
        lambda gate, up: torch.cat([gate, up]),
        dense=("ffn_gate.weight", "ffn_up.weight"),
    ),
    "shared_mlp.output_linear.weight": GeneralTensor(("ffn_down_shexp.weight",), dense=("ffn_down.weight",)),
}
_GRANITE_KEYS = frozenset(
    (
        *("attention.scale", "embedding_scale", "residual_scale", "logit_scale", "expert_shared_feed_forward_length"),
        *("ssm.conv_kernel", "ssm.group_count", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"),
    )
)

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
    "granitehybrid": GeneralArchitecture(
        Architecture("granitemoehybrid", _granite_hybrid, _EXPERTS | _GRANITE_KEYS, per_layer_heads=True),
        _named(_OUTER),
        _GRANITE_HYBRID,
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
    config = hf_config(file, GENERAL_ARCHITECTURES[file.meta_str("general.architecture")].settings)
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
        for parameter, tensor in architecture.layer.items():
            has_experts = f"blk.{number}.ffn_gate_inp.weight" in file.tensors
            names = tensor.sources if has_experts or not tensor.dense else tensor.dense
            sources = tuple(f"blk.{number}.{name}" for name in names)
            wanted[f"model.layers.{number}.{parameter}"] = GeneralTensor(sources, tensor.convert)
    found = {name: tensor for name, tensor in wanted.items() if set(tensor.sources) <= file.tensors.keys()}
    used = {source for tensor in found.values() for source in tensor.sources}
    if unused := sorted(file.tensors.keys() - used):
        file.fail(f"unexpected tensor {ascii(unused[0])[1:-1][:200]}: this variant of the model is not supported")
    return found
