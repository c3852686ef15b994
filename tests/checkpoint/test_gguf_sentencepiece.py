"""Compare SentencePiece vocabularies of GGUF files with sentencepiece and with transformers."""

from __future__ import annotations

import dataclasses
import functools
import io
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gguf import TokenType
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_gguf_tokenizer import folder, strings, with_metadata
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer

from llm_edge.checkpoint.base import TokenizerAssets
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.gguf.tokenizer import read_tokenizer
from llm_edge.checkpoint.text import sentencepiece_bpe
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.text import tokenizer as runtime

SPACES = ("▁▁", "▁▁▁", "▁▁▁▁▁")
USER_DEFINED = ["\n", "\n\n", "\t", *SPACES, "<b>", "<turn>", "x▁y"]  # the trainer takes a list only
CODE = ("def f(x):", "    return x  ==   y", "=" * 9, "a" * 11, "abab" * 4, "   \t  ", "🙂🙂 👩‍👩‍👧‍👦 ok")
RUNS = [char * count for char in " a=-" for count in range(1, 40)]

# Trained like the published vocabularies of Llama and Mistral, one with runs of spaces as pieces, Gemma's, an old one.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True},
    "words": {"byte_fallback": True, "split_by_whitespace": False, "allow_whitespace_only_pieces": True},
    "gemma": {"byte_fallback": True, "add_dummy_prefix": False, "user_defined_symbols": USER_DEFINED},
    "no bytes": {"byte_fallback": False},
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A vocabulary: its sentencepiece processor, its file, and the part that GGUF stores."""

    theirs: SentencePieceProcessor
    proto: bytes
    metadata: Mapping[str, Any]


@functools.cache
def trained(name: str) -> Trained:
    """Train a BPE vocabulary of 1,800 pieces and list them as llama.cpp's converter does (`conversion/base.py`)."""
    lines = [line for text in strings(400, seed=9) for line in text.replace("\0", "").splitlines()]
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *(tiny.TEXT.splitlines() + list(CODE)) * 20]),
        model_writer=out,
        model_type="bpe",
        vocab_size=1800,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        **OPTIONS[name],
    )
    theirs = SentencePieceProcessor(model_proto=out.getvalue())
    tokens, scores, kinds = [], [], []
    user_defined = OPTIONS[name].get("user_defined_symbols", ())
    for index in range(theirs.vocab_size()):
        piece, score, kind = theirs.id_to_piece(index), theirs.get_score(index), TokenType.NORMAL
        if theirs.is_unknown(index):
            kind = TokenType.UNKNOWN
        elif theirs.is_control(index):
            kind = TokenType.CONTROL
        elif theirs.is_byte(index):
            kind = TokenType.BYTE
        elif piece in user_defined:
            piece, score, kind = piece.replace("▁", " "), -1000.0, TokenType.USER_DEFINED
        tokens.append(piece)
        scores.append(score)
        kinds.append(int(kind))
    prefix = OPTIONS[name].get("add_dummy_prefix", True)
    metadata = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": np.array(scores, np.float32),
        "token_type": kinds,
        "add_space_prefix": None if prefix else False,  # the converter omits it too
    }
    return Trained(theirs, out.getvalue(), metadata)


def build(path: Path, name: str = "llama", changes: Mapping[str, Any] | None = None) -> TokenizerAssets:
    """Return the assets of a file with this vocabulary; None removes a key."""
    keys = {**trained(name).metadata, **(changes or {})}
    template = keys.pop("chat_template", None)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    metadata["general.architecture"] = "llama"
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return read_tokenizer(GGUFFile(with_metadata(path / "small.gguf", metadata)))


def backend(assets: TokenizerAssets) -> Tokenizer:
    return Tokenizer.from_str(assets.tokenizer_json)


def cases(seed: int) -> list[str]:
    """Return prose, code, scripts, noise, repeated characters, and mixtures of the user-defined tokens of `gemma`."""
    rng = random.Random(seed)
    parts = (*USER_DEFINED, *CODE, " ", "  ", "the", "<", "<b", "x y", "x  y", "\r\n", "")
    mixed = ["".join(rng.choices(parts, k=rng.randrange(12))).replace("▁", " ") for _ in range(300)]
    return [*strings(500, seed), *RUNS, *mixed]


