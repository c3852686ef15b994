"""Bundles with hostile tokenizers: odd steps, patterns, vocabularies and values of the wrong type."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damage import change_value, dump, odd_value
from damaged_bundles import ask, copy, correct_manifest
from sandbox import Command

PATTERNS = (
    r"(a+)+$", r"(a|a)*$", r"(?:a?){40}a{40}", r"\s+(?!\S)|\s+", r".*.*.*.*=.*", r"(.)\1+", r"(?<=a+)b", r"[",
    r"(?i:'s|'t)|\p{L}+", r"\p{Foo}", r"a{99999}", r"(x+x+)+y", r"(?=(a+))\1b", r"", r"^|$", r"\b", r"(?R)", r"\G",
    r"([a-z]+)*\d", r"(?>a+)b", r"[\s\S]", r"((((((((a*)*)*)*)*)*)*)*)*", r"\p{L}{1,999}\p{L}{1,999}!", r"a**",
    r"\x{110000}",
    r"[[:alpha:]&&[^a-z]]+", r"(?m)^.*$", r"[^\r\n]{1,100}[^\r\n]{1,100}[^\r\n]{1,100}x", r"(\w+\s?)+:",
)  # fmt: skip
CONTENTS = ("", "a", "aa", "ab" * 100, "\0", "\u2581", " ", "$0", "é", "\U0001f642" * 60, "x" * 5000)
_KINDS = {
    "normalizer": (
        "NFC NFKD Nmt Lowercase StripAccents ByteLevel BertNormalizer Prepend Replace Strip Precompiled Sequence "
        "Unknown"
    ),
    "pre_tokenizer": (
        "ByteLevel Whitespace WhitespaceSplit Punctuation Digits Metaspace Split CharDelimiterSplit UnicodeScripts "
        "FixedLength BertPreTokenizer Sequence Unknown"
    ),
    "decoder": ("ByteLevel ByteFallback Fuse Metaspace Replace Strip WordPiece CTC BPEDecoder Sequence Unknown"),
    "post_processor": "ByteLevel BertProcessing RobertaProcessing TemplateProcessing Sequence Unknown",
}
KINDS = {part: names.split() for part, names in _KINDS.items()}
INSIDE = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
INSIDE["post_processor"] = "processors"


REPEATED = 9  # depth of a step that is written many times, and small therefore


def charsmap(rng: random.Random) -> str:
    """A compiled normalization of SentencePiece whose trie is wrong."""
    size = rng.choice((0, 4, 1024, 2048, 2**32 - 4, 4096))
    trie = rng.randbytes(min(size, 4096)) if rng.random() < 0.5 else b"\xff" * min(size, 4096)
    data = size.to_bytes(4, "little") + trie + b"a\0" * rng.choice((0, 1, 300))
    return base64.b64encode(data).decode() if rng.random() < 0.9 else "not base64 \u00e9"


def pattern(rng: random.Random) -> Any:
    """What Replace and Split look for."""
    regex = {"Regex": rng.choice(PATTERNS)}
    return rng.choice((regex, regex, {"String": rng.choice(CONTENTS)}, {"String": "a", "Regex": "a"}, "a", None, {}))


def step(part: str, rng: random.Random, depth: int = 0) -> Any:
    """A step of a normalizer, pre-tokenizer, decoder or post-processor."""
    kind = rng.choice(KINDS[part])
    made: dict[str, Any] = {"type": kind}
    if kind == "Sequence":
        count = 0 if depth > 6 else rng.choice((0, 1, 2, 3, 40))
        made[INSIDE[part]] = [step(part, rng, depth + 1 if count < 40 else REPEATED) for _ in range(count)]
    made |= {"content": rng.choice(CONTENTS), "pattern": pattern(rng), "prepend": rng.choice(CONTENTS)}
    made |= {"strip_left": rng.random() < 0.5, "strip_right": True, "start": number(rng), "stop": number(rng)}
    made |= {"left": True, "right": False, "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    made |= {"individual_digits": True, "replacement": rng.choice("▁ab"), "prepend_scheme": rng.choice(("always", "x"))}
    made |= {"behavior": rng.choice(("Isolated", "Removed", "MergedWithNext", "Contiguous", "odd")), "invert": False}
    made |= {"delimiter": rng.choice((" ", "ab", "")), "length": number(rng), "prefix": "##", "cleanup": True}
    made |= {"pad_token": "<pad>", "word_delimiter_token": "|", "suffix": "</w>", "split": True, "lowercase": True}
    made |= {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
    if kind == "Precompiled":
        made["precompiled_charsmap"] = charsmap(rng)
    if part == "post_processor":
        made |= {"sep": ["[SEP]", number(rng)], "cls": ["[CLS]", 1]}
        pieces = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}]
        made |= {"single": pieces * rng.choice((1, 2, 3000) if depth < REPEATED else (1, 2)), "pair": pieces}
        made["special_tokens"] = {
            "x": {
                "id": "x",
                "ids": [number(rng)] * (5000 if rng.random() < 0.5 and depth < REPEATED else 1),
                "tokens": ["x"],
            }
        }
    for _ in range(rng.choice((0, 0, 0, 1, 2)) if depth < REPEATED else 0):
        made[rng.choice(list(made))] = odd_value(rng)
    return made


def number(rng: random.Random) -> int:
    return rng.choice((0, 1, 2, 5, 300, 331, 2**31, 2**32 - 1, 2**32, 2**63, -1))


def steps(spec: dict[str, Any], rng: random.Random) -> str:
    """Replace one of the four parts."""
    part = rng.choice(list(KINDS))
    spec[part] = step(part, rng)
    return f"{part} {spec[part].get('type') if isinstance(spec[part], dict) else spec[part]}"


def many_steps(spec: dict[str, Any], rng: random.Random) -> str:
    """A long or deep sequence of the same step."""
    part = rng.choice(list(KINDS))
    repeated: Any = step(part, rng, REPEATED)
    if rng.random() < 0.5:
        repeated = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    inside, count = INSIDE[part], rng.choice((5, 24, 1000, 5_000))
    if rng.random() < 0.5:
        spec[part] = {"type": "Sequence", inside: [repeated] * count}
        return f"{count} times the same in {part}"
    for _ in range(min(count, 400)):
        repeated = {"type": "Sequence", inside: [repeated]}
    spec[part] = repeated
    return f"{part} nested"


def added_tokens(spec: dict[str, Any], rng: random.Random) -> str:
    """Odd added tokens."""
    count = rng.choice((1, 1, 3, 200, 30_000))
    content: Callable[[int], str] = rng.choice(
        (
            lambda i: "a" * (1 + i % 50),
            lambda i: f"<{i}>" * rng.choice((1, 400)),
            lambda i: "x" * 30_000,
            lambda i: rng.choice(CONTENTS),
            lambda i: "<|im_end|>",
        )
    )
    flags = {name: rng.random() < 0.4 for name in ("special", "normalized", "lstrip", "rstrip", "single_word")}
    start = number(rng)
    made = [{"id": max(0, start) + i, "content": content(i), **flags} for i in range(count)]
    spec["added_tokens"] = made if rng.random() < 0.3 else [*spec["added_tokens"], *made]
    return f"{count} added tokens from {start}"


def odd_bpe(spec: dict[str, Any], rng: random.Random) -> str:
    """Odd settings, ids and merges of the BPE model."""
    model = spec["model"]
    if not isinstance(model.get("vocab"), dict):  # an earlier change made it a Unigram model
        return "nothing"
    how = rng.choice(("prefix", "suffix", "fallback", "unk", "dropout", "merges", "ids", "no type", "huge id", "empty"))
    if how in ("prefix", "suffix"):
        model["continuing_subword_prefix" if how == "prefix" else "end_of_word_suffix"] = rng.choice(CONTENTS)
    elif how == "fallback":
        model |= {"byte_fallback": True, "unk_token": rng.choice((None, "missing", "a")), "fuse_unk": True}
    elif how == "unk":
        model["unk_token"] = rng.choice(("missing", "a", "", 5, ["a"]))
    elif how == "dropout":
        model["dropout"] = rng.choice((0.0, 1.0, 2.0, -1, "a"))
    elif how == "merges":
        words = [*model["vocab"], "missing"]
        made = [[rng.choice(words), rng.choice(words)] for _ in range(rng.choice((1, 50)))]
        model["merges"] = rng.choice(([*model["merges"], *made], made, [" ".join(pair) for pair in made], ["a"], [[]]))
    elif how == "ids":
        model["vocab"] = {word: rng.choice((0, at, at // 2, at * 3)) for at, word in enumerate(model["vocab"])}
    elif how == "huge id":
        model["vocab"][rng.choice(list(model["vocab"]))] = number(rng)
    elif how == "no type":
        del model["type"]
    else:
        model |= {"vocab": {}, "merges": []}
    return f"BPE, {how}"


def other_model(spec: dict[str, Any], rng: random.Random) -> str:
    """A model of another type."""
    words = [str(word) for word in spec["model"]["vocab"]][: rng.choice((0, 1, 100, 400))]  # Unigram's have scores
    kind = rng.choice(("Unigram", "WordPiece", "WordLevel", "BPE", "Odd"))
    model: dict[str, Any] = {"type": kind, "vocab": {word: at for at, word in enumerate(words)}, "merges": []}
    model |= {"unk_token": rng.choice((words[0] if words else "a", "missing", None)), "byte_fallback": True}
    model |= {"continuing_subword_prefix": rng.choice(("##", "")), "max_input_chars_per_word": number(rng)}
    if kind == "Unigram":
        score: Any = rng.choice((-1.0, 0.0, 1e308, -1e308, 5, "a", None))
        model["vocab"] = [[word * rng.choice((1, 1, 1, 2000)), score] for word in words]
        model["unk_id"] = rng.choice((0, 1, None, len(words), 2**40, -1))
    spec["model"] = model
    if rng.random() < 0.5:
        spec["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    return f"model {kind} of {len(words)} tokens"


def values(spec: dict[str, Any], rng: random.Random) -> str:
    """Change any value."""
    return change_value(spec, rng)


def padding(spec: dict[str, Any], rng: random.Random) -> str:
    """Truncation and padding, which the library would apply."""
    spec["padding"] = {"strategy": {"Fixed": rng.choice((10, 2**31, 2**60))}, "direction": "Left", "pad_id": 0}
    spec["padding"] |= {"pad_to_multiple_of": rng.choice((None, 0, 2**40)), "pad_type_id": 0, "pad_token": "x"}
    spec["truncation"] = {"max_length": number(rng), "stride": number(rng), "strategy": "LongestFirst"}
    spec["truncation"]["direction"] = "Right"
    return "padding and truncation"


CHANGES = (steps, steps, steps, many_steps, added_tokens, odd_bpe, odd_bpe, other_model, other_model, values, padding)
QUESTIONS = ("Hello", "a" * 60 + "!", " " * 3000 + "x", "é" * 500, "<|im_end|> Hello <0x41>", "aaaa bbbb eeee\n" * 50)


def make(originals: Path, folder: Path, number: int, rng: random.Random) -> Command:
    """A bundle with a hostile tokenizer.json, sometimes also with an odd tokenizer_config.json."""
    bundle = copy(originals, folder)
    path = bundle / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    chosen = [CHANGES[number % len(CHANGES)], *(rng.choice(CHANGES) for _ in range(rng.choice((0, 0, 1, 2))))]
    what = ", ".join(change(spec, rng) for change in chosen if isinstance(spec.get("model"), dict))
    path.write_bytes(dump(spec))
    if rng.random() < 0.2:
        config = json.loads((bundle / "tokenizer_config.json").read_text(encoding="utf-8"))
        what += f", config: {change_value(config, rng)}"
        (bundle / "tokenizer_config.json").write_bytes(dump(config))
    correct_manifest(bundle, "tokenizer.json", "tokenizer_config.json")
    command = ask(what)
    words = list(command.words)
    words[words.index("Hello")] = rng.choice(QUESTIONS)
    return Command(what, command.main, tuple(words))
