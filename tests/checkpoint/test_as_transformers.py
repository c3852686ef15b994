"""Folders that people really have: each is read as transformers reads it, or refused with the ambiguity named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROMPT = [10, 20, 30, 40]
TOKENS = 10

Tensors = dict[str, torch.Tensor]


def greedy(step: Callable[[torch.Tensor], torch.Tensor]) -> list[int]:
    """Greedy tokens after the prompt; `step` returns logits [1, T, V] of ids [1, T]."""
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(TOKENS):
            ids.append(int(step(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


def ours(checkpoint: Checkpoint) -> list[int]:
    decoder = Decoder(checkpoint.config).eval()
    decoder.load_weights(checkpoint.weights)
    return greedy(lambda ids: decoder(ids, torch.ones_like(ids), decoder.empty_past(), 0)[0])


def theirs(folder: Path) -> list[int]:
    """Greedy tokens of the model that transformers loads from a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return greedy(lambda ids: model(ids).logits)


def random_tensors(folder: Path) -> Tensors:
    """Replace the weights of a folder by larger ones, with which greedy tokens vary; returns the tensors."""
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        tensors[name] = torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.ndim > 1 else 1.0)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return tensors


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def write_shards(folder: Path, shards: list[Tensors], weight_map: Mapping[str, str] | None = None) -> list[str]:
    """Write shards with an index in place of the single file; without a map each tensor is in its first shard."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    found: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        save_file({key: tensor.clone() for key, tensor in shard.items()}, folder / name, {"format": "pt"})
        found = dict.fromkeys(shard, name) | found
    content = {"metadata": {"total_size": 0}, "weight_map": found | dict(weight_map or {})}
    (folder / INDEX).write_text(json.dumps(content))
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of an untied model that the test may change."""
    return tiny.save_checkpoint(tmp_path / "model", tie_word_embeddings=False)


@pytest.fixture
def tensors(folder: Path) -> Tensors:
    """Its tensors."""
    return random_tensors(folder)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ---- output head and embedding


def test_a_tied_flag_is_overruled_by_a_different_head(folder: Path, tensors: Tensors) -> None:
    expected = theirs(folder)
    edit_config(folder, tie_word_embeddings=True)
    checkpoint = read_folder(folder)
    assert ours(checkpoint) == theirs(folder) == expected
    assert not checkpoint.config.tie_word_embeddings
    assert checkpoint.hf_config["tie_word_embeddings"] is False
    (note,) = checkpoint.notes
    assert note.startswith("config.json: tie_word_embeddings is true, but lm_head.weight differs")


def test_one_different_element_unties_the_head(folder: Path, tensors: Tensors) -> None:
    head = tensors[EMBEDDING].clone()
    head[7, 3] += 1e-3
    write(folder, tensors | {HEAD: head})
    edit_config(folder, tie_word_embeddings=True)
    checkpoint = read_folder(folder)
    assert torch.equal(checkpoint.weights[HEAD], head)
    assert ours(checkpoint) == theirs(folder)


@pytest.mark.parametrize("missing", [EMBEDDING, HEAD])
def test_a_tied_model_may_store_either_name(folder: Path, tensors: Tensors, missing: str) -> None:
    kept = HEAD if missing == EMBEDDING else EMBEDDING
    write(folder, {name: tensor for name, tensor in tensors.items() if name != missing})
    edit_config(folder, tie_word_embeddings=True)
    checkpoint = read_folder(folder)
    assert checkpoint.config.tie_word_embeddings
    assert torch.equal(checkpoint.weights["embed_tokens.weight"], tensors[kept])
    assert ours(checkpoint) == theirs(folder)
    assert checkpoint.notes == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_copies_are_tied(folder: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    rounded = tensors[EMBEDDING].bfloat16()
    write(folder, tensors | {EMBEDDING: rounded.float(), HEAD: rounded.to(dtype)})
    edit_config(folder, tie_word_embeddings=True)
    checkpoint = read_folder(folder)
    assert checkpoint.config.tie_word_embeddings
    assert checkpoint.notes == ()
    assert ours(checkpoint) == theirs(folder)


def test_a_model_with_neither_is_refused(folder: Path, tensors: Tensors) -> None:
    write(folder, {name: tensor for name, tensor in tensors.items() if name not in (EMBEDDING, HEAD)})
    edit_config(folder, tie_word_embeddings=True)
    refused(folder, EMBEDDING, "missing")


@pytest.mark.parametrize("missing", [EMBEDDING, HEAD])
def test_an_untied_model_requires_both(folder: Path, tensors: Tensors, missing: str) -> None:
    write(folder, {name: tensor for name, tensor in tensors.items() if name != missing})
    refused(folder, missing, "missing")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "gpt_neox", "gemma3_text", "qwen2", "granite"])
