"""Vocabularies that are not a tokenizer.json encode text as their own libraries do."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_gguf_tokenizer import strings

from llm_edge.checkpoint.base import TokenizerAssets
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.checkpoint.huggingface.tokenizer import read_tokenizer
from llm_edge.checkpoint.text.ranked_bpe import _ALPHABET
from llm_edge.checkpoint.text.tiktoken_file import KNOWN
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.text.known_patterns import TEKKEN

TEXTS = (
    "The quick brown fox; it's 12,345.678 o'clock — don't you'LL see?",
    "  two  spaces\n\n\tand\r\n lines   \n",
    "Straße, señor, naïve café, Ærøskøbing, Ünïcödé ﬁ \uff21\uff22\uff23",
    "Быстрая лиса. Ένα δύο τρία. שלום עולם. مرحبا بالعالم ١٢٣. नमस्ते दुनिया। สวัสดีชาวโลก",
    "你好,世界。こんにちは世界。カタカナ 안녕하세요 세계. 𠜎𠜱",
    "🙂🙂 👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u200b\u00a0\u3000 \x00\x07 \ufeff",
    "def f(x):\n    return x**2  # 0x1F, 1e-5\n" + " " * 40 + "x" * 100,
    *tiny.TEXT.splitlines(),
)


def ranks() -> list[bytes]:
    """Tokens of a small byte-level vocabulary in the order of their ranks, those of a single byte first."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=sorted(_ALPHABET), show_progress=False, special_tokens=[]
    )
    found.train_from_iterator([*TEXTS * 4, *strings(200, seed=3)], trainer)
    merged = [token for token, _ in sorted(found.get_vocab().items(), key=lambda item: item[1]) if len(token) > 1]
    return [bytes([byte]) for byte in range(256)] + [bytes(map(_ALPHABET.index, token)) for token in merged]


def mixed(seed: int, count: int = 60) -> list[str]:
    """The texts, and pieces of them in random order."""
    pick = random.Random(seed)
    pieces = [text[at : at + 7] for text in TEXTS for at in range(0, len(text), 7)]
    return [*TEXTS, *("".join(pick.choices(pieces, k=12)) for _ in range(count))]


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def encode(assets: TokenizerAssets, text: str, *, special: bool = False) -> list[int]:
    loaded = tokenizers.Tokenizer.from_str(assets.tokenizer_json)
    return list(loaded.encode(text, add_special_tokens=special).ids)


# ---- tiktoken


