"""`check_tokenizer` and `check_patterns`: what models use is accepted; unlimited work is rejected in one line."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
from json_values import ODD, with_value

from llm_edge.checkpoint.text.pre_tokenizers import PRE_TOKENIZERS
from llm_edge.runtime.errors import BundleError, CheckpointError
from llm_edge.runtime.text.known_patterns import KNOWN
from llm_edge.runtime.text.pattern_check import check_patterns
from llm_edge.runtime.text.tokenizer import Tokenizer
from llm_edge.runtime.text.tokenizer_check import check_tokenizer

Change = Callable[[dict[str, Any]], object]
NO_CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": ""}


def charsmap(content: bytes) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(part: str, *steps: dict[str, Any]) -> Change:
    key = {
        "normalizer": "normalizers",
        "pre_tokenizer": "pretokenizers",
        "decoder": "decoders",
        "post_processor": "processors",
    }[part]
    return lambda spec: spec.update({part: {"type": "Sequence", key: list(steps)}})


def model(**changes: Any) -> Change:
    return lambda spec: spec.update(model=changes)


def added(count: int, length: int = 1, special: bool = True) -> Change:
    def change(spec: dict[str, Any]) -> None:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        spec["added_tokens"] += [{"id": 320 + i, "content": f"{i}" + "x" * length, **flags} for i in range(count)]

    return change


def nested(spec: dict[str, Any]) -> None:
    step = None
    for _ in range(30):
        step = {"type": "Sequence", "normalizers": [step or {"type": "NFC"}]}
    spec["normalizer"] = step


HOSTILE: dict[str, tuple[Change, str]] = {
    "a chain of replacements": (sequence("normalizer", *[replace("e", "ee")] * 24), "16,777,216 times as long"),
    "a replacement of nothing": (sequence("normalizer", replace("", "a" * 20)), "21 times as long"),
    "a replacement of every character": (sequence("decoder", replace(r"[\s\S]", "a" * 40, "Regex")), "41 times"),
    "a long text in front": (sequence("normalizer", {"type": "Prepend", "prepend": "x" * 5_000_000}), "5,000,000 char"),
    "a long prefix": (sequence("pre_tokenizer", {"type": "Metaspace", "replacement": "_" * 999}), "999 characters"),
    "many steps": (sequence("pre_tokenizer", *[{"type": "Whitespace"}] * 1000), "1,000 steps"),
    "nested sequences": (nested, "nested too deeply"),
    "an unknown step": (sequence("normalizer", {"type": "Explode"}), "'Explode'"),
    "a step that is no object": (sequence("decoder", 5), "decoder"),  # type: ignore[arg-type]
    "countless characters to strip": (
        sequence("decoder", {"type": "Strip", "content": "x", "start": 10**12, "stop": 0}),
        "start of a Strip",
    ),
    "empty parts": (sequence("pre_tokenizer", {"type": "FixedLength", "length": 0}), "length 0"),
    "a nested pattern": (sequence("pre_tokenizer", split("(a+)+$")), "'(a+)+$'"),
    "a pattern of a decoder": (sequence("decoder", replace("(?:x|xx)*y", "b", "Regex")), "'(?:x|xx)*y'"),
    "an unlimited charsmap": (
        sequence("normalizer", charsmap(b"\xfc\xff\xff\xff" + bytes(64))),
        "precompiled_charsmap",
    ),
    "an empty charsmap": (sequence("normalizer", NO_CHARSMAP), "precompiled_charsmap"),
    "a charsmap that is no text": (
        sequence("normalizer", charsmap(b"\x00\x04\0\0" + bytes(1024) + b"\xff")),
        "precompiled_charsmap",
    ),
    "a charsmap with a long text": (
        sequence("normalizer", charsmap(b"\x00\x04\0\0" + bytes(1024) + b"x" * 5000)),
        "precompiled_charsmap",
    ),
    "many added tokens": (added(30_000), "30,003 added tokens"),
    "a long special token": (added(1, 20_000), "more than 1,024"),
    "many long special tokens": (added(1000, 1000), "too long"),
    "words without the unknown one": (model(type="WordLevel", vocab={"a": 0}, unk_token="[UNK]"), "'[UNK]'"),
    "word pieces without the unknown one": (
        model(
            type="WordPiece",
            vocab={"a": 0},
            unk_token="[UNK]",
            continuing_subword_prefix="##",
            max_input_chars_per_word=100,
        ),
        "'[UNK]'",
    ),
    "word pieces of any length": (
        model(
            type="WordPiece",
            vocab={"a": 0, "[UNK]": 1},
            unk_token="[UNK]",
            continuing_subword_prefix="##",
            max_input_chars_per_word=10**9,
        ),
        "max_input_chars_per_word",
    ),
    "an unknown model": (model(type="Neural", vocab={}), "'Neural'"),
    "a long piece": (model(type="Unigram", vocab=[["a" * 5000, -1.0]], unk_id=0), "more than 1,024"),
    "many tokens around a text": (
        lambda spec: spec.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 100_000,
                "pair": [],
                "special_tokens": {},
            }
        ),
        "100,000 tokens",
    ),
    "a long list of ids": (
        lambda spec: spec.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [],
                "pair": [],
                "special_tokens": {"x": {"id": "x", "ids": [0] * 100_000, "tokens": []}},
            }
        ),
        "100,000 tokens",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("model_last", [True, False])
def test_unlimited_work_is_rejected(case: str, model_last: bool, tmp_path: Path) -> None:
    change, reason = HOSTILE[case]
    spec = json.loads(tiny.tokenizer().to_str())
    change(spec)
    if not model_last:
        spec = {"model": spec.pop("model"), **spec}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        Tokenizer.from_files(path, {}, None)
    message = str(caught.value)
    assert message.startswith(f"{path}: unusable tokenizer: ")
    assert reason in message
    assert len(message) < 400
    assert message.isprintable()


@pytest.mark.parametrize("key", ["normalizer", "\\u006eormalizer"])
def test_a_step_after_the_model_is_checked(key: str) -> None:
    spec = json.loads(tiny.tokenizer().to_str())
    del spec["normalizer"]
    text = json.dumps(spec).removesuffix("}") + f', "{key}": {json.dumps(replace("", "a" * 99))}}}'
    with pytest.raises(BundleError, match="100 times as long"):
        check_tokenizer(text, "tokenizer.json")


def test_tokens_named_like_keys_are_accepted() -> None:
    spec = json.loads(tiny.tokenizer().to_str())
    for token in ("model", "normalizer", "decoder", '"},', '}, "decoder": "', "\\u006e"):
        spec["model"]["vocab"][token] = len(spec["model"]["vocab"])
    check_tokenizer(json.dumps(spec), "tokenizer.json")
    check_tokenizer(json.dumps(spec, indent=2, ensure_ascii=False), "tokenizer.json")


def test_the_same_key_twice_is_rejected() -> None:
    text = tiny.tokenizer().to_str()
    step = json.dumps(replace("", "a" * 99))
    with pytest.raises(BundleError, match="twice"):
        check_tokenizer(text.replace('"normalizer"', f'"normalizer": {step}, "normalizer"', 1), "tokenizer.json")


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"a":' * 100_000])
def test_other_content_is_rejected_as_the_callers_error(text: str) -> None:
    with pytest.raises(CheckpointError, match="unusable tokenizer"):
        check_tokenizer(text, "tokenizer.json", error=CheckpointError)


def test_a_model_limits_the_size_of_its_tokenizer() -> None:
    spec = json.loads(tiny.tokenizer().to_str())
    added(400)(spec)
    with pytest.raises(BundleError, match="403 added tokens, but the model 331"):
        check_tokenizer(json.dumps(spec), "tokenizer.json", 331)
    with pytest.raises(BundleError, match="too large for a model of 331"):
        check_tokenizer(tiny.tokenizer().to_str() + " " * (17 << 20), "tokenizer.json", 331)


def test_a_long_named_token_is_rejected(tmp_path: Path) -> None:
    spec = json.loads(tiny.tokenizer().to_str())
    spec["model"]["vocab"]["y" * 5000] = 320
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(BundleError, match="more than 1,024"):
        Tokenizer.from_files(path, {"bos_token": "y" * 5000}, None)


def test_steps_of_common_models_are_accepted() -> None:
    parts: dict[str, list[dict[str, Any]]] = {
        "normalizer": [
            {"type": "Prepend", "prepend": "\u2581"},
            replace(" ", "\u2581"),
            replace(" {2,}", " ", "Regex"),
            {"type": "NFKC"},
            {"type": "Strip", "strip_left": True, "strip_right": False},
        ],
        "pre_tokenizer": [
            {"type": "Digits", "individual_digits": True},
            split(r"\p{N}{1,3}"),
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
        "decoder": [
            replace("\u2581", " "),
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    spec = json.loads(tiny.tokenizer().to_str())
    for part, steps in parts.items():
        sequence(part, *steps)(spec)
    check_tokenizer(json.dumps(spec), "tokenizer.json")
    tokenizers.Tokenizer.from_str(json.dumps(spec))


def test_patterns_of_gguf_files_are_known() -> None:
    assert len(PRE_TOKENIZERS) > 80
    for name, rule in PRE_TOKENIZERS.items():
        assert set(rule.patterns) <= KNOWN, name


@pytest.mark.parametrize(
    "pattern",
    [
        r" ?[^(\s|[.,!?\u2026\u3002])]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+",
        r"[\p{Lu}\p{Lt}&&[^\p{Han}]]*[\p{Ll}\p{Lm}&&[^\p{Han}]]+(?i:'s|'t|'re)?",
        r"(?<=\d)(?=\d{3}(?!\d))",
        r"\[UNK\]|\(|\)+",
    ],
)
def test_other_harmless_patterns_are_accepted(pattern: str) -> None:
    assert pattern not in KNOWN
    assert check_patterns([pattern]) is None


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(x+x+)+y", "(?:a|a)*b", "(.*)*$", r"(\w+\s?)*$", "((a)?b?){3,}", "(a*){2,9}", "(?>(a+)+)b"),
        *(r"(a)\1+", r"\k<x>", "(?(1)a|b)", "(?R)", "(?~a)", "(?#x)", "(?<n>a)", "(*FAIL)"),
        *("a?" * 25 + "a" * 25, "a{1,9999}", "[a](b", "a)", "x" * 5000),
        *(r"\s*\s*\s*x", r"\w*\w*\w*$", r"\p{L}*\p{L}*9", "["),
    ],
)
def test_patterns_that_can_take_long_are_rejected(pattern: str) -> None:
    reason = check_patterns([r"\p{N}{1,3}", pattern])
    assert reason is not None
    assert reason.isprintable()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_patterns_are_tried_in_a_process_with_limited_memory() -> None:
    code = "from llm_edge.runtime.text.pattern_check import try_all; try_all(); bytearray(1 << 30)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, input="[]", capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "MemoryError"


# ---- values of wrong types

SPECS: dict[str, dict[str, Any]] = {
    "BPE": {
        "added_tokens": [{"id": 1, "content": "<x>", "special": True}],
        "normalizer": {"type": "Sequence", "normalizers": [replace("a", "b"), {"type": "Prepend", "prepend": "_"}]},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split(min(KNOWN)), {"type": "FixedLength", "length": 3}],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
            "special_tokens": {"<x>": {"id": "<x>", "ids": [1], "tokens": ["<x>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [replace("_", " "), {"type": "ByteFallback"}]},
        "model": {"type": "BPE", "vocab": {"a": 0, "<x>": 1}, "merges": []},
    },
    "Unigram": {
        "normalizer": charsmap(b"\0\4\0\0" + b"\0" * 1024),
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]},
    },
    "WordPiece": {
        "model": {"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0}, "max_input_chars_per_word": 100},
    },
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_values_of_any_type_are_accepted_or_rejected_in_one_line(name: str, value: Any) -> None:
    for spec in with_value(SPECS[name], value):
        message = ""
        try:
            check_tokenizer(json.dumps(spec), "tokenizer.json", 10)
        except BundleError as error:
            message = str(error)
        assert not message or message.startswith("tokenizer.json: unusable tokenizer: ")
        assert not message or message.isprintable()
