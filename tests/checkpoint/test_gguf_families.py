"""Compare GGUF files of four architectures with transformers: one random model saved as a folder and as GGUF.

`write_gguf` reimplements llama.cpp's converter (`conversion/llama.py`, `qwen.py`, `gemma.py` and `base.py`) with the
gguf package's writer, so that names, row order and defaults are checked independently.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFWriter, RopeScalingType
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.gguf.checkpoint import read_gguf
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.checkpoint.source import bundle_name
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder
from llm_edge.model.rope import FrequencyDivisors
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.sampling.generation_config import read_generation_config

VOCABULARY = 337
PROMPT = 50
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 42,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,  # 6 heads of 12 are not 42
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 20_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {
    **SHAPE,
    "model_type": "gemma3_text",
    "rms_norm_eps": 1e-6,
    "sliding_window": 8,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {
        **SHAPE,
        "model_type": "llama",
        "rope_parameters": LLAMA3,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama, linear": {
        **SHAPE,
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
        "tie_word_embeddings": False,
    },
    "mistral": {**SHAPE, "model_type": "mistral", "sliding_window": 9, "tie_word_embeddings": False},
    "qwen2": {
        **SHAPE,
        "model_type": "qwen2",
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3": {**SHAPE, "model_type": "qwen3", "num_key_value_heads": 3, "tie_word_embeddings": True},
    "gemma3": {**GEMMA, "num_hidden_layers": 7, "query_pre_attn_scalar": 12},
    # Only the 62-layer size scales attention by hidden size / heads instead of the head size.
    "gemma3, 27B": {**GEMMA, "num_hidden_layers": 62, "hidden_size": 30, "query_pre_attn_scalar": 5},
}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_LAYER = LAYER | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def save_folder(folder: Path, case: dict[str, Any]) -> Any:
    """Save a random model of transformers whose norms and biases differ from their initial values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and case["model_type"] != "gemma3_text" else 0.0
            parameter.normal_(around, 0.3 if parameter.dim() == 1 else 0.15)
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer(),
        bos_token=tiny.SPECIAL[0],
        eos_token=tiny.SPECIAL[2],
        pad_token=tiny.SPECIAL[2],
        additional_special_tokens=[tiny.SPECIAL[1]],
    )
    wrapped.chat_template = tiny.CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return model


