"""Model-parallel shards of Meta's releases are read as the model that was sliced."""

from __future__ import annotations

import json
from pathlib import Path

import original
import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from test_other_vocabularies import mixed, ranks, save_ranks, sentencepiece_model
from tokenizers import Tokenizer
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.meta import checkpoint as meta_checkpoint
from llm_edge.checkpoint.source import SourceOptions, bundle_name, open_checkpoint
from llm_edge.checkpoint.text import tiktoken_file
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.errors import CheckpointError

ROWS, COLUMNS = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")
Shards = list[dict[str, Tensor]]


def sliced(tensors: dict[str, Tensor], count: int, *, embedding_axis: int) -> Shards:
    """The slices of each tensor, as fairscale's parallel layers hold them."""
    shards: Shards = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        layer = name.split(".")[-2]
        axis = embedding_axis if layer == "tok_embeddings" else 0 if layer in ROWS else 1 if layer in COLUMNS else None
        parts = [tensor] * count if axis is None else torch.chunk(tensor, count, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.contiguous().clone()
    return shards


@pytest.fixture
def family(tmp_path: Path) -> original.Saved:
    """A model with Meta's config and tokenizer.json, whose file is to be replaced by shards."""
    saved = original.save_family(tmp_path / "Llama", suffix=".pth", n_kv_heads=2, vocab_size=332)
    shape = saved.model.shape
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta")
    params = {key: getattr(shape, key) for key in keys}
    (saved.folder / "params.json").write_text(json.dumps({**params, "vocab_size": -1, "multiple_of": 256}))
    (saved.folder / "config.yaml").unlink()
    saved.path.unlink()
    return saved


def save(folder: Path, shards: Shards, suffix: str = ".pth") -> None:
    for number, tensors in enumerate(shards):
        path = folder / f"consolidated.{number:02}{suffix}"
        if suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors, path)


def read(path: Path, tokenizer: Path) -> Checkpoint:
    options = meta_checkpoint.StateDictOptions(tokenizer=tokenizer)
    return open_checkpoint(str(path), SourceOptions(options), lambda _: None)


@torch.inference_mode()
def agrees(checkpoint: Checkpoint, model: original.Original) -> None:
    decoder = Decoder(checkpoint.config).eval()
    decoder.load_weights(checkpoint.weights)
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    logits, *_ = decoder(ids, torch.ones_like(ids), decoder.empty_past())
    assert (logits - model(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("embedding_axis", [1, 0])  # Llama 2, Llama 3
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_slices_are_concatenated(embedding_axis: int, suffix: str, family: original.Saved) -> None:
    save(family.folder, sliced(family.model.state_dict(), 2, embedding_axis=embedding_axis), suffix)
    for path in (family.folder, family.folder / f"consolidated.01{suffix}"):
        checkpoint = read(path, family.folder / "tokenizer")
        agrees(checkpoint, family.model)
        assert checkpoint.source.name == "Llama"
        assert [file.name for file in checkpoint.source.files] == [f"consolidated.0{n}{suffix}" for n in (0, 1)]
    assert bundle_name(str(family.folder / f"consolidated.00{suffix}")) == "Llama"


def test_consolidated_safetensors_of_mistral_is_read(family: original.Saved) -> None:
    save_file(dict(family.model.state_dict()), family.folder / "consolidated.safetensors")
    checkpoint = read(family.folder, family.folder / "tokenizer")
    agrees(checkpoint, family.model)
    assert checkpoint.source.name == "Llama"


def test_incomplete_or_mixed_shards_are_rejected_in_one_line(family: original.Saved) -> None:
    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words) as caught:
            read(family.folder / "consolidated.00.pth", family.folder / "tokenizer")
        assert "\n" not in str(caught.value)

    first, second, third, _ = sliced(family.model.state_dict(), 4, embedding_axis=1)
    save(family.folder, [first, second, third])
    refused("dim is 64, but tok_embeddings.weight has 48 columns")  # the slices of the fourth are missing
    (family.folder / "consolidated.01.pth").unlink()
    refused(r"consolidated\.01\.pth is missing: the checkpoint is incomplete")
    save(family.folder, [first, {**second, "extra.weight": torch.ones(2, 2)}, third])
    refused(r"extra\.weight is not in every shard")
    save(family.folder, [first, {**second, "norm.weight": torch.ones(5)}, third])
    refused(r"different shapes or types of norm\.weight")


def test_the_sentencepiece_vocabulary_of_llama_2_is_read(family: original.Saved) -> None:
    model = sentencepiece_model()
    theirs = SentencePieceProcessor(model_proto=model)
    saved = original.save_family(family.folder, suffix=".pth", n_kv_heads=2, vocab_size=theirs.vocab_size())
    saved.path.unlink()
    (family.folder / "config.yaml").unlink()
    save(family.folder, sliced(saved.model.state_dict(), 2, embedding_axis=1))
    (family.folder / "tokenizer.model").write_bytes(model)
    checkpoint = open_checkpoint(str(family.folder), SourceOptions(), lambda _: None)
    assert checkpoint.generation == {"bos_token_id": 1, "eos_token_id": 2}
    loaded = Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json)
    assert loaded.encode("señor 123").ids == [1, *theirs.encode("señor 123")]


def test_the_vocabulary_of_llama_3_is_read(family: original.Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    tokens = ranks()
    monkeypatch.setattr(tiktoken_file, "_META_RANKS", len(tokens))
    saved = original.save_family(family.folder, suffix=".pth", n_kv_heads=2, vocab_size=len(tokens) + 256)
    saved.path.unlink()
    (family.folder / "config.yaml").unlink()
    save(family.folder, sliced(saved.model.state_dict(), 2, embedding_axis=0))
    save_ranks(family.folder / "tokenizer.model", tokens)
    checkpoint = open_checkpoint(str(family.folder), SourceOptions(), lambda _: None)
    agrees(checkpoint, saved.model)
    assert checkpoint.generation["eos_token_id"] == [len(tokens) + 1, len(tokens) + 9]
    known = tiktoken_file.KNOWN[tiktoken_file.META_LLAMA3]
    theirs = tiktoken.Encoding(
        "x", pat_str=known.pattern, mergeable_ranks={t: n for n, t in enumerate(tokens)}, special_tokens={}
    )
    loaded = Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json)
    for text in mixed(8):
        assert loaded.encode(text).ids == [len(tokens), *theirs.encode(text)]