@pytest.mark.parametrize("stored", ["both", "embedding", "head"])
def test_heads_of_every_layout_are_tied_as_transformers_does(tmp_path: Path, name: str, stored: str) -> None:
    case = next(case for case, (kind, _) in families.CASES.items() if kind == name)
    model = families.model(case)
    folder = families.save(model, tmp_path / "model")
    embedding, head = ("gpt_neox.embed_in.weight", "embed_out.weight") if name == "gpt_neox" else (None, HEAD)
    tensors = load_file(folder / WEIGHTS)
    embedding = embedding or next(key for key in tensors if key.endswith(("wte.weight", "embed_tokens.weight")))
    tensors[head] = tensors[embedding] * (1.5 if stored == "both" else 1)
    removed = {"both": "", "embedding": head, "head": embedding}[stored]
    write(folder, {key: tensor for key, tensor in tensors.items() if key != removed})
    edit_config(folder, tie_word_embeddings=True)
    checkpoint = read_folder(folder)
    assert checkpoint.config.tie_word_embeddings == (stored != "both")
    assert ours(checkpoint) == theirs(folder)


# ---- files and shards


def split(tensors: Tensors) -> tuple[Tensors, Tensors]:
    names = sorted(tensors)
    half = len(names) // 2
    return {name: tensors[name] for name in names[:half]}, {name: tensors[name] for name in names[half:]}


@pytest.mark.parametrize("indexed", [0, 1])
def test_equal_copies_in_two_shards_are_accepted(folder: Path, tensors: Tensors, indexed: int) -> None:
    first, second = split(tensors)
    name = next(iter(second))
    names = write_shards(folder, [first | {name: second[name]}, second])
    write_shards(folder, [first | {name: second[name]}, second], {name: names[indexed]})
    assert ours(read_folder(folder)) == theirs(folder)


def test_a_copy_that_both_the_index_and_transformers_take_is_used(folder: Path, tensors: Tensors) -> None:
    first, second = split(tensors)
    name = next(key for key in second if second[key].ndim == 2)
    shards = [first | {name: second[name] * 2}, second]
    names = write_shards(folder, shards)
    write_shards(folder, shards, {name: names[1]})
    checkpoint = read_folder(folder)
    assert ours(checkpoint) == theirs(folder)


@pytest.mark.parametrize("indexed", ["first", "none"])
def test_different_copies_are_refused_if_loaders_disagree(folder: Path, tensors: Tensors, indexed: str) -> None:
    first, second = split(tensors)
    name = next(key for key in second if second[key].ndim == 2)
    names = write_shards(folder, [first | {name: second[name] * 2}, second])
    if indexed == "none":
        content = json.loads((folder / INDEX).read_text())
        del content["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(content))
    refused(folder, name, *names, "remove the wrong copy")


def test_a_whole_file_is_preferred_to_a_stale_index(folder: Path, tensors: Tensors) -> None:
    write_shards(folder, [{name: tensor * 2 for name, tensor in part.items()} for part in split(tensors)])
    write(folder, tensors)
    checkpoint = read_folder(folder)
    assert ours(checkpoint) == theirs(folder)
    assert [file.name for file in checkpoint.source.files] == [WEIGHTS]
    assert checkpoint.notes == (f"{INDEX} and its shards are ignored: transformers loads {WEIGHTS}",)


@pytest.mark.parametrize("layout", ["whole", "shards"])
def test_safetensors_are_preferred_to_pytorch_files(folder: Path, tensors: Tensors, layout: str) -> None:
    if layout == "shards":
        write_shards(folder, list(split(tensors)))
    torch.save({name: tensor * 2 for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    assert ours(read_folder(folder)) == theirs(folder)


def test_shards_of_pytorch_files_are_read(folder: Path, tensors: Tensors) -> None:
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for number, part in enumerate(split(tensors), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert ours(read_folder(folder)) == theirs(folder)


def test_an_index_may_name_the_wrong_shard_or_a_tensor_that_is_absent(folder: Path, tensors: Tensors) -> None:
    first, second = split(tensors)
    names = write_shards(folder, [first, second])
    moved = dict.fromkeys(first, names[1]) | {"model.layers.9.mlp.up_proj.weight": names[0]}
    write_shards(folder, [first, second], moved)
    assert ours(read_folder(folder)) == theirs(folder)


def test_the_file_that_the_config_names_is_used(folder: Path, tensors: Tensors) -> None:
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / "best.safetensors", {"format": "pt"})
    edit_config(folder, transformers_weights="best.safetensors")
    checkpoint = read_folder(folder)
    assert [file.name for file in checkpoint.source.files] == ["best.safetensors"]
    assert ours(checkpoint) == theirs(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "weights.pt", 3, "", "absent.safetensors"])
def test_an_invalid_file_name_in_the_config_is_refused(folder: Path, name: Any) -> None:
    edit_config(folder, transformers_weights=name)
    refused(folder, str(folder))


# ---- token ids


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"pad_token_id": -1}, (0, (2,), None)),
        ({"bos_token_id": -1, "pad_token_id": -100}, (None, (2,), None)),
        ({"eos_token_id": -1}, (0, (), 2)),
        ({"eos_token_id": [2, -1]}, (0, (2,), 2)),
        ({"eos_token_id": [-1, 5, 2]}, (0, (5, 2), 2)),
        ({"eos_token_id": []}, (0, (), 2)),
    ],
    ids=str,
)
def test_negative_ids_mean_none(folder: Path, tensors: Tensors, file: str, ids: dict[str, Any], expected: Any) -> None:
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    checkpoint = read_folder(folder)
    assets = checkpoint.tokenizer
    assert (assets.bos_token_id, assets.eos_token_ids, assets.pad_token_id) == expected
    assert ours(checkpoint) == theirs(folder)