def save_ranks(path: Path, tokens: Iterable[bytes]) -> None:
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    path.write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize(("name", "tokenizer_class"), [
    ("qwen.tiktoken", "QWenTokenizer"),
    ("tokenizer.model", "ChatGLM4Tokenizer"),
])  # fmt: skip
def test_a_tiktoken_file_encodes_as_tiktoken(name: str, tokenizer_class: str, tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    tokens = ranks()
    save_ranks(tmp_path / name, tokens)
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": tokenizer_class})
    assets = read_tokenizer(tmp_path, {})
    found = KNOWN[tokenizer_class]
    special = {text: len(tokens) + number for number, text in enumerate(found.special)}
    theirs = tiktoken.Encoding(
        "x", pat_str=found.pattern, mergeable_ranks={t: rank for rank, t in enumerate(tokens)}, special_tokens=special
    )
    loaded = tokenizers.Tokenizer.from_str(assets.tokenizer_json)
    for text in mixed(1):
        expected = theirs.encode(text, disallowed_special=())
        assert loaded.encode(text).ids == expected, text
        assert loaded.decode(expected, skip_special_tokens=False) == text
    with_special = f"a{found.special[0]}\nb{found.special[2]}"
    assert loaded.encode(with_special).ids == theirs.encode(with_special, allowed_special="all")
    assert assets.eos_token_ids == tuple(special[text] for text in found.ends)


def test_special_tokens_of_the_config_replace_the_known_ones(tmp_path: Path) -> None:
    tokens = ranks()
    save_ranks(tmp_path / "tokenizer.model", tokens)
    listed = {str(len(tokens) + number): {"content": text} for number, text in enumerate(("<|endoftext|>", "<|user|>"))}
    config = {"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": listed}
    write(tmp_path / "tokenizer_config.json", config)
    assets = read_tokenizer(tmp_path, {})
    assert encode(assets, "<|user|>") == [len(tokens) + 1]
    assert assets.eos_token_ids == (len(tokens), len(tokens) + 1)


def test_the_program_of_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    save_ranks(tmp_path / "qwen.tiktoken", ranks())
    (tmp_path / "tokenization_x.py").write_text("open('ran', 'w')\n")
    config = {"tokenizer_class": "XTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    write(tmp_path / "tokenizer_config.json", config)
    with pytest.raises(CheckpointError, match=r"class 'XTokenizer' is not known.*tokenizer\.json") as caught:
        read_tokenizer(tmp_path, {})
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize(("line", "words"), [
    (b"!!!! 2", "line 3 is not a new token in base64"),
    (b"YQ==", "line 3 is not a new token"),
    (b"Ag== 7", "line 3 is not a new token in base64 with the next rank"),
    (b"AQ== 2", "line 3 is not a new token"),
    (b"Ag== 2", "has no token for the byte 3"),
    (b"Ag== " + b"9" * 5000, "line 3 is not a new token"),
])  # fmt: skip
def test_damaged_ranks_are_rejected_in_one_line(line: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.tiktoken").write_bytes(b"AA== 0\nAQ== 1\n" + line + b"\n")
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer"})
    with pytest.raises(CheckpointError, match=words) as caught:
        read_tokenizer(tmp_path, {})
    assert "\n" not in str(caught.value)


def test_tokens_whose_parts_take_too_long_are_rejected(tmp_path: Path) -> None:
    save_ranks(tmp_path / "a.tiktoken", [bytes([byte]) for byte in range(256)] + [b"x" * 40_000])
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer"})
    with pytest.raises(CheckpointError, match="the tokens are too many or too long"):
        read_tokenizer(tmp_path, {})


# ---- tekken.json


def tekken(tokens: list[bytes], **changes: Any) -> dict[str, Any]:
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    config = {"pattern": TEKKEN, "num_vocab_tokens": len(vocab), "default_vocab_size": 20 + len(vocab) - 5}
    return {
        "config": {**config, "default_num_special_tokens": 20, "version": "v7"},
        "vocab": vocab,
        "special_tokens": [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(special)],
        **changes,
    }


@pytest.mark.parametrize("listed", [True, False])
def test_tekken_encodes_as_mistral_common(listed: bool, tmp_path: Path) -> None:
    library = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    content = tekken(ranks())
    if not listed:
        del content["special_tokens"]
    write(tmp_path / "tekken.json", content)
    theirs = library.Tekkenizer.from_file(tmp_path / "tekken.json")
    assets = read_tokenizer(tmp_path, {})
    loaded = tokenizers.Tokenizer.from_str(assets.tokenizer_json)
    assert loaded.get_vocab_size() == theirs.n_words
    for text in mixed(2):
        expected = theirs.encode(text, bos=True, eos=False)
        assert loaded.encode(text).ids == expected, text
        assert loaded.decode(expected) == text
    assert encode(assets, "[INST]") == [3]
    assert (assets.eos_token_ids, assets.tokenizer_config["bos_token"]) == ((2,), "<s>")


@pytest.mark.slow
def test_the_vocabulary_of_mistral_nemo_encodes_as_mistral_common(tmp_path: Path) -> None:
    library = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    path = Path(library.__file__).parents[2] / "data" / "tekken_240718.json"
    shutil.copyfile(path, tmp_path / "tekken.json")
    theirs = library.Tekkenizer.from_file(path)
    loaded = tokenizers.Tokenizer.from_str(read_tokenizer(tmp_path, {}).tokenizer_json)
    assert loaded.get_vocab_size() == theirs.n_words == 131_072
    for text in mixed(3, 400):
        assert loaded.encode(text).ids == theirs.encode(text, bos=True, eos=False), text


@pytest.mark.parametrize(("changes", "words"), [
    ({"config": None}, "config is missing"),
    ({"config": {"default_vocab_size": 1 << 40, "default_num_special_tokens": 1}}, "are not possible"),
    ({"config": {"default_vocab_size": 20, "default_num_special_tokens": 20}}, "20 special tokens of 20"),
    ({"vocab": {}}, "vocab is not a list of at least"),
    ({"vocab": [{"rank": 0, "token_bytes": "AA=="}] * 2000}, "token 1 is not a new byte string"),
    ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "special_tokens is not a list of at most 20 tokens"),
    ({"special_tokens": "x"}, "special_tokens is not a list"),
    ({"special_tokens": [{"rank": 0, "token_str": 5}]}, "special_tokens is not a list"),
    (
        {"config": {"pattern": "(a+)+$", "default_vocab_size": 520, "default_num_special_tokens": 20}},
        "can take very long",
    ),
])  # fmt: skip
def test_a_damaged_tekken_is_rejected_in_one_line(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write(tmp_path / "tekken.json", tekken(ranks(), **changes))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_tokenizer(tmp_path, {})
    assert "\n" not in str(caught.value)


# ---- SentencePiece


def sentencepiece_model(**options: Any) -> bytes:
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in [*TEXTS * 8, *strings(200, seed=5)] for line in text.splitlines()]),
        model_writer=out,
        minloglevel=2,
        **{
            "model_type": "bpe",
            "vocab_size": 1500,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "hard_vocab_limit": False,
            **options,
        },
    )
    return out.getvalue()


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_encodes_as_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    model = sentencepiece_model(add_dummy_prefix=prefix)
    (tmp_path / "tokenizer.model").write_bytes(model)
    theirs = SentencePieceProcessor(model_proto=model)
    assets = read_tokenizer(tmp_path, {})
    for text in (text for text in mixed(4) if "\0" not in text):
        assert encode(assets, text) == theirs.encode(text), text
    assert encode(assets, "a", special=True) == [theirs.bos_id(), *theirs.encode("a")]
    assert (assets.eos_token_ids, assets.tokenizer_config["bos_token"]) == ((theirs.eos_id(),), "<s>")


