"""GGUF files of architectures that only transformers knows, written with the gguf package's own names of tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from general_models import make_model, shorten_validation
from gguf import MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map

from llm_edge.exporter.export import export
from llm_edge.exporter.general.gguf import read_general_gguf
from llm_edge.exporter.general.reference import load_reference
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime.errors import CheckpointError

NAMES = {
    "gpt_oss": "gpt-oss",
    "granitemoehybrid": "granitehybrid",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2moe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
CHANGES: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 8.0,
            "rope_theta": 150_000.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        }
    },
    "granitemoehybrid": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 1.5,
        "mamba_n_groups": 2,
    },
    "lfm2": {"tie_word_embeddings": True, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"tie_word_embeddings": True},
    "qwen3_moe": {"norm_topk_prob": True},  # as in llama.cpp's graph
}


_DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0}


def write_gguf(path: Path, kind: str, extra: dict[str, int] | None = None, **changes: Any) -> Any:
    """Write a random model of transformers as llama.cpp's converter does, and return it."""
    model = make_model(kind, **CHANGES.get(kind, {}), **changes)
    config = model.config
    writer = GGUFWriter(path, NAMES[kind])
    attending = [
        each in ("", "attention", "full_attention", "sliding_attention")
        for each in getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    ]
    per_layer = [config.num_key_value_heads * attends for attends in attending]
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads if all(attending) else per_layer)
    writer.add_layer_norm_rms_eps(config.norm_eps if "lfm2" in kind else config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if kind != "lfm2":
        writer.add_expert_count(config.num_experts if hasattr(config, "num_experts") else config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if kind == "gpt_oss":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    if "lfm2" in kind:
        writer.add_vocab_size(config.vocab_size)
        writer.add_shortconv_l_cache(config.conv_L_cache)
    if kind == "granitemoehybrid":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)
        writer.add_ssm_conv_kernel(config.mamba_d_conv)
        writer.add_ssm_state_size(config.mamba_d_state)
        writer.add_ssm_group_count(config.mamba_n_groups)
        writer.add_ssm_inner_size(config.mamba_expand * config.hidden_size)
        writer.add_ssm_time_step_rank(config.mamba_n_heads)
        writer.add_rope_scaling_finetuned(False)
    if kind == "lfm2_moe":
        writer.add_leading_dense_block_count(config.num_dense_layers)
        writer.add_uint32("lfm2moe.expert_gating_func", 2)
    if kind == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value)
    _write_tokenizer(writer, config.vocab_size)
    for name, tensor in _tensors(model, kind):
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_tokenizer(writer: GGUFWriter, rows: int) -> None:
    made = json.loads(tiny.tokenizer().to_str())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].__getitem__)
    tokens += [f"[PAD{index}]" for index in range(len(tokens), rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(tiny.SPECIAL) + [1] * (len(tokens) - len(tiny.SPECIAL)))
    writer.add_token_merges([" ".join(merge) for merge in made["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)


def _tensors(model: Any, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == NAMES[kind])
    known = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        module, _, last = name.rpartition(".")
        if module.endswith(".experts"):
            yield from _experts(f"blk.{name.split('.')[2]}", last, tensor, kind)
        elif kind == "granitemoehybrid" and (found := _granite(module, last, tensor, model.config)):
            layer = f"blk.{name.split('.')[2]}"
            yield from ((f"{layer}.{each}", values) for each, values in found.items())
        elif last == "expert_bias":
            yield f"{known.get_name(name)}.bias", tensor
        elif last == "sinks":
            yield f"{known.get_name(name)}.weight", tensor
        else:
            yield f"{known.get_name(module)}.{last}", tensor.squeeze()  # convolutions and a gate have a dimension of 1


def _granite(module: str, last: str, tensor: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    part = "" if not config.num_local_experts else "_shexp"
    if module.endswith("input_linear"):
        gate, up = tensor.chunk(2)
        return {f"ffn_gate{part}.weight": gate, f"ffn_up{part}.weight": up}
    if module.endswith("output_linear"):
        return {f"ffn_down{part}.weight": tensor}
    if module.endswith("router"):
        return {"ffn_gate_inp.weight": tensor}
    if last == "A_log":
        return {"ssm_a": -tensor.exp()[:, None]}
    if last == "D":
        return {"ssm_d": tensor[:, None]}
    if last == "dt_bias":
        return {"ssm_dt.bias": tensor}
    if module.endswith("mamba.norm"):
        return {"ssm_norm.weight": tensor.reshape(config.mamba_n_groups, -1)}
    if module.endswith(("q_proj", "k_proj")):  # neighbouring dimensions are rotated, or would be
        heads = tensor.reshape(-1, 2, config.hidden_size // config.num_attention_heads // 2, tensor.shape[1])
        return {f"attn_{module[-6]}.weight": heads.transpose(1, 2).reshape(tensor.shape)}
    return {}


def _experts(layer: str, name: str, tensor: torch.Tensor, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    suffix = "bias" if name.endswith("_bias") else "weight"
    if kind == "gpt_oss" and suffix == "weight":
        tensor = tensor.transpose(1, 2)
    if name.startswith("down"):
        yield f"{layer}.ffn_down_exps.{suffix}", tensor
        return
    gate, up = (tensor[:, ::2], tensor[:, 1::2]) if kind == "gpt_oss" else tensor.chunk(2, dim=1)
    yield f"{layer}.ffn_gate_exps.{suffix}", gate
    yield f"{layer}.ffn_up_exps.{suffix}", up


@pytest.mark.parametrize(("kind", "changes"), [*((kind, {}) for kind in NAMES), ("granitemoehybrid", _DENSE)])
def test_config_and_weights_are_those_of_the_model(tmp_path: Path, kind: str, changes: dict[str, int]) -> None:
    model = write_gguf(tmp_path / "model.gguf", kind, **changes)
    checkpoint = read_general_gguf(tmp_path / "model.gguf")
    expected = model.state_dict()
    assert set(checkpoint.weights) == set(expected)
    for name, weight in checkpoint.weights.items():
        assert weight.shape == expected[name].shape
        if kind != "granitemoehybrid" or not name.endswith(("A_log", "q_proj.weight", "k_proj.weight")):
            assert torch.equal(weight, expected[name]), name
    ids = torch.arange(60)[None] * 5 % 250 + 3  # several times every window
    with torch.inference_mode():
        found = load_reference(checkpoint)(input_ids=ids).logits
        assert (found - model(input_ids=ids).logits).abs().max() < 1e-5 * found.abs().max()


def test_a_file_is_exported_through_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_validation(monkeypatch, 60)
    write_gguf(tmp_path / "model.gguf", "qwen3_moe")
    options = ExportOptions(output=tmp_path / "bundle", precision="fp32")
    report = export(str(tmp_path / "model.gguf"), options)
    assert report.source.format == "GGUF"
    assert report.validation is not None
    assert report.validation.parities["fp32"].worst.max < 1e-4
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else object())
    with pytest.raises(CheckpointError, match=r"architecture 'qwen3moe' .*llm-edge\[general\]"):
        export(str(tmp_path / "model.gguf"), ExportOptions(output=tmp_path / "other"))


def test_parts_of_experts_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = GGUFWriter.add_tensor
    monkeypatch.setattr(
        GGUFWriter, "add_tensor", lambda self, name, array: add(self, name, array[:3] if "up_exps" in name else array)
    )
    write_gguf(tmp_path / "model.gguf", "qwen3_moe")
    with pytest.raises(CheckpointError, match=r"ffn_up_exps\.weight \(3, 32, 64\) is not supported"):
        read_general_gguf(tmp_path / "model.gguf")


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "lfm2", {"lfm2.shortconv.stride": 2})
    with pytest.raises(CheckpointError, match=r"unknown key 'lfm2\.shortconv\.stride'"):
        read_general_gguf(tmp_path / "model.gguf")
