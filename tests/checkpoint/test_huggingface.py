"""Hugging Face folders: folders saved by transformers are read exactly; invalid ones are rejected in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.decoder import Decoder, count_parameters
from llm_edge.model.registry import find_family
from llm_edge.model.rope import Rope
from llm_edge.runtime.errors import CheckpointError

GONE = object()
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of `tiny_checkpoint` with sharded weights."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "sharded", shard_size="150KB")


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy that the test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "damaged")


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    """Return a copy that the test may damage."""
    return shutil.copytree(sharded, tmp_path / "damaged")


def same(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert ours.config == theirs.config
    assert ours.weights.keys() == theirs.weights.keys()
    for name in ours.weights:
        assert torch.equal(ours.weights[name], theirs.weights[name]), name


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not GONE}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message


# ---- folders saved by transformers


def test_every_weight_equals_the_file(tiny_checkpoint: Path) -> None:
    checkpoint = read_folder(tiny_checkpoint)
    theirs = load_file(tiny_checkpoint / WEIGHTS)
    layer = "model.layers.1."
    parts = {
        "embed_tokens.weight": ["model.embed_tokens.weight"],
        "norm.weight": ["model.norm.weight"],
        "layers.1.attention_norm.weight": [layer + "input_layernorm.weight"],
        "layers.1.attention.qkv.weight": [f"{layer}self_attn.{part}_proj.weight" for part in "qkv"],
        "layers.1.attention.output.weight": [layer + "self_attn.o_proj.weight"],
        "layers.1.mlp_norm.weight": [layer + "post_attention_layernorm.weight"],
        "layers.1.mlp.gate_up.weight": [layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight"],
        "layers.1.mlp.down.weight": [layer + "mlp.down_proj.weight"],
    }
    for name, stacked in parts.items():
        assert torch.equal(checkpoint.weights[name], torch.cat([theirs[part] for part in stacked])), name
    assert len(checkpoint.weights) == 2 + 2 * 6
    assert sum(checkpoint.weights[name].numel() for name in checkpoint.weights) == count_parameters(checkpoint.config)


def test_config_tokenizer_and_source_are_read(tiny_checkpoint: Path) -> None:
    checkpoint = read_folder(tiny_checkpoint)
    assert checkpoint.config == ModelConfig(
        vocab_size=331,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        layers=(LayerConfig(Rope(10_000.0, 32)),) * 2,
        norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    assets = checkpoint.tokenizer
    assert assets.chat_template == tiny.CHAT_TEMPLATE
    assert "chat_template" not in assets.tokenizer_config
    assert (assets.bos_token_id, assets.eos_token_ids, assets.pad_token_id) == (0, (2,), 2)
    assert assets.tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    expected = tiny.tokenizer().encode(tiny.TEXT).ids
    assert tokenizers.Tokenizer.from_str(assets.tokenizer_json).encode(tiny.TEXT).ids == expected
    assert checkpoint.source.name == tiny_checkpoint.name
    assert [file.name for file in checkpoint.source.files] == [WEIGHTS]
    assert checkpoint.source.size == (tiny_checkpoint / WEIGHTS).stat().st_size
    assert checkpoint.source.weight_types == "F32"


def test_shards_equal_a_single_file(sharded: Path, tiny_checkpoint: Path) -> None:
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert not (sharded / WEIGHTS).exists()
    checkpoint = read_folder(sharded)
    same(checkpoint, read_folder(tiny_checkpoint))
    assert [file.name for file in checkpoint.source.files] == files


def test_a_single_weights_file_of_another_name_is_used(folder: Path, tiny_checkpoint: Path) -> None:
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    same(read_folder(folder), read_folder(tiny_checkpoint))


def test_only_the_files_of_the_index_are_read(shards: Path, tiny_checkpoint: Path) -> None:
    (shards / "consolidated.safetensors").write_bytes(b"not even safetensors")
    same(read_folder(shards), read_folder(tiny_checkpoint))


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_half_precision_weights_are_read(folder: Path, tiny_checkpoint: Path, dtype: torch.dtype, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.update({key: it.to(dtype) for key, it in tensors.items()}))
    checkpoint, full = read_folder(folder), read_folder(tiny_checkpoint)
    assert checkpoint.source.weight_types == name
    for key in full.weights:
        assert checkpoint.weights[key].dtype == dtype
        assert torch.equal(checkpoint.weights[key], full.weights[key].to(dtype))
    decoder = Decoder(checkpoint.config)
    decoder.load_weights(checkpoint.weights)
    assert decoder.norm.weight.dtype == torch.float32


def test_untied_heads_are_read(tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path / "untied", tie_word_embeddings=False)
    checkpoint = read_folder(folder)
    assert not checkpoint.config.tie_word_embeddings
    assert torch.equal(checkpoint.weights["lm_head.weight"], load_file(folder / WEIGHTS)["lm_head.weight"])
    assert not torch.equal(checkpoint.weights["lm_head.weight"], checkpoint.weights["embed_tokens.weight"])


def test_redundant_tensors_are_ignored(folder: Path, tiny_checkpoint: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # of a tied model
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    edit_weights(folder, add)
    same(read_folder(folder), read_folder(tiny_checkpoint))


def test_token_ids_may_be_only_in_the_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=[2, 1])
    checkpoint = read_folder(folder)
    assert checkpoint.tokenizer.eos_token_ids == (2, 1)
    assert checkpoint.generation == {"bos_token_id": 0, "eos_token_id": [2, 1], "pad_token_id": 2}


def test_generation_defaults_are_kept(folder: Path) -> None:
    edit_json(folder / "generation_config.json", temperature=0.7, top_p=0.9, do_sample=True, transformers_version="5")
    generation = read_folder(folder).generation
    assert {key: generation[key] for key in ("temperature", "top_p", "do_sample")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "do_sample": True,
    }
    assert "transformers_version" not in generation


@pytest.mark.parametrize("place", ["file", "config", "named", "nowhere"])
def test_the_chat_template_is_found_in_all_places(folder: Path, place: str) -> None:
    (folder / "chat_template.jinja").unlink()
    if place == "file":
        (folder / "chat_template.jinja").write_text("{{ 'new' }}")
        edit_json(folder / "tokenizer_config.json", chat_template="{{ 'old' }}")
    elif place == "config":
        edit_json(folder / "tokenizer_config.json", chat_template="{{ 'new' }}")
    elif place == "named":
        named = [{"name": "tool", "template": "{{ 'old' }}"}, {"name": "default", "template": "{{ 'new' }}"}]
        edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert read_folder(folder).tokenizer.chat_template == (None if place == "nowhere" else "{{ 'new' }}")


# ---- invalid weights


def test_a_missing_tensor_is_an_error(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_weights(folder, lambda tensors: tensors.pop(name))
    refused(folder, str(folder), name, "missing")


def test_a_missing_head_is_an_error(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=False)
    refused(folder, str(folder), "lm_head.weight", "missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.input_layernorm.weight",
        "lm_head.bias",
        "model.embed_tokens.bias",
        "model.norm.bias",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
    ],
)
def test_an_unexpected_tensor_is_an_error(folder: Path, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(64)}))
    refused(folder, str(folder), name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (330, 64)),
        ("model.norm.weight", (63,)),
        ("model.norm.weight", (1, 64)),
        ("model.norm.weight", ()),
        ("model.layers.0.self_attn.q_proj.weight", (64, 128)),
        ("model.layers.0.self_attn.v_proj.weight", (64, 65)),
        ("model.layers.1.mlp.down_proj.weight", (128, 64)),
        ("model.layers.1.mlp.up_proj.weight", (0, 64)),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_an_error(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))
    refused(folder, str(folder), name, str(shape))


def test_parts_of_a_packed_projection_are_checked_separately(folder: Path) -> None:
    """Moving query rows to the key keeps the packed height but is a different model."""

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        key, query = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "kq")
        tensors[key], tensors[query] = tensors[query], tensors[key]

    edit_weights(folder, swap)
    refused(folder, "q_proj.weight")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float8_e4m3fn])
def test_a_tensor_of_an_unsupported_type_is_an_error(folder: Path, dtype: torch.dtype) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).to(dtype)}))
    refused(folder, str(folder / WEIGHTS), "model.norm.weight", "supported: BF16, F16, F32, F64")


@pytest.mark.parametrize("keep", [0, 5, 8, 400, -1])
def test_a_truncated_file_is_an_error(folder: Path, keep: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    refused(folder, str(folder / WEIGHTS), "damaged")


def test_a_folder_without_weights_is_an_error(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, str(folder), "no weights", WEIGHTS)


def test_several_files_without_an_index_are_an_error(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    refused(folder, str(folder), "2 .safetensors files", INDEX)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", ""], ids=repr
)
def test_an_index_with_paths_outside_the_folder_is_an_error(shards: Path, name: str) -> None:
    shutil.copy(next(shards.glob("*.safetensors")), shards.parent / WEIGHTS)
    (shards / "sub").mkdir()
    shutil.copy(shards.parent / WEIGHTS, shards / "sub")
    names = json.loads((shards / INDEX).read_text())["weight_map"]
    edit_json(shards / INDEX, weight_map=names | {"model.norm.weight": name})
    refused(shards, str(shards))


def test_an_index_with_a_missing_file_is_an_error(shards: Path) -> None:
    path = sorted(shards.glob("*.safetensors"))[1]
    path.unlink()
    refused(shards, str(path), "missing")


@pytest.mark.parametrize("content", ['{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}", "[]", "{", ""])
def test_an_invalid_index_is_an_error(shards: Path, content: str) -> None:
    (shards / INDEX).write_text(content)
    refused(shards, INDEX)


# ---- configs


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_an_error(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, str(folder), name)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX, "tokenizer.json"]
)
def test_a_file_that_is_not_text_is_an_error(folder: Path, name: str) -> None:
    if name == INDEX:
        (folder / WEIGHTS).unlink()  # which takes precedence
    (folder / name).write_bytes(b"\xff\xfe\x00")
    refused(folder, str(folder / name))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model_type": "llama"', "[" * 100_000])
def test_a_config_that_is_not_an_object_is_an_error(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, str(folder / "config.json"))


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type"]
)
def test_a_missing_config_key_is_an_error(folder: Path, key: str) -> None:
    edit_json(folder / "config.json", **{key: GONE})
    refused(folder, "config.json", key)


INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize(
    "value", ["64", 64.0, True, [64], {"a": 1}, 0, -64, 10**18, 10**400], ids=lambda it: repr(it)[:20]
)
def test_an_invalid_size_is_an_error(folder: Path, key: str, value: Any) -> None:
    edit_json(folder / "config.json", **{key: value})
    refused(folder, key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", True),
        ("rope_theta", "1e4"),
        ("rope_theta", 0),
        ("rope_theta", float("inf")),
        pytest.param("rope_theta", 10**400, id="rope_theta-of 400 digits"),
        ("tie_word_embeddings", "false"),
    ],
)
def test_an_invalid_number_is_an_error(folder: Path, key: str, value: Any) -> None:
    edit_json(folder / "config.json", **{key: value}, rope_parameters=GONE)
    refused(folder, key)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, ["num_attention_heads (4)", "num_key_value_heads (3)"]),
        ({"hidden_size": 62, "head_dim": GONE}, ["hidden_size (62)", "num_attention_heads (4)"]),
        ({"head_dim": 33}, ["head_dim 33"]),
        ({"rms_norm_eps": -1.0}, ["norm_eps is -1.0"]),
        ({"rms_norm_eps": float("nan")}, ["norm_eps is nan"]),
        ({"model_type": "mixtral"}, ["model_type 'mixtral'", "(similar: mistral)", "llm-export --families"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            ["quantization_config", "'gptq', but", "has no weights of that kind"],
        ),
        ({"quantization_config": "4bit"}, ["quantization_config"]),
        ({"hidden_act": "tanh"}, ["hidden_act 'tanh'", "'silu'"]),
        ({"attention_bias": True}, ["q_proj.bias", "missing"]),
        ({"mlp_bias": True}, ["gate_proj.bias", "missing"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, ["low_freq_factor"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}, "rope_parameters": GONE}, ["rope_scaling", "factor"]),
        ({"rope_scaling": {"rope_type": "ntk"}, "rope_parameters": GONE}, ["rope_scaling", "'ntk'"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, ["rope_theta"]),
        ({"rope_scaling": 2.0, "rope_parameters": GONE}, ["rope_scaling"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_variants_are_errors(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_json(folder / "config.json", **changes)
    refused(folder, *words)


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 500.0, "rope_parameters": GONE}, 500.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 600.0}}, 600.0),
        ({"rope_theta": 700.0, "rope_scaling": None, "rope_parameters": GONE}, 700.0),
        ({"rope_parameters": GONE}, 10_000.0),
    ],
    ids=["before transformers 5", "transformers 5", "null", "default"],
)
def test_rope_theta_is_found_in_all_places(folder: Path, changes: dict[str, Any], theta: float) -> None:
    edit_json(folder / "config.json", **changes)
    assert [rope.theta for rope in read_folder(folder).config.ropes] == [theta]


def test_defaults_match_transformers() -> None:
    from transformers import LlamaConfig

    given = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    ours = find_family("llama").read_config(ConfigReader({"num_attention_heads": 4, **given}))
    theirs = LlamaConfig(num_attention_heads=4, **given)
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.norm_eps == theirs.rms_norm_eps
    assert [rope.theta for rope in ours.ropes] == [theirs.rope_parameters["rope_theta"]]


@pytest.mark.parametrize("value", ["2", True, [2, "x"], 2.0, [[2]]], ids=repr)
def test_an_invalid_token_id_is_an_error(folder: Path, value: Any) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=value)
    refused(folder, "eos_token_id")


def test_extra_special_tokens_use_a_key_known_to_all_transformers_versions(folder: Path) -> None:
    """Version 5 writes a list under a name for which version 4 requires a mapping; it also reads the old name."""
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=["<|im_start|>"], additional_special_tokens=GONE)
    config = read_folder(folder).tokenizer.tokenizer_config
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in config
