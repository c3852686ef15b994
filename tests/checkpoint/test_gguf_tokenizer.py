"""Compare tokenizers of GGUF files with those of transformers; ambiguous ones are rejected."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from llm_edge.checkpoint.base import TokenizerAssets
from llm_edge.checkpoint.download.smollm2 import smollm2_gguf
from llm_edge.checkpoint.gguf.end_tokens import END_TEXTS, INFILL_ENDS
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.gguf.tokenizer import read_tokenizer
from llm_edge.checkpoint.text.pre_tokenizers import PRE_TOKENIZERS, UNSUPPORTED
from llm_edge.runtime.errors import CheckpointError

NUMBERS = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)).startswith("N")]
SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<repo_name>",
    "<jupyter_code>",
    "<|im_",
    "|>",
    "<file_sep",
)
WORDS = (
    "the",
    " Model",
    "don't",
    "I'LL",
    "naïve",
    "Straße",
    "ﬁne",
    "e\u0301",
    "Ǆ",
    "def f(x):",
    "\treturn x\n",
)
WORDS += (
    "漢字かな",
    "한국어",
    "مرحبا",
    "नमस्ते",
    "ไทย",
    "🙂",
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "\u200b",
    "\ufeff",
    "\x00",
    "\u2028",
    "http://a.b/c?d=1",
)
SPACES = (" ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", " \t ", "\u00a0", "\u3000", "\n   \n")


def strings(count: int, seed: int) -> list[str]:
    """Return a fixed set of code, prose, scripts, whitespace, special tokens, digits of many scripts and noise."""
    rng = random.Random(seed)

    def anything() -> str:
        code = rng.choice((rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))
        return chr(code)

    def piece() -> str:
        kind = rng.randrange(6)
        if kind < 4:
            return rng.choice((WORDS, SPACES, SPECIAL, NUMBERS)[kind])
        return str(rng.randrange(10**6)) if kind == 4 else anything()

    return ["", *("".join(piece() for _ in range(rng.randrange(1, 25))) for _ in range(count - 1))]


@pytest.fixture(scope="module")
def assets() -> TokenizerAssets:
    return read_tokenizer(GGUFFile(smollm2_gguf()))


@pytest.fixture(scope="module")
def ours(assets: TokenizerAssets) -> Tokenizer:
    return Tokenizer.from_str(assets.tokenizer_json)


@pytest.fixture(scope="module")
def theirs() -> Any:
    path = smollm2_gguf()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


# ---- SmolLM2


def test_smollm2_matches_transformers_conversion_except_before_digits(ours: Tokenizer, theirs: Any) -> None:
    # transformers 5.23 ignores that "smollm" splits at every digit first. Runs of digits are equal; a
    # whitespace before a digit does not ("x =  5", " ⑧"), so there the two may differ, and nowhere else.
    cases = strings(1000, seed=1)
    differing = [case for case in cases if ours.encode(case).ids != theirs.encode(case)]
    number = f"[{''.join(NUMBERS)}]"
    assert [case for case in differing if not re.search(rf"\s{number}", case)] == []
    digits = ["".join(random.Random(i).choices(NUMBERS, k=6)) for i in range(1000)]
    assert [case for case in digits if ours.encode(case).ids != theirs.encode(case)] == []


def test_smollm2_matches_the_original_tokenizer_on_a_thousand_strings(ours: Tokenizer, theirs: Any) -> None:
    # The original tokenizer.json has Digits before ByteLevel; the rest is as in transformers.
    backend = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for case in strings(1000, seed=2):
        ids = ours.encode(case).ids
        assert ids == backend.encode(case).ids
        for skip in (False, True):
            text = ours.decode(ids, skip_special_tokens=skip)
            assert text == backend.decode(ids, skip_special_tokens=skip)
            assert text == theirs.decode(ids, skip_special_tokens=skip)


def test_smollm2_splits_whitespace_before_a_digit_like_the_original(ours: Tokenizer) -> None:
    assert ours.encode("x =  5").tokens == ["x", "Ġ=", "ĠĠ", "5"]
    assert ours.encode("a 12").tokens == ["a", "Ġ", "1", "2"]


def test_smollm2_round_trips(ours: Tokenizer) -> None:
    for case in ("", " a", "a  b\n\n\tc ", "漢字🙂", "<|im_start|>user\nHi<|im_end|>\n", "١٢٣ ½"):
        assert ours.decode(ours.encode(case).ids, skip_special_tokens=False) == case


def test_smollm2_assets(assets: TokenizerAssets) -> None:
    assert (assets.bos_token_id, assets.pad_token_id) == (1, 2)
    assert [Tokenizer.from_str(assets.tokenizer_json).id_to_token(index) for index in assets.eos_token_ids] == [
        "<|im_end|>",
        "<|endoftext|>",
        "<reponame>",
    ]
    assert assets.chat_template is not None
    assert assets.chat_template.startswith("{% for message in messages %}")
    config = dict(assets.tokenizer_config)
    added = config.pop("added_tokens_decoder")
    assert len(added) == 17
    assert added["2"] == {
        "content": "<|im_end|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert assets.special_tokens_map == {name: config[name] for name in names}
    json.dumps(asdict(assets))


def test_smollm2_loads_in_transformers(assets: TokenizerAssets, ours: Tokenizer, theirs: Any, tmp_path: Path) -> None:
    loaded = folder(assets, tmp_path)
    assert len(loaded) == len(theirs) == 49152
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 2)
    assert loaded.model_max_length == 8192
    for case in strings(100, seed=3):
        assert loaded.encode(case) == ours.encode(case).ids


def folder(assets: TokenizerAssets, path: Path) -> Any:
    (path / "tokenizer.json").write_text(assets.tokenizer_json, encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(dict(assets.tokenizer_config)), encoding="utf-8")
    (path / "special_tokens_map.json").write_text(json.dumps(dict(assets.special_tokens_map)), encoding="utf-8")
    return AutoTokenizer.from_pretrained(path)


# ---- the other names of pre-tokenizers, on SmolLM2's vocabulary


def with_metadata(path: Path, metadata: dict[str, Any]) -> Path:
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_other_pre_tokenizers_match_transformers(pre: str, tmp_path: Path) -> None:
    metadata = dict(GGUFFile(smollm2_gguf()).metadata) | {"tokenizer.ggml.pre": pre}
    merges = metadata["tokenizer.ggml.merges"]
    cut = len(merges) - 4000  # transformers is slow with a whole vocabulary
    metadata["tokenizer.ggml.merges"] = merges[:-cut]
    metadata["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"][:-cut]
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"][:-cut]
    path = with_metadata(tmp_path / "a.gguf", metadata)
    backend = Tokenizer.from_str(read_tokenizer(GGUFFile(path)).tokenizer_json)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for case in strings(1000, seed=4):
        # Qwen's own tokenizer composes characters first (NFC), which transformers leaves out for a GGUF.
        expected = unicodedata.normalize("NFC", case) if pre == "qwen2" else case
        assert backend.encode(case, add_special_tokens=False).ids == reference.encode(expected)


@pytest.mark.parametrize("pre", ["starcoder", "refact", "codeshell", "command-r", "exaone"])
def test_some_pre_tokenizers_are_equal_to_smollm(pre: str, tmp_path: Path) -> None:
    expected = json.loads(build(tmp_path, {"pre": "smollm"}).tokenizer_json)["pre_tokenizer"]
    assert [step["type"] for step in expected["pretokenizers"]] == ["Digits", "ByteLevel"]
    assert json.loads(build(tmp_path, {"pre": pre}).tokenizer_json)["pre_tokenizer"] == expected


@pytest.mark.parametrize(
    ("name", "synonyms"),
    [
        ("llama-bpe", ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")),
        ("qwen2", ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez")),
        ("stablelm2", ("hunyuan", "solar-open", "grok-2")),
        ("gpt-2", ("phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "mellum", "roberta-bpe")),
        ("gpt-4o", ("llama4", "kanana2", "talkie", "minimax-m2")),
        ("deepseek-v3", ("hunyuan-dense", "joyai-llm", "hy_v4")),
        ("bloom", ("poro-chat", "gpt3-finnish")),
        ("bailingmoe", ("bailingmoe2", "llada-moe")),
        ("dbrx", ("smaug-bpe", "chatglm-bpe")),
        ("glm4", ("glm5",)),
    ],
)
def test_synonyms_give_the_same_tokenizer(name: str, synonyms: tuple[str, ...], tmp_path: Path) -> None:
    expected = build(tmp_path, {"pre": name})
    for synonym in synonyms:
        assert build(tmp_path, {"pre": synonym}) == expected


# How the text is split; the pieces are those of llama.cpp's rules for these names.
SPLIT_TEXT = "It's 12345 ABCdef e\u0301, (x)\n\n  \u4e2d\u6587"
SPLITS = {
    "gpt-2": ["It", "'s", " 12345", " ABCdef", " e", "\u0301,", " (", "x", ")", "\n\n ", " \u4e2d\u6587"],
    "llama-bpe": ["It", "'s", " ", "123", "45", " ABCdef", " e", "\u0301,", " (", "x", ")\n\n", " ", " \u4e2d\u6587"],
    "deepseek-v3": ["It", "'s", " ", "123", "45", " ABCdef", " e\u0301", ",", " (", "x", ")\n\n", "  ", "\u4e2d\u6587"],
    "deepseek-coder": [
        *("It", "'", "s", " ", *"12345", " ABCdef", " e", "\u0301", ",", " (", "x", ")", "\n", "\n"),
        *(" ", " ", "\u4e2d\u6587"),
    ],
    "ufakzeka": ["It", "'s", " ", *"12345", " ABCdef", " e", "\u0301,", " (", "x", ")\n\n", " ", " \u4e2d\u6587"],
    "gpt-4o": ["It's", " ", "123", "45", " ABCdef", " e\u0301", ",", " (", "x", ")\n\n", " ", " \u4e2d\u6587"],
}


@pytest.mark.parametrize("name", SPLITS)
def test_text_is_split_by_the_rules_of_the_name(name: str) -> None:
    pieces = PRE_TOKENIZERS[name].build().pre_tokenize_str(SPLIT_TEXT)
    assert [SPLIT_TEXT[start:end] for _, (start, end) in pieces] == SPLITS[name]


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_whole_text(name: str, tmp_path: Path) -> None:
    build(tmp_path, {"pre": name})
    rule = PRE_TOKENIZERS[name].build()
    for case in strings(60, seed=6):
        end = 0
        for _, (start, stop) in rule.pre_tokenize_str(case):
            assert start == end
            end = stop
        assert end == len(case)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_names_whose_rule_cannot_be_expressed_are_rejected(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"pre-tokenizer '{name}' is not supported: export the model's"):
        build(tmp_path, {"pre": name})


# ---- a small vocabulary

TOKENS = ["<|end|>", "<|begin|>", "<|eot|>", "<think>", "<|im_end|>", "<unk>", "[PAD6]"]
KINDS = [3, 3, 3, 4, 3, 2, 5]
LETTERS = ["a", "b", "Ġ", "Ã", "©", "1", "2"]
MERGED = ["ab", "Ġab", "Ã©"]


def build(path: Path, changes: dict[str, Any] | None = None) -> TokenizerAssets:
    """Return the assets of a small file; None removes a key."""
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS + LETTERS + MERGED,
        "token_type": KINDS + [1] * len(LETTERS + MERGED),
        "merges": ["a b", "Ġ ab", "Ã ©"],
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    keys |= changes or {}
    template = keys.pop("chat_template", None)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    metadata["general.architecture"] = "llama"
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return read_tokenizer(GGUFFile(with_metadata(path / "small.gguf", metadata)))


def encode(assets: TokenizerAssets, text: str) -> list[str]:
    tokens: list[str] = Tokenizer.from_str(assets.tokenizer_json).encode(text).tokens
    return tokens


def test_token_types_are_assigned(tmp_path: Path) -> None:
    assets = build(tmp_path)
    assert encode(assets, "ab ab<think>é12<|end|>[PAD6]") == [
        "ab",
        "Ġab",
        "<think>",
        "Ã©",
        "1",
        "2",
        "<|end|>",
    ]
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    ids = tokenizer.encode("<|begin|>ab<think>a<unk>").ids
    assert tokenizer.decode(ids) == "ab<think>a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|begin|>ab<think>a<unk>"
    added = assets.tokenizer_config["added_tokens_decoder"]
    assert {index: token["special"] for index, token in added.items()} == {
        "0": True,
        "1": True,
        "2": True,
        "3": False,
        "4": True,
        "5": True,
    }
    assert "model_max_length" not in assets.tokenizer_config


def test_without_token_types_tokens_with_a_role_are_special(tmp_path: Path) -> None:
    assets = build(tmp_path, {"token_type": None})
    assert list(assets.tokenizer_config["added_tokens_decoder"]) == ["0", "1", "4"]  # 4 by its text
    assert encode(assets, "ab<|end|>") == ["ab", "<|end|>"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["ab"]),
        ({"add_bos_token": True}, ["<|begin|>", "ab"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<|begin|>", "ab", "<|end|>"]),
        ({"add_eos_token": True}, ["ab", "<|end|>"]),
        ({"pre": "llama-bpe"}, ["<|begin|>", "ab"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["ab"]),
        ({"pre": "llama-bpe", "bos_token_id": None}, ["ab"]),
        ({"pre": "qwen2"}, ["ab"]),
    ],
)
def test_bos_and_eos_are_added(changes: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    assets = build(tmp_path, changes)
    assert encode(assets, "ab") == expected
    config = assets.tokenizer_config
    assert config["add_bos_token"] is ("<|begin|>" in expected)
    assert config["add_eos_token"] is ("<|end|>" in expected)
    loaded = folder(assets, tmp_path)
    assert loaded.convert_ids_to_tokens(loaded("ab").input_ids) == expected


def test_bos_and_eos_are_added_to_pairs(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(build(tmp_path, {"add_bos_token": True}).tokenizer_json)
    pair = tokenizer.encode("ab", "a")
    assert pair.tokens == ["<|begin|>", "ab", "<|begin|>", "a"]
    assert pair.type_ids == [0, 0, 1, 1]


def test_whole_words_skip_merges_if_the_family_requires_it(tmp_path: Path) -> None:
    merges = {"merges": ["a b"], "add_bos_token": False}
    assert encode(build(tmp_path, merges), " ab") == ["Ġ", "ab"]
    assert encode(build(tmp_path, merges | {"pre": "llama-bpe"}), " ab") == ["Ġab"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0, 4)),
        ({"eos_token_id": None}, (0, 4)),
        ({"eos_token_id": 4}, (4, 0)),
        ({"eos_token_id": 3}, (3, 0, 4)),
        ({"eos_token_id": 2**32 - 1}, (0, 4)),
        ({"eot_token_id": 2}, (0, 2, 4)),
        ({"eot_token_id": 2, "eom_token_id": 3}, (0, 2, 3, 4)),
        ({"fim_sep_token_id": 3}, (0, 3, 4)),
        ({"chat_template": "{{ messages[0].content }}<|im_end|>"}, (0, 4)),
    ],
)
def test_end_tokens_are_determined(changes: dict[str, Any], expected: tuple[int, ...], tmp_path: Path) -> None:
    assets = build(tmp_path, changes)
    assert assets.eos_token_ids == expected
    assert assets.pad_token_id is None
    assert assets.chat_template == changes.get("chat_template")


@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("text", [*END_TEXTS, *(texts[0] for texts in INFILL_ENDS.values()), "<reponame>"])
def test_tokens_end_an_answer_by_their_text(text: str, kind: int, tmp_path: Path) -> None:
    tokens = ["<e>", "<|begin|>", text, *LETTERS, *MERGED]
    types = [3, 3, kind] + [1] * len(LETTERS + MERGED)
    assets = build(tmp_path, {"tokens": tokens, "token_type": types})
    assert assets.eos_token_ids == (0, 2)
    assert assets.tokenizer_config["added_tokens_decoder"]["2"]["special"]  # whatever type the file gives it
    assert encode(assets, f"ab{text}") == ["ab", text]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["<|return|>", "<|call|>", "<|end|>"], (0, 1)),
        (["<|calls|>", "<|flush|>", "<|end|>"], (0, 1)),
        (["<|return|>", "x", "<|end|>"], (0, 2)),
        (["<eos>", "<|tool_response>", "</s>"], (0, 1)),
        (["<|fim_repo|>", "<|repo_name|>", "<|fim_pad|>"], (0, 2)),  # one token for each role
    ],
)
def test_end_texts_with_exceptions(tokens: list[str], expected: tuple[int, ...], tmp_path: Path) -> None:
    types = [3] * 3 + [1] * len(LETTERS + MERGED)
    changes = {"tokens": [*tokens, *LETTERS, *MERGED], "token_type": types, "eos_token_id": 0, "bos_token_id": None}
    assert build(tmp_path, changes).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "bert"}, "tokenizer type 'bert'"),
        ({"model": None}, r"no tokenizer\.ggml\.model"),
        (
            {"pre": "somebody-else"},
            r"pre-tokenizer 'somebody-else' \(tokenizer\.ggml\.pre\) is not known",
        ),
        ({"pre": "default"}, "does not name its pre-tokenizer"),
        ({"pre": None}, "does not name its pre-tokenizer"),
        ({"tokens": None}, r"no tokenizer\.ggml\.tokens"),
        ({"tokens": [*TOKENS, *LETTERS, *MERGED[:-1], "ab"]}, "the token 'ab' twice"),
        ({"token_type": [1]}, "has 1 entries; 17 are required"),
        ({"merges": None}, r"no tokenizer\.ggml\.merges"),
        ({"merges": ["a b", "ab"]}, "merge 1 does not join two tokens of the vocabulary into a third: 'ab'"),
        ({"merges": ["a 1"]}, "merge 0"),
        ({"merges": ["a b c"]}, "merge 0"),
        ({"eos_token_id": 17}, "eos_token_id is 17; it must be at most 16"),
        ({"bos_token_id": "1"}, "not an integer"),
        ({"eot_token_id": 17}, "eot_token_id is 17; it must be at most 16"),
        ({"add_bos_token": 1}, "true or false"),
        ({"add_bos_token": True, "bos_token_id": None}, r"add_bos_token is true, but .* is missing"),
        ({"chat_template": 5}, "not a string"),
        ({"add_bos_token": True, "tokens": ["x", "$A", *TOKENS[2:], *LETTERS, *MERGED]}, "cannot express"),
        ({"add_eos_token": True, "tokens": ["x:0", *TOKENS[1:], *LETTERS, *MERGED]}, "cannot express"),
    ],
)
def test_ambiguous_tokenizers_are_rejected_in_one_line(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        build(tmp_path, changes)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "small.gguf"))
    assert message.isprintable()
