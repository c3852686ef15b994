"""Opening sources: bundle names, shortened contexts, options that do not apply."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from llm_edge.checkpoint.meta.config import StateDictOptions
from llm_edge.checkpoint.source import SourceOptions, bundle_name, open_checkpoint
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.bundle import ReasoningTokens
from llm_edge.runtime.errors import CheckpointError, ParameterError


def opened(source: Path | str, **options: Any) -> Any:
    adapter = options.pop("adapter", None)
    return open_checkpoint(str(source), SourceOptions(StateDictOptions(**options), adapter), lambda _: None)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("smollm2", "smollm2-135m"),
        ("models/My-Model.Q4_0.gguf", "My-Model.Q4_0"),
        ("runs/7/model.pt", "model"),
        ("runs/7/model.v2.safetensors", "model.v2"),
        ("Llama-3/consolidated.00.pth", "Llama-3"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B@main", "Qwen3-0.6B"),
        ("./folder/", "folder"),
    ],
)
def test_a_bundle_is_named_after_its_source(source: str, name: str) -> None:
    assert bundle_name(source) == name


def test_a_folder_takes_precedence_over_a_hub_id(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert opened("owner/name").source.name == "name"


@torch.inference_mode()
def test_a_shorter_context_does_not_change_logits_within_it(tiny_checkpoint: Path) -> None:
    whole, short = opened(tiny_checkpoint), opened(tiny_checkpoint, max_seq_len=64)
    assert (whole.config.max_position_embeddings, short.config.max_position_embeddings) == (1024, 64)
    ids = torch.arange(64)[None] + 3
    logits = []
    for checkpoint in (whole, short):
        decoder = Decoder(checkpoint.config).eval()
        decoder.load_weights(checkpoint.weights)
        logits.append(decoder(ids, torch.ones_like(ids), decoder.empty_past())[0])
    assert torch.equal(*logits)


@pytest.mark.parametrize("length", [0, 1, -5, 1025, 10**9])
def test_invalid_context_lengths_are_rejected(tiny_checkpoint: Path, length: int) -> None:
    with pytest.raises(ParameterError, match=r"--max-seq-len is .*2 to 1024"):
        opened(tiny_checkpoint, max_seq_len=length)


def test_learned_positions_cannot_be_shortened(tmp_path: Path) -> None:
    families.save(families.model("gpt2"), tmp_path)
    with pytest.raises(ParameterError, match="--max-seq-len"):
        opened(tmp_path, max_seq_len=64)


@pytest.mark.parametrize("option", [{"n_heads": 4}, {"rope_theta": 1e4}, {"config": Path("x")}, {"norm_eps": 1e-5}])
def test_options_of_bare_state_dicts_are_rejected_for_other_sources(
    tiny_checkpoint: Path, option: dict[str, Any]
) -> None:
    (name,) = option
    with pytest.raises(ParameterError, match=f"--{name.replace('_', '-')}: .*bare state dicts"):
        opened(tiny_checkpoint, **option)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))


def two_files(folder: Path) -> None:
    (folder / "config.json").unlink()
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")


def only_a_gguf(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "model.gguf").touch()


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("change", "words"), [(two_files, "name the file"), (only_a_gguf, "model.gguf"), (nothing, "has no config.json")]
)
def test_a_folder_without_exactly_one_checkpoint_is_an_error(
    folder: Path, change: Callable[[Path], None], words: str
) -> None:
    change(folder)
    with pytest.raises(CheckpointError, match=words):
        opened(folder)


def with_tokens(folder: Path, *texts: str, special: bool = False) -> Path:
    path = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=special) for text in texts])
    tokenizer.save(str(path))
    return folder


@pytest.mark.parametrize("special", [False, True])
def test_reasoning_tokens_are_found(folder: Path, special: bool) -> None:
    checkpoint = opened(with_tokens(folder, "<think>", "</think>", special=special))
    ids = {entry["content"]: entry["id"] for entry in json.loads(checkpoint.tokenizer.tokenizer_json)["added_tokens"]}
    assert checkpoint.reasoning == ReasoningTokens(ids["<think>"], ids["</think>"])


@pytest.mark.parametrize("texts", [(), ("<think>",), ("</think>",)])
def test_a_model_without_reasoning_tokens(folder: Path, texts: tuple[str, ...]) -> None:
    assert opened(with_tokens(folder, *texts)).reasoning is None


def test_an_adapter_alone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a LoRA adapter: export its base model with --adapter"):
        opened(tmp_path)


def test_a_missing_path_is_not_looked_up_on_the_hub(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "loop").symlink_to("loop")
    for source in ("models/nowhere", "models/loop"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            opened(source)
    with pytest.raises(CheckpointError, match="--adapter models/nowhere: no such folder"):
        opened(tiny_checkpoint, adapter="models/nowhere")


def test_a_state_dict_beside_a_config_is_used(folder: Path, tiny_checkpoint: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "weights.pt")
    (folder / "model.safetensors").unlink()
    ours, theirs = opened(folder).weights, opened(tiny_checkpoint).weights
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_single_shard_is_an_error(folder: Path) -> None:
    shard = (folder / "model.safetensors").rename(folder / "model-00003-of-00011.safetensors")
    with pytest.raises(CheckpointError, match="is shard 3 of 11: give the folder"):
        opened(shard)


def test_the_prefix_of_a_wrapped_model_is_reported(tmp_path: Path) -> None:
    torch.save({"state_dict": {"net.tok_embeddings.weight": torch.zeros(2, 2)}}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"net\.tok_embeddings\.weight.*state_dict of the model itself"):
        opened(tmp_path / "last.ckpt")


def test_a_model_with_an_adapter_in_the_same_folder_is_ambiguous(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has a model and a LoRA adapter.*remove adapter_config\.json"):
        opened(folder)
