"""Tokenizers larger or smaller than the embedding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
from tokenizers import models, pre_tokenizers

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime import Model, SamplingParams
from llm_edge.runtime.errors import CheckpointError

VOCABULARY = 331  # rows of the embedding; the tokenizer has 320 tokens


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder), SourceOptions(), lambda _: None)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add(folder: Path, count: int, *, special: bool = False) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = [tokenizers.AddedToken(f"<new {number}>", special=special) for number in range(count)]
    tokenizer.add_special_tokens(names) if special else tokenizer.add_tokens(names)
    tokenizer.save(str(folder / "tokenizer.json"))


def read(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("count", [12, 13, 40])
def test_added_tokens_without_an_embedding_are_left_out(folder: Path, special: bool, count: int) -> None:
    add(folder, count, special=special)
    checkpoint = opened(folder)
    tokenizer = read(checkpoint)
    assert max(tokenizer.get_vocab(with_added_tokens=True).values()) == VOCABULARY - 1
    assert tokenizer.token_to_id("<new 10>") == VOCABULARY - 1
    text = "Hello <new 3> and <new 11>!"
    ids = tokenizer.encode(text).ids
    assert max(ids) < VOCABULARY
    assert 323 in ids  # <new 3>
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    (note,) = checkpoint.notes
    assert note.startswith("tokens without an embedding (it has 331 rows) are left out: <new 11>")


def test_a_padding_token_beyond_the_embedding_is_no_padding_token(folder: Path) -> None:
    add(folder, 11)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.enable_padding(pad_id=VOCABULARY, pad_token="[PAD]")
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", pad_token="[PAD]")
    edit(folder / "generation_config.json", pad_token_id=VOCABULARY, eos_token_id=[2, VOCABULARY])
    checkpoint = opened(folder)
    assets = checkpoint.tokenizer
    assert (assets.pad_token_id, assets.eos_token_ids) == (None, (2,))
    assert "pad_token" not in assets.tokenizer_config
    assert "pad_token" not in assets.special_tokens_map
    assert "pad_token_id" not in checkpoint.generation
    assert checkpoint.generation["eos_token_id"] == 2
    assert checkpoint.notes == (
        "tokens without an embedding (it has 331 rows) are left out: [PAD]",
        "eos_token_id 331 has no embedding and is left out",
        "pad_token_id 331 has no embedding and is left out",
    )


def test_a_bundle_of_a_larger_tokenizer_answers(folder: Path, tmp_path: Path) -> None:
    add(folder, 20)
    edit(folder / "generation_config.json", pad_token_id=VOCABULARY + 3)
    report = export(str(folder), ExportOptions(tmp_path / "bundle", precision="fp32", validate=False))
    assert len(report.notes) == 2
    model = Model.load(tmp_path / "bundle")
    answer = model.generate("Hello <new 15>", SamplingParams(temperature=0, max_tokens=4)).result()
    assert len(answer.tokens) == 4


def smaller_embedding(folder: Path, rows: int) -> Path:
    """Write a model with fewer rows than the tokenizer has tokens."""
    return tiny.save_checkpoint(folder, vocab_size=rows)


def test_merged_tokens_without_an_embedding_are_left_out(tmp_path: Path) -> None:
    folder = smaller_embedding(tmp_path / "model", 310)
    checkpoint = opened(folder)
    tokenizer, whole = read(checkpoint), tiny.tokenizer()
    assert tokenizer.get_vocab_size() == 310
    ids = tokenizer.encode(tiny.TEXT).ids
    assert max(ids) < 310 <= max(whole.encode(tiny.TEXT).ids)
    assert tokenizer.decode(ids) == whole.decode(whole.encode(tiny.TEXT).ids)


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel"])
def test_other_kinds_of_vocabularies_are_shortened(folder: Path, kind: str) -> None:
    words = ["<unk>", *(f"w{number}" for number in range(VOCABULARY + 5))]
    if kind == "Unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram([(word, -1.0) for word in words], 0, byte_fallback=False))
    else:
        tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    shortened = read(opened(folder))
    assert shortened.get_vocab_size() == VOCABULARY
    first, *others = shortened.encode(f"w3 w{VOCABULARY + 2}").ids
    assert first == 4
    assert others[-1] == 0  # unknown
    assert max(others) < VOCABULARY


def test_a_much_larger_tokenizer_is_of_another_model(folder: Path) -> None:
    add(folder, 100)
    with pytest.raises(CheckpointError, match=r"token 419, .* 331 tokens: use the tokenizer that belongs"):
        opened(folder)


def test_a_token_that_is_added_to_every_text_is_required(folder: Path) -> None:
    add(folder, 12)
    template = {"single": [{"SpecialToken": {"id": "<new 11>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    edit(
        folder / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            **template,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<new 11>": {"id": "<new 11>", "ids": [VOCABULARY], "tokens": ["<new 11>"]}},
        },
    )
    with pytest.raises(CheckpointError, match=r"adds '<new 11>' to every text"):
        opened(folder)


def test_a_smaller_tokenizer_needs_no_note(folder: Path) -> None:
    assert opened(folder).notes == ()