def test_a_sentencepiece_model_without_legacy_encodes_as_transformers(tmp_path: Path) -> None:
    import transformers

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    assets = read_tokenizer(tmp_path, {})
    for text in (text for text in mixed(5) if "\0" not in text):
        for each in (text, f"<s>{text}"):
            assert encode(assets, each) == theirs.encode(each, add_special_tokens=False), each


@pytest.mark.parametrize("version", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_the_vocabulary_of_mistral_encodes_as_sentencepiece(version: str, tmp_path: Path) -> None:
    library = pytest.importorskip("mistral_common")
    path = Path(library.__file__).parent / "data" / version
    shutil.copyfile(path, tmp_path / "tokenizer.model")
    theirs = SentencePieceProcessor(model_file=str(path))
    assets = read_tokenizer(tmp_path, {})
    loaded = tokenizers.Tokenizer.from_str(assets.tokenizer_json)
    for text in (text for text in mixed(6, 200) if "\0" not in text):
        assert loaded.encode(text, add_special_tokens=False).ids == theirs.encode(text), text


@pytest.mark.parametrize("options", [
    {"model_type": "unigram"},
    {"normalization_rule_name": "nmt_nfkc"},
    {"remove_extra_whitespaces": True},
])  # fmt: skip
def test_other_kinds_of_sentencepiece_require_transformers(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"to convert tokenizer\.model, pip install transformers"):
        read_tokenizer(tmp_path, {})


def test_damaged_sentencepiece_models_are_rejected_in_one_line(tmp_path: Path) -> None:
    model = sentencepiece_model()
    path = tmp_path / "tokenizer.model"
    pick = random.Random(0)
    damaged = [model[: pick.randrange(len(model))] for _ in range(40)]
    for _ in range(60):
        changed = bytearray(model)
        changed[pick.randrange(min(len(model), 4000))] = pick.randrange(256)
        damaged.append(bytes(changed))
    damaged += [b"\x0a" + b"\xff" * 9 + b"\x01", b"\xff" * 30, struct.pack("<I", 9)]
    for content in damaged:
        path.write_bytes(content)
        try:
            read_tokenizer(tmp_path, {})
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 (some damage is harmless)


# ---- vocab.json and merges.txt


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocab_and_merges_encode_as_transformers(
    tokenizer_class: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    folder = tiny.save_checkpoint(tmp_path / "model", vocab_size=340)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    write(folder / "vocab.json", model["vocab"])
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    content = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", {**content, "tokenizer_class": tokenizer_class})
    theirs = getattr(transformers, tokenizer_class).from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assets = read_folder(folder).tokenizer
    for text in mixed(7):
        assert encode(assets, text) == theirs.encode(text, add_special_tokens=False), text