def write_gguf(
    folder: Path, path: Path, edit: Callable[[GGUFWriter], None] = lambda _: None, split_tensors: int = 0
) -> Path:
    """Convert a folder to GGUF in float32 as llama.cpp does; `edit` adds keys and tensors.

    With `split_tensors`, several files of at most so many tensors are written, and the path of the first is returned.
    """
    config = json.loads((folder / "config.json").read_text())
    model_type = config["model_type"]
    writer = GGUFWriter(path, ARCHITECTURES.get(model_type, model_type), split_max_tensors=split_tensors)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if model_type in ("llama", "mistral"):
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config["head_dim"])
    if model_type in ("gemma3_text", "mistral"):
        writer.add_sliding_window(config["sliding_window"])
    _write_tokenizer(writer, config["vocab_size"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _divisors(rope, config["head_dim"]))
    for name, tensor in load_file(folder / "model.safetensors").items():
        writer.add_tensor(*_converted(name, tensor.numpy(), config))
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if split_tensors else path


def _write_tokenizer(writer: GGUFWriter, rows: int) -> None:
    made = json.loads(tiny.tokenizer().to_str())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].__getitem__)
    padding = [f"[PAD{index}]" for index in range(len(tokens), rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + padding)
    writer.add_token_types([3] * len(tiny.SPECIAL) + [1] * (len(tokens) - len(tiny.SPECIAL)) + [5] * len(padding))
    writer.add_token_merges([" ".join(merge) for merge in made["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)


def _divisors(rope: dict[str, Any], dim: int) -> np.ndarray:
    """Return llama3 scaling as one divisor per frequency."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for exponent in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (exponent / dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.array(divisors, np.float32)


def _converted(name: str, values: np.ndarray, config: dict[str, Any]) -> tuple[str, np.ndarray]:
    stem, kind = name.rsplit(".", 1)
    gemma = config["model_type"] == "gemma3_text"
    if gemma and name.endswith("norm.weight"):
        values = values + np.float32(1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}", values
    _, _, number, part = stem.split(".", 3)
    if config["model_type"] in ("llama", "mistral") and part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config["num_attention_heads" if part == "self_attn.q_proj" else "num_key_value_heads"]
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return f"blk.{number}.{(GEMMA_LAYER if gemma else LAYER)[part]}.{kind}", values


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model, read from both formats and by transformers."""

    folder: Checkpoint
    gguf: Checkpoint
    path: Path
    theirs: Any


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Build each case once."""
    folder = tmp_path_factory.mktemp("model")
    model = save_folder(folder, CASES[request.param])
    path = write_gguf(folder, folder / "model.gguf")
    return Pair(read_folder(folder), read_gguf(path), path, model)


def test_weights_are_bitwise_equal(pair: Pair) -> None:
    assert list(pair.gguf.weights) == list(pair.folder.weights)
    for name, weight in pair.folder.weights.items():
        assert torch.equal(pair.gguf.weights[name], weight), name


def unscaled(config: ModelConfig) -> ModelConfig:
    """Return the checkpoint without rotary scaling."""
    layers = [dataclasses.replace(layer, rope=dataclasses.replace(layer.rope, scaling=None)) for layer in config.layers]
    return dataclasses.replace(config, layers=tuple(layers))


def test_configs_are_equal(pair: Pair) -> None:
    ours, theirs = pair.gguf.config, pair.folder.config
    if isinstance(
        ours.ropes[0].scaling, FrequencyDivisors
    ):  # the format stores the divisors, not the settings they are computed from
        for mine, other in zip(ours.ropes[0].tables(256), theirs.ropes[0].tables(256), strict=True):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=0)
        ours, theirs = unscaled(ours), unscaled(theirs)
    assert ours == theirs


def test_the_transformers_config_matches_the_folder(pair: Pair) -> None:
    saved = pair.theirs.config.to_dict()
    given = AutoConfig.for_model(**pair.gguf.hf_config).to_dict()
    keys = pair.gguf.hf_config.keys() - {"rope_theta", "rope_scaling", "rope_local_base_freq"}
    if saved["model_type"] != "llama" or saved["rope_parameters"]["rope_type"] != "llama3":
        keys |= {"rope_parameters"}
        for rope in (given["rope_parameters"], saved["rope_parameters"]):
            for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
                if rope.get("rope_type") == "yarn":
                    rope.setdefault(name, default)
    assert {key: given[key] for key in keys} == {key: saved[key] for key in keys}
    json.dumps(pair.gguf.hf_config)


def test_logits_match_transformers(pair: Pair) -> None:
    tokens = torch.randint(0, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        expected = pair.theirs(tokens).logits
        assert expected.std() > 0.3
        decoder = Decoder(pair.gguf.config)
        decoder.load_weights(pair.gguf.weights)
        whole, _ = decoder(tokens, mask, decoder.empty_past(2))
        torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)
        past, done, steps = decoder.empty_past(2), 0, []
        for length in (20, 1, 1, 13, 1, 14):
            done += length
            logits, past = decoder(tokens[:, done - length : done], mask[:, :done], past)
            steps.append(logits)
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=0)


def test_tokenizer_and_defaults_match_the_folder(pair: Pair) -> None:
    ours, theirs = pair.gguf, pair.folder
    assert ours.generation == {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 2}  # 0 is <|endoftext|>
    assert {**ours.generation, "eos_token_id": 2}.items() <= theirs.generation.items()
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    assert ours.tokenizer.eos_token_ids[:1] == theirs.tokenizer.eos_token_ids
    text = tiny.TEXT + "<|im_start|>user\nHi<|im_end|>"
    found = [Tokenizer.from_str(it.tokenizer.tokenizer_json).encode(text).ids for it in (ours, theirs)]
    assert found[0] == found[1]
    assert (ours.source.format, ours.source.weight_types, ours.source.size) == ("GGUF", "F32", pair.path.stat().st_size)


# ---- optional keys


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    save_folder(folder, {**GEMMA, "num_hidden_layers": 3, "query_pre_attn_scalar": 12})
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_folder(folder, {**SHAPE, "model_type": "llama", "num_hidden_layers": 1})
    return folder


def without(*keys: str) -> Callable[[GGUFWriter], None]:
    """Return an edit that removes keys."""

    def edit(writer: GGUFWriter) -> None:
        for key in keys:
            del writer.kv_data[0][key]

    return edit


def replaced(**keys: Any) -> Callable[[GGUFWriter], None]:
    """Return an edit that sets keys; `__` stands for a dot and `_0` for the architecture."""

    def edit(writer: GGUFWriter) -> None:
        for name, value in keys.items():
            key = name.replace("__", ".").replace("_0", writer.arch)
            writer.kv_data[0].pop(key, None)
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)

    return edit


def read(folder: Path, path: Path, edit: Callable[[GGUFWriter], None]) -> Checkpoint:
    return read_gguf(write_gguf(folder, path / "edited.gguf", edit))


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (2, [8, None, 8]),
        (1, [None, None, None]),
        (0, [8, 8, 8]),
        ([False, True, False], [None, 8, None]),
    ],
)
def test_gemmas_layer_pattern(gemma: Path, tmp_path: Path, pattern: Any, windows: list[int | None]) -> None:
    config = read(gemma, tmp_path, replaced(_0__attention__sliding_window_pattern=pattern)).config
    assert [layer.window for layer in config.layers] == windows
    assert [layer.rope.theta for layer in config.layers if layer.rope] == [1e4 if window else 1e6 for window in windows]


def test_gemmas_local_rope_frequencies(gemma: Path, tmp_path: Path) -> None:
    usual = read(gemma, tmp_path, without("gemma3.rope.freq_base_swa")).config
    own = read(gemma, tmp_path, replaced(_0__rope__freq_base_swa=5000.0)).config
    assert [config.layers[0].rope.theta for config in (usual, own) if config.layers[0].rope] == [10_000.0, 5_000.0]


def test_gemma_without_a_sliding_window(gemma: Path, tmp_path: Path) -> None:
    config = read(gemma, tmp_path, without("gemma3.attention.sliding_window")).config
    assert {layer.window for layer in config.layers} == {None}
    assert len(config.ropes) == 1


def test_defaults_match_llama_cpp(llama: Path, tmp_path: Path) -> None:
    full = read(llama, tmp_path, lambda _: None)
    keys = ("attention.value_length", "rope.dimension_count", "rope.freq_base", "vocab_size")
    assert read(llama, tmp_path, without(*(f"llama.{key}" for key in keys))).config == full.config
    neutral = replaced(
        _0__expert_count=0, _0__attention__scale=0.0, _0__use_parallel_residual=True, _0__rope__scaling__type="none"
    )
    assert read(llama, tmp_path, neutral).config == full.config
    # a factor without a type, or its older name, means linear scaling
    linear = [
        read(llama, tmp_path, replaced(**{key: 4.0})).config
        for key in ("_0__rope__scaling__factor", "_0__rope__scale_linear")
    ]
    typed = read(llama, tmp_path, replaced(_0__rope__scaling__factor=4.0, _0__rope__scaling__type="linear")).config
    assert linear == [typed, typed] != [full.config, full.config]


def test_yarn_settings_are_read_from_the_file(llama: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"_0__rope__scaling__type": "yarn", "_0__rope__scaling__factor": 4.0}
    usual = read(llama, tmp_path, replaced(**keys)).config.ropes[0].scaling
    more = {
        "original_context_length": 64,
        "attn_factor": 0.5,
        "yarn_beta_fast": 16.0,
        "yarn_beta_slow": 2.0,
        "yarn_log_multiplier": 0.0,
    }
    keys |= {f"_0__rope__scaling__{key}": value for key, value in more.items()}
    own = read(llama, tmp_path, replaced(**keys)).config.ropes[0].scaling
    amplitude = 0.1 * math.log(4.0) + 1
    found = [dataclasses.astuple(scaling) for scaling in (usual, own) if scaling is not None]
    assert found == [
        (4.0, 256, 32.0, 1.0, pytest.approx(amplitude), True),
        (4.0, 64, 16.0, 2.0, pytest.approx(amplitude / 2), True),
    ]


LLAMACPP = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


@pytest.mark.parametrize(
    ("keys", "expected", "notes"),
    [
        ({"temp": 0.6}, LLAMACPP | {"temperature": 0.6}, []),
        (
            {"temp": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.0},
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9},
            [],
        ),
        ({"top_k": -1, "top_p": 1.0}, {"do_sample": True, "temperature": 0.8, "top_k": 0, "min_p": 0.05}, []),
        (
            {"penalty_repeat": 1.1},
            LLAMACPP | {"repetition_penalty": 1.1, "repetition_window": 64},
            [],
        ),
        (
            {"penalty_repeat": 1.1, "penalty_last_n": -1},
            LLAMACPP | {"repetition_penalty": 1.1, "repetition_window": -1},
            [],
        ),
        (
            {"xtc_probability": 0.5, "xtc_threshold": 0.2},
            LLAMACPP | {"xtc_probability": 0.5, "xtc_threshold": 0.2},
            [],
        ),
        ({"mirostat": 2}, LLAMACPP | {"mirostat_tau": 5.0}, []),
        (
            {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
            LLAMACPP | {"mirostat_tau": 3.0, "mirostat_eta": 0.2},
            [],
        ),
        ({"mirostat": 0, "mirostat_tau": 3.0}, LLAMACPP, []),
        ({"mirostat": 1}, LLAMACPP, ["general.sampling.mirostat: version 1 is not supported"]),
        ({"temp": "0.6"}, LLAMACPP | {"temperature": 0.6}, []),
        ({"temp": "hot"}, {}, ["general.sampling.temp: 'hot' is not a number"]),
        ({"top_p": 7.0}, {**LLAMACPP, "top_p": None}, ["general.sampling.top_p: 7.0 is not allowed"]),
        ({"sequence": "top_k;temperature"}, {}, ["general.sampling.sequence: 'top_k;temperature' is not supported"]),
        ({"temp": 0.0, "top_k": 5}, {}, []),
        ({"temp": -1.0}, {}, []),
        (
            {"temp": 0.0, "penalty_repeat": 1.1},
            {"do_sample": False, "temperature": 0.0, "repetition_penalty": 1.1, "repetition_window": 64},
            [],
        ),
    ],
    ids=str,
)
def test_recommended_sampling_is_that_of_llamacpp(
    llama: Path, tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any], notes: list[str]
) -> None:
    found = read(llama, tmp_path, replaced(**{f"general__sampling__{key}": value for key, value in keys.items()}))
    wanted = {key: value for key, value in expected.items() if value is not None}
    assert {key: value for key, value in found.generation.items() if not key.endswith("_id")} == wanted
    assert [note[: len(start)] for note, start in zip(found.notes, notes, strict=True)] == notes
    assert read_generation_config(found.generation).invalid == ()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (
            {"general__architecture": "mamba"},
            r"'mamba' is not supported; supported: 'llama', 'qwen2', 'qwen3', 'gemma3', 'arcee', ",
        ),
        ({"general__type": "adapter"}, "contains 'adapter' instead of a model"),
        ({"_0__expert_count": 8}, r"llama\.expert_count is 8; only 0 is supported"),
        ({"_0__attention__scale": 0.5}, r"llama\.attention\.scale is 0\.5"),
        ({"_0__logit_scale": 2.0}, r"llama\.logit_scale is 2\.0"),
        ({"_0__final_logit_softcapping": 30.0}, r"llama\.final_logit_softcapping is 30"),
        ({"_0__attention__causal": False}, r"llama\.attention\.causal is False"),
        ({"_0__pooling_type": 3}, r"llama\.pooling_type is 3"),
        ({"_0__rope__scaling__yarn_log_multiplier": 0.1}, r"yarn_log_multiplier is 0\.1"),
        ({"_0__rope__scaling__yarn_attn_factor": 1.0}, r"yarn_attn_factor' \(1\.0\), which may affect the result"),
        ({"_0__rope__scaling__attn_factor": 1.5}, r"attn_factor is 1\.5, which is supported with yarn only"),
        ({"_0__rope__scaling__type": "longrope"}, r"llama\.rope\.scaling\.type 'longrope' is not supported"),
        ({"_0__rope__scaling__factor": -2.0}, r"factor is -2\.0, not a positive number"),
        ({"_0__rope__dimension_count": 6}, r"llama\.rope\.dimension_count is 6; only the head size 12"),
        ({"_0__attention__value_length": 6}, r"llama\.attention\.value_length is 6"),
        ({"_0__attention__head_count": [6, 6]}, r"attention\.head_count is an array, not an integer"),
        ({"_0__attention__head_count": 0}, r"attention\.head_count is 0; it must be at least 1"),
        ({"_0__attention__sliding_window_pattern": 2}, r"sliding_window_pattern' \(2\), which may affect the result"),
        ({"_0__rope__freq_base_swa": 5.0}, r"rope\.freq_base_swa' \(5\.0\), which may affect the result"),
        ({"_0__new\n\x1b[2Jline": 1}, r"'llama\.new\\n\\x1b\[2Jline' \(1\), which may affect the result"),
        ({"_0__block_count": 1_000_000}, r"block_count is 1000000; it must be at most 1024"),
        ({"_0__block_count": 2}, r"tensor blk\.1\.\w+\.weight is missing"),
        ({"_0__swin_norm": True}, r"'llama\.swin_norm' \(True\), which may affect the result"),
        ({"_0__rope__freq_base": "high"}, r"rope\.freq_base is 'high', not a finite number"),
    ],
)
def test_unsupported_keys_that_change_the_result_are_rejected_by_name(
    llama: Path, tmp_path: Path, keys: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        read(llama, tmp_path, replaced(**keys))
    assert str(caught.value).startswith(str(tmp_path / "edited.gguf"))
    assert str(caught.value).isprintable()


def test_unexpected_tensors_are_rejected_by_name(llama: Path, gemma: Path, tmp_path: Path) -> None:
    def refused(folder: Path, name: str, shape: tuple[int, ...], reason: str) -> None:
        with pytest.raises(CheckpointError, match=reason):
            read(folder, tmp_path, lambda writer: writer.add_tensor(name, np.full(shape, 2.0, np.float32)))

    refused(llama, "output.bias", (VOCABULARY,), r"unexpected tensor output\.bias")
    refused(llama, "blk.0.attn_q_norm.weight", (12,), r"unexpected tensor blk\.0\.attn_q_norm\.weight")
    refused(llama, "blk.0.attn_q.bias", (72,), r"blk\.0\.attn_k\.bias is missing")
    refused(llama, "rope_freqs.weight", (12,), "is not 6 positive numbers")
    refused(gemma, "rope_freqs.weight", (6,), r"unexpected tensor rope_freqs\.weight")


def test_invalid_or_redundant_frequency_divisors_are_rejected(llama: Path, tmp_path: Path) -> None:
    for value in (0.0, -1.0, math.nan, math.inf):

        def add(writer: GGUFWriter, value: float = value) -> None:
            writer.add_tensor("rope_freqs.weight", np.full(6, value, np.float32))

        with pytest.raises(CheckpointError, match="is not 6 positive numbers"):
            read(llama, tmp_path, add)

    def twice(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.ones(6, np.float32))
        writer.add_rope_scaling_factor(2.0)

    with pytest.raises(CheckpointError, match="both scale the rotary positions"):
        read(llama, tmp_path, twice)


def test_more_tokens_than_embedding_rows_are_rejected(llama: Path, tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        tokens = writer.kv_data[0].pop("tokenizer.ggml.tokens").value
        kinds = writer.kv_data[0].pop("tokenizer.ggml.token_type").value
        writer.add_token_list([*tokens, "one more"])
        writer.add_token_types([*kinds, 5])

    with pytest.raises(CheckpointError, match=r"has 338 tokens, but an embedding of 337 rows"):
        read(llama, tmp_path, edit)


# ---- models in several files


@pytest.fixture
def parts(llama: Path, tmp_path: Path) -> list[Path]:
    first = write_gguf(llama, tmp_path / "tiny.gguf", split_tensors=4)
    return sorted(first.parent.glob("tiny-*.gguf"))


def test_all_parts_of_a_split_model_are_read(llama: Path, parts: list[Path], tmp_path: Path) -> None:
    whole, split = read_gguf(write_gguf(llama, tmp_path / "whole.gguf")), read_gguf(parts[0])
    assert len(parts) == 3
    assert split.config == whole.config
    assert split.tokenizer == whole.tokenizer
    assert split.weights.keys() == whole.weights.keys()
    for name in whole.weights:
        assert torch.equal(split.weights[name], whole.weights[name]), name
    assert [file.name for file in split.source.files] == [path.name for path in parts]
    assert split.source.name == bundle_name(str(parts[0])) == "tiny"


def test_damaged_split_models_are_rejected_in_one_line(parts: list[Path]) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            read_gguf(path)
        assert str(caught.value).isprintable()
        return str(caught.value)

    for number, path in enumerate(parts[1:], 2):
        assert refused(path) == f"{path}: is part {number} of 3 of a split model: give the first one, {parts[0]}"
    third = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    assert refused(parts[0]) == f"{parts[2]}: split.no and split.count are 1, 3, not 2, 3: download it again"
    parts[2].write_bytes(third[: len(third) // 2])
    assert refused(parts[0]).startswith(f"{parts[2]}: ")
    parts[2].write_bytes(b"")
    assert "the file is empty" in refused(parts[0])
    parts[2].unlink()
    missing = f"{parts[0]}: the model has 3 parts; missing: {parts[2].name}: download them too"
    assert refused(parts[0]) == missing
    parts[1].unlink()
    assert f"missing: {parts[1].name}, {parts[2].name}" in refused(parts[0])
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    assert refused(renamed).endswith("of a split model: give it the name …-00001-of-00003.gguf again")


def test_the_template_for_tools_of_a_gguf_is_read(llama: Path, tmp_path: Path) -> None:
    found = read(llama, tmp_path, replaced(tokenizer__chat_template__tool_use="TOOLS {{ tools }}"))
    assert found.tokenizer.named_templates == {"tool_use": "TOOLS {{ tools }}"}