@pytest.mark.parametrize("name", OPTIONS)
def test_encoding_and_decoding_match_sentencepiece(name: str, tmp_path: Path) -> None:
    theirs, ours = trained(name).theirs, backend(build(tmp_path, name))
    lengths = set()
    for case in cases(seed=1):
        ids = ours.encode(case, add_special_tokens=False).ids
        assert ids == theirs.encode(case), case
        lengths |= {len(theirs.id_to_piece(index)) for index in ids}
        if name != "no bytes":  # an unknown token is represented differently there
            assert ours.decode(ids) == theirs.decode(ids) == case
    assert max(lengths) > 8  # long merges were exercised


@pytest.mark.parametrize("source", ["tokenizer.model", "small.gguf"])
def test_a_llama_vocabulary_matches_transformers_conversion(source: str, tmp_path: Path) -> None:
    ours = backend(build(tmp_path, "llama"))
    if source == "small.gguf":
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=source)
    else:
        (tmp_path / source).write_bytes(trained("llama").proto)
        theirs = LlamaTokenizer.from_pretrained(tmp_path)
    differing = []
    for case in cases(seed=2):
        ids = ours.encode(case, add_special_tokens=False).ids
        assert theirs.decode(ids) == ours.decode(ids)
        if ids != theirs.encode(case, add_special_tokens=False):
            differing.append(case)
    # transformers 5.23 adds no prefix to a text that begins with a space, unlike sentencepiece
    assert differing
    assert all(case.startswith(" ") for case in differing)


def test_a_gemma_vocabulary_matches_transformers_conversion(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained("gemma").proto)
    theirs, ours = GemmaTokenizer.from_pretrained(tmp_path), backend(build(tmp_path, "gemma"))
    for case in strings(500, seed=3):
        case = " ".join(case.split())  # transformers treats user-defined pieces as ordinary ones
        if any(piece in case for piece in ("<b>", "<turn>", "x y")):
            continue
        ids = ours.encode(case, add_special_tokens=False).ids
        assert ids == theirs.encode(case, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids) == case


def test_user_defined_tokens_are_not_split(tmp_path: Path) -> None:
    ours = backend(build(tmp_path, "gemma"))
    assert ours.encode("a     b\n\n\n<turn>x y", add_special_tokens=False).tokens == [
        *("a", " " * 5, "b", "\n\n", "\n", "<turn>", "x y")
    ]


@pytest.mark.parametrize("name", ["llama", "words", "gemma"])
def test_equal_scores_are_resolved_by_vocabulary_order(name: str, tmp_path: Path) -> None:
    scores = np.full(1800, -1000.0, np.float32)  # what the converter writes if there is only a tokenizer.json
    usual, equal = backend(build(tmp_path, name)), backend(build(tmp_path, name, {"scores": scores}))
    for case in cases(seed=4):
        assert usual.encode(case).ids == equal.encode(case).ids


