"""GGUF files of further architectures compute what transformers computes.

Files are written with the names of the gguf package's tables and the keys and row orders of llama.cpp's converter
(`conversion/*.py`), so that they are checked independently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from test_gguf_families import SHAPE, _write_tokenizer, save_folder
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.gguf.architectures import ARCHITECTURES
from llm_edge.checkpoint.gguf.checkpoint import read_gguf
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.errors import CheckpointError

_SPLIT = {**{key: value for key, value in SHAPE.items() if key != "head_dim"}, "hidden_size": 96}  # heads of 16
_THETA = {"rope_type": "default", "rope_theta": 20_000.0}
_PARTIAL = {"rope_parameters": {**_THETA, "partial_rotary_factor": 0.5}}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 20_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
Keys = Callable[[GGUFWriter, dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """A model and how llama.cpp's converter writes it.

    Attributes:
        arch: of the file.
        config: of transformers.
        keys: writes the keys of this architecture.
        eps: name of the norms' epsilon in the config; None for a constant.
        interleave: names of projections whose rows the converter reorders.
        add_one: the converter adds 1 to norms.
        skip: tensors that the converter leaves out.
    """

    arch: MODEL_ARCH
    config: Mapping[str, Any]
    keys: Keys = lambda *_: None
    eps: str | None = "rms_norm_eps"
    interleave: tuple[str, ...] = ()
    add_one: bool = False
    skip: tuple[str, ...] = field(default=())


def _rotated(writer: GGUFWriter, config: dict[str, Any]) -> None:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(head * config["rope_parameters"]["partial_rotary_factor"]))


def _windows(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def _gemma2(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _cohere(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_logit_scale(config["logit_scale"])
    writer.add_rope_scaling_type(RopeScalingType.NONE)


def _cohere2(writer: GGUFWriter, config: dict[str, Any]) -> None:
    _cohere(writer, config)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])


def _ministral3(writer: GGUFWriter, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _stablelm(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_parallel_residual(config["use_parallel_residual"])
    _rotated(writer, config)


_QK = ("q_proj", "k_proj")
_WINDOWED = {"sliding_window": 9, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
CASES: dict[str, Case] = {
    "arcee": Case(MODEL_ARCH.ARCEE, {**SHAPE, "model_type": "arcee", "rope_parameters": _THETA}, interleave=_QK),
    "cohere": Case(
        MODEL_ARCH.COMMAND_R,
        {**_SPLIT, "model_type": "cohere", "rope_parameters": _THETA, "logit_scale": 0.25, "tie_word_embeddings": True},
        _cohere,
        "layer_norm_eps",
    ),
    "cohere2": Case(
        MODEL_ARCH.COHERE2,
        {
            **_SPLIT,
            "model_type": "cohere2",
            "num_hidden_layers": 4,
            "rope_parameters": _THETA,
            "logit_scale": 0.25,
            "tie_word_embeddings": True,
            **_WINDOWED,
        },
        _cohere2,
        "layer_norm_eps",
    ),
    "exaone4": Case(MODEL_ARCH.EXAONE4, {
        **_SPLIT,
        "model_type": "exaone4",
        "layer_types": ["full_attention"] * 2,
        "sliding_window": None,
        "rope_parameters": _THETA,
    }),
    "exaone4 with windows": Case(
        MODEL_ARCH.EXAONE4,
        {
            **_SPLIT,
            "model_type": "exaone4",
            "num_hidden_layers": 4,
            "sliding_window_pattern": "LLLG",
            "rope_parameters": _THETA,
            **_WINDOWED,
        },
        _windows,
    ),
    "gemma": Case(
        MODEL_ARCH.GEMMA, {**SHAPE, "model_type": "gemma", "tie_word_embeddings": True}, add_one=True
    ),
    "gemma2": Case(
        MODEL_ARCH.GEMMA2,
        {
            **SHAPE,
            "model_type": "gemma2",
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "query_pre_attn_scalar": SHAPE["head_dim"],
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": True,
        },
        _gemma2,
        add_one=True,
    ),
    "glm": Case(
        MODEL_ARCH.CHATGLM,
        {**_SPLIT, "model_type": "glm", "head_dim": 16, "attention_bias": True, **_PARTIAL},
        _rotated,
    ),
    "glm4": Case(
        MODEL_ARCH.GLM4, {**SHAPE, "model_type": "glm4", "attention_bias": False, **_PARTIAL}, _rotated
    ),
    "ministral3": Case(
        MODEL_ARCH.MISTRAL3,
        {
            **SHAPE,
            "model_type": "ministral3",
            "sliding_window": None,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
        _ministral3,
        interleave=_QK,
    ),
    "nemotron": Case(
        MODEL_ARCH.NEMOTRON,
        {**_SPLIT, "model_type": "nemotron", "head_dim": 16, **_PARTIAL},
        _rotated,
        "norm_eps",
        add_one=True,
    ),
    "olmo": Case(
        MODEL_ARCH.OLMO, {**_SPLIT, "model_type": "olmo", "rope_parameters": _THETA}, eps=None, interleave=_QK
    ),
    "olmo2": Case(MODEL_ARCH.OLMO2, {**_SPLIT, "model_type": "olmo2", "rope_parameters": _THETA}),
    "olmo3": Case(
        MODEL_ARCH.OLMO2,
        {
            **_SPLIT,
            "model_type": "olmo3",
            "num_hidden_layers": 4,
            "rope_parameters": {"full_attention": _YARN, "sliding_attention": _THETA},
            **_WINDOWED,
        },
        _windows,
    ),
    "phi": Case(
        MODEL_ARCH.PHI2,
        {**_SPLIT, "model_type": "phi", "num_key_value_heads": 6, "intermediate_size": 384, **_PARTIAL},
        _rotated,
        "layer_norm_eps",
    ),
    "seed_oss": Case(MODEL_ARCH.SEED_OSS, {**SHAPE, "model_type": "seed_oss", "rope_parameters": _THETA}),
    "stablelm": Case(
        MODEL_ARCH.STABLELM,
        {**_SPLIT, "model_type": "stablelm", "use_qkv_bias": True, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25,
        }},
        _stablelm,
        "layer_norm_eps",
    ),
    "stablelm with parallel blocks": Case(
        MODEL_ARCH.STABLELM,
        {**_SPLIT, "model_type": "stablelm", "use_parallel_residual": True, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25,
        }},
        _stablelm,
        "layer_norm_eps",
    ),
    "starcoder2": Case(
        MODEL_ARCH.STARCODER2,
        {**_SPLIT, "model_type": "starcoder2", "sliding_window": None, "rope_parameters": _THETA},
        eps="norm_epsilon",
    ),
}  # fmt: skip
_LAYER_NORM = {"cohere", "cohere2", "nemotron", "olmo", "phi", "stablelm", "starcoder2"}


def write(path: Path, case: Case, model: Any, *, packed: bool = False) -> Path:
    """Write a model of transformers; with `packed`, queries, keys and values as one tensor."""
    config = model.config.to_dict()
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[case.arch])
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    if config.get("head_dim") is not None and case.arch is not MODEL_ARCH.CHATGLM:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config["model_type"] in _LAYER_NORM:
        writer.add_layer_norm_eps(1e-5 if case.eps is None else config[case.eps])
    else:
        writer.add_layer_norm_rms_eps(config[str(case.eps)])
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    case.keys(writer, config)
    _write_tokenizer(writer, config["vocab_size"])
    for name, tensor in converted(case, model, layers, packed=packed).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(case: Case, model: Any, layers: int, *, packed: bool) -> dict[str, Tensor]:
    names = gguf.get_tensor_name_map(case.arch, layers)
    tied = model.config.tie_word_embeddings
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        value = tensor + 1 if case.add_one and name.endswith("norm.weight") else tensor
        if any(part in name for part in case.interleave):
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            value = value.reshape(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new_name is not None, name
        tensors[new_name] = value
    if packed:
        for kind in ("weight", "bias"):
            for number in range(layers):
                parts = [tensors.pop(f"blk.{number}.attn_{part}.{kind}", None) for part in "qkv"]
                if all(part is not None for part in parts):
                    tensors[f"blk.{number}.attn_qkv.{kind}"] = torch.cat([part for part in parts if part is not None])
    return tensors


@torch.inference_mode()
def logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    decoder = Decoder(checkpoint.config).eval()
    decoder.load_weights(checkpoint.weights)
    found: Tensor = decoder(tokens, torch.ones_like(tokens), decoder.empty_past(len(tokens)))[0]
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(name: str, packed: bool, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = save_folder(tmp_path / "folder", dict(case.config))
    checkpoint = read_gguf(write(tmp_path / "model.gguf", case, theirs, packed=packed))
    assert checkpoint.hf_config["model_type"] == case.config["model_type"]
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(tokens).logits
    assert expected.std() > 0.05
    assert (logits(checkpoint, tokens) - expected).abs().max() < 1e-4
    assert (logits(read_folder(tmp_path / "folder"), tokens) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("key", "value", "words"), [
    ("olmo.attention.clamp_kqv", 8.0, "attention.clamp_kqv is 8.0; only 0 is supported"),
    ("olmo.attention.layer_norm_epsilon", 1e-3, "layer_norm_epsilon is 0.001; only 1e-05 is supported"),
    ("olmo.attention.layer_norm_rms_epsilon", 1e-3, None),
    ("olmo.rope.dimension_count", 8, "rope.dimension_count is 8; only the head size 16 is supported"),
    ("olmo.logit_scale", 2.0, "logit_scale is 2.0; only 1 is supported"),
])  # fmt: skip
def test_settings_that_are_not_supported_are_rejected(
    key: str, value: float, words: str | None, tmp_path: Path
) -> None:
    def keys(writer: GGUFWriter, _: dict[str, Any]) -> None:
        writer.kv_data[0].pop(key, None)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)

    case = CASES["olmo"]
    changed = Case(case.arch, case.config, keys, case.eps, case.interleave)
    path = write(tmp_path / "model.gguf", changed, save_folder(tmp_path / "folder", dict(case.config)))
    if words is None:
        read_gguf(path)
        return
    with pytest.raises(CheckpointError, match=words) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)


def test_every_architecture_has_a_case() -> None:
    here = {gguf.MODEL_ARCH_NAMES[case.arch] for case in CASES.values()}
    assert here | {"llama", "qwen2", "qwen3", "gemma3"} == ARCHITECTURES.keys()