# ---- wrappers


def inserted(attribute: str, *places: str) -> Callable[[str], str]:
    """Insert an attribute after each of these parts of a name; "" is the front."""

    def rename(name: str) -> str:
        for place in places:
            name = name.replace(place, f"{place}{attribute}.", 1) if place else f"{attribute}.{name}"
        return name

    return rename


WRAPPERS: Mapping[str, Callable[[str], str]] = {
    "DDP": inserted("module", ""),
    "DDP of torch.compile": lambda name: f"module._orig_mod.{name}",
    "torch.compile": inserted("_orig_mod", ""),
    "torch.compile of the base": inserted("_orig_mod", "model."),
    "torch.compile of each layer": inserted("_orig_mod", "layers.0.", "layers.1."),
    "FSDP": inserted("_fsdp_wrapped_module", "", "layers.0.", "layers.1."),
    "old FSDP": lambda name: f"_fsdp_wrapped_module._fpw_module.{name}",
    "FSDP of the base": inserted("_fsdp_wrapped_module", "model.", "layers.1.", "mlp."),
    "checkpointing": inserted("_checkpoint_wrapped_module", "layers.0.", "layers.1."),
    "Fabric": inserted("_forward_module", ""),
    "Lightning": inserted("model", ""),
    "Lightning with DDP": lambda name: f"model.module.{name}",
    "Lightning with FSDP": lambda name: f"_forward_module.model._fsdp_wrapped_module.{name}",
    "an attribute": inserted("policy.net", ""),
    "peft": lambda name: f"base_model.model.{name}",
    "peft with base layers": lambda name: f"base_model.model.{name}".replace(
        "q_proj.weight", "q_proj.base_layer.weight"
    ),
    "DDP of the base": lambda name: name.replace("model.", "model.module.") if name.startswith("model.") else name,
    "a renamed base": lambda name: name.replace("model.", "backbone.") if name.startswith("model.") else name,
    "a renamed base in a module": lambda name: (
        f"agent.{name.replace('model.', 'backbone.') if name.startswith('model.') else name}"
    ),
    "the base alone with a head": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_names_of_wrapped_models_are_understood(folder: Path, tensors: Tensors, wrapper: str, tied: bool) -> None:
    if tied:
        del tensors[HEAD]
        edit_config(folder, tie_word_embeddings=True)
        write(folder, tensors)
    expected = theirs(folder)
    write(folder, {WRAPPERS[wrapper](name): tensor for name, tensor in tensors.items()})
    assert ours(read_folder(folder)) == expected


CONTAINERS: Mapping[str, Callable[[Any], Any]] = {
    **{
        key: lambda tensors, key=key: {key: tensors, "epoch": 3, "lr": 1e-4}  # type: ignore[misc]
        for key in ("module", "ema", "state_dict", "model_state_dict", "model", "params", "weights", "ema_state_dict")
    },
    "anything": lambda tensors: {"net_g": tensors},
    "nested": lambda tensors: {"state": {"app": {"model": tensors}}, "step": torch.tensor(5)},
    "with an optimizer": lambda tensors: {
        "optimizer": {"state": {name: {"exp_avg": tensor} for name, tensor in tensors.items()}},
        "optim_states": dict(tensors),
        "model": tensors,
    },
    "twice": lambda tensors: {"state_dict": tensors, "best": tensors},
    "with buffers": lambda tensors: {"model": tensors, "buffers": {"rope.freqs": torch.ones(3)}},
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("wrapper", ["DDP", "Lightning"])
def test_state_dicts_in_tables_of_any_name_are_found(
    folder: Path, tensors: Tensors, container: str, wrapper: str
) -> None:
    expected = theirs(folder)
    (folder / WEIGHTS).unlink()
    renamed = {WRAPPERS[wrapper](name): tensor for name, tensor in tensors.items()}
    torch.save(CONTAINERS[container](renamed), folder / "pytorch_model.bin")
    assert ours(read_folder(folder)) == expected


@pytest.mark.parametrize("other", ["ema", "ema_state_dict", "teacher"])
def test_two_state_dicts_in_a_file_are_refused(folder: Path, tensors: Tensors, other: str) -> None:
    (folder / WEIGHTS).unlink()
    average = {name: tensor * 0.9 for name, tensor in tensors.items()}
    torch.save({"model": tensors, other: average}, folder / "pytorch_model.bin")
    refused(folder, "'model'", f"'{other}'", "save the one to export")


def test_two_models_in_a_state_dict_are_refused(folder: Path, tensors: Tensors) -> None:
    write(folder, {f"{part}.{name}": tensor for part in ("student", "teacher") for name, tensor in tensors.items()})
    refused(folder, "'student.model.'", "'teacher.model.'")


def test_a_model_at_the_top_level_is_preferred(folder: Path, tensors: Tensors) -> None:
    write(folder, tensors | {f"ema_model.{name}": tensor * 0.9 for name, tensor in tensors.items()})
    checkpoint = read_folder(folder)
    assert ours(checkpoint) == theirs(folder)
    (note,) = checkpoint.notes
    assert note.startswith("ema_model.lm_head.weight, ema_model.model.embed_tokens.weight and ")


def test_two_heads_are_refused(folder: Path, tensors: Tensors) -> None:
    renamed = {f"net.{name}": tensor for name, tensor in tensors.items()}
    write(folder, renamed | {HEAD: tensors[HEAD] * 2})
    refused(folder, "net.lm_head.weight", "could both be lm_head.weight")


def test_lora_weights_that_are_not_merged_are_refused(folder: Path, tensors: Tensors) -> None:
    renamed = {WRAPPERS["peft with base layers"](name): tensor for name, tensor in tensors.items()}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    write(folder, renamed | {name: torch.ones(4, 64)})
    refused(folder, "lora_A", "not merged", "--adapter")


# ---- tensors that the model does not use

STRAY = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": 16,
    "model.layers.1.self_attn.rotary_emb.cos_cached": 64,
    "model.rotary_emb.inv_freq": 16,
    "model.rotary_emb.original_inv_freq": 16,
    "model.position_ids": 8,
    "model.layers.0.self_attn.causal_mask": 8,
    "model.layers.0.self_attn.k_scale": 1,
    "model.layers.0.self_attn.q_proj.input_quantizer._amax": 1,
    "model.layers.0.mlp.num_batches_tracked": 1,
    "n_averaged": 1,
}
UNUSED = ["score.weight", "v_head.summary.weight", "model.vision_tower.patch.weight", "loss_fn.margin", "mtp.0.weight"]


@pytest.mark.parametrize("name", STRAY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_buffers_are_ignored(folder: Path, tensors: Tensors, name: str, dtype: torch.dtype) -> None:
    write(folder, tensors | {name: torch.ones(STRAY[name], dtype=dtype)})
    checkpoint = read_folder(folder)
    assert checkpoint.notes == ()
    assert ours(checkpoint) == theirs(folder)


@pytest.mark.parametrize("name", UNUSED)
def test_tensors_outside_of_the_model_are_named(folder: Path, tensors: Tensors, name: str) -> None:
    write(folder, tensors | {name: torch.ones(3, 3)})
    checkpoint = read_folder(folder)
    assert checkpoint.notes == (f"{name} left out: not used by the model",)
    assert ours(checkpoint) == theirs(folder)


@pytest.mark.parametrize("name", [HEAD.replace("weight", "bias"), "model.layers.1.self_attn.q_proj.bias"])
def test_biases_that_the_config_does_not_have_must_be_zero(folder: Path, tensors: Tensors, name: str) -> None:
    write(folder, tensors | {name: torch.zeros(64)})
    checkpoint = read_folder(folder)
    assert checkpoint.notes == (f"{name} left out: biases of zeros that the config does not have",)
    assert ours(checkpoint) == theirs(folder)
    write(folder, tensors | {name: torch.ones(64)})
    refused(folder, name)


def test_the_last_of_two_equal_keys_counts(folder: Path, tensors: Tensors) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"rms_norm_eps": 0.5, ', 1))
    checkpoint = read_folder(folder)
    assert checkpoint.config.norm_eps == 1e-5
    assert ours(checkpoint) == theirs(folder)
    assert checkpoint.notes == ("config.json: 'rms_norm_eps' given twice: the last value counts",)