def test_token_types_are_assigned(tmp_path: Path) -> None:
    assets = build(tmp_path, "llama", {"chat_template": "{{ messages[0].content }}"})
    assert (assets.bos_token_id, assets.eos_token_ids, assets.pad_token_id) == (1, (2,), None)
    assert assets.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert assets.chat_template == "{{ messages[0].content }}"
    assert assets.tokenizer_config["add_prefix_space"] is True
    assert list(assets.tokenizer_config["added_tokens_decoder"]) == ["0", "1", "2"]
    ours = backend(assets)
    # text after a token starts with the prefix again, as in the published tokenizer.json of these models
    assert ours.encode("a</s>a").tokens == ["<s>", "▁a", "</s>", "▁a"]
    assert ours.encode("<0x41>").tokens[1:] != ["<0x41>"]  # the name of a byte token is ordinary text
    assert ours.encode("\n").tokens == ["<s>", "▁", "<0x0A>"]
    gemma = build(tmp_path, "gemma")
    assert gemma.tokenizer_config["add_prefix_space"] is False
    kinds = {token["content"]: token["special"] for token in gemma.tokenizer_config["added_tokens_decoder"].values()}
    assert kinds == {"<unk>": True, "<s>": True, "</s>": True} | dict.fromkeys(
        (piece.replace("▁", " ") for piece in USER_DEFINED), False
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["<s>", "▁a"]),
        ({"add_bos_token": False}, ["▁a"]),
        ({"add_eos_token": True}, ["<s>", "▁a", "</s>"]),
        ({"bos_token_id": 2, "eos_token_id": 1, "add_eos_token": True}, ["</s>", "▁a", "<s>"]),
        ({"add_space_prefix": True}, ["<s>", "▁a"]),
        ({"add_space_prefix": False}, ["<s>", "a"]),
    ],
)
def test_bos_and_eos_are_added(changes: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    assets = build(tmp_path, "llama", changes)
    assert backend(assets).encode("a").tokens == expected
    loaded = folder(assets, tmp_path)
    assert loaded.convert_ids_to_tokens(loaded("a").input_ids) == expected


def test_an_ordinary_token_starts_no_text_but_ends_one_by_its_text(tmp_path: Path) -> None:
    kinds = [1 if index in (1, 2) else kind for index, kind in enumerate(trained("llama").metadata["token_type"])]
    assets = build(tmp_path, "llama", {"token_type": kinds})
    assert (assets.bos_token_id, assets.eos_token_ids) == (None, (2,))  # "</s>"
    assert backend(assets).encode("a").tokens == ["▁a"]


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_the_files_load_in_transformers_and_the_runtime(name: str, tmp_path: Path) -> None:
    assets = build(tmp_path, name)
    loaded, ours = folder(assets, tmp_path), backend(assets)
    served = runtime.Tokenizer.from_files(tmp_path / "tokenizer.json", dict(assets.tokenizer_config), None)
    for case in cases(seed=5)[:300]:
        ids = ours.encode(case).ids
        assert loaded.encode(case) == ids
        assert served.encode(case, add_special_tokens=True) == ids
        stream = runtime.TextStream(served)
        assert "".join(map(stream.push, ids)) + stream.flush() == case


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_conversations_are_encoded_like_in_transformers(name: str, tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    assets = build(tmp_path, name, {"chat_template": template})
    loaded = folder(assets, tmp_path)
    served = runtime.Tokenizer.from_files(tmp_path / "tokenizer.json", dict(assets.tokenizer_config), template)
    for case in cases(seed=6)[::20]:
        messages = [{"role": "user", "content": case}, {"role": "assistant", "content": f" {case} "}]
        expected = loaded.apply_chat_template(messages, chat_template=template, return_dict=False)
        assert served.encode_chat(messages) == expected
    spelled = served.encode_chat([{"role": "user", "content": "a</s>b"}])
    assert (spelled.count(2), spelled[-1]) == (1, 2)  # special tokens spelled by a user stay text
    assert served.decode(spelled) == "[user] a</s>b"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "llama",
            {"model": "t5"},
            r"type 't5' is not supported; supported: 'gpt2' \(byte-level BPE\), 'llama' \(SentencePiece BPE\)",
        ),
        ("llama", {"scores": None}, r"scores is not an array of 1800 floats"),
        ("llama", {"scores": np.zeros(7, np.float32)}, r"scores is not an array of 1800 floats"),
        ("llama", {"scores": ["a"] * 1800}, r"scores is not an array of 1800 floats"),
        ("llama", {"scores": np.full(1800, np.nan, np.float32)}, "not finite"),
        ("llama", {"token_type": None}, r"no tokenizer\.ggml\.token_type"),
        ("llama", {"token_type": [1]}, "has 1 entries; 1800 are required"),
        ("llama", {"token_type": [1] * 1800}, "neither an unknown token nor a token for each byte"),
        ("llama", {"remove_extra_whitespaces": True}, "remove_extra_whitespaces is set"),
        ("llama", {"precompiled_charsmap": [1, 2]}, "precompiled_charsmap"),
        ("llama", {"add_space_prefix": "yes"}, "true or false"),
        ("llama", {"bos_token_id": 1800}, "bos_token_id is 1800; it must be at most 1799"),
    ],
)
def test_ambiguous_vocabularies_are_rejected_in_one_line(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        build(tmp_path, name, changes)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "small.gguf"))
    assert message.isprintable()


def test_a_malicious_vocabulary_is_processed_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(trained("llama").metadata["tokens"])
    with pytest.raises(CheckpointError, match=r"token 1799 has 100000 characters; the limit is 512"):
        build(tmp_path, "llama", {"tokens": [*tokens[:-1], "a" * 100_000]})
    monkeypatch.setattr(sentencepiece_bpe, "_MAX_MERGES", 100)
    with pytest.raises(CheckpointError, match=r"more than 100 merges"):
        build(tmp_path)
