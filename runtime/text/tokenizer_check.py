"""`check_tokenizer`: inspects a tokenizer.json before the `tokenizers` library reads it.

The library trusts its input: steps can multiply a text's length, patterns can backtrack for hours, and wrong sizes
abort the process. Every step is limited here; `pattern_check` checks patterns. The names of steps and of their fields
are those that the library writes (its format has no other documentation).
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llm_edge.runtime.errors import BundleError, LlmEdgeError
from llm_edge.runtime.safe_io import MIB, short_repr
from llm_edge.runtime.text.pattern_check import check_patterns

MAX_TOKEN = 1024  # characters of an added or special token: finding parts of one takes memory quadratic in its length
_MAX_ADDED = 20_000  # the library takes seconds for more
_MAX_ADDED_SQUARES = 1 << 24  # sum of the squares of their lengths
_MAX_STEPS = 32  # of one kind
_MAX_GROWTH = 16  # factor by which all steps of one kind may lengthen a text
_MAX_TEXT = 256  # characters of a text that a step inserts or looks for
_MAX_COUNT = 1000  # of any number in a step, such as of characters to strip
_MAX_WORD = 1000  # characters of a word that WordPiece splits, in a time quadratic in it
_MAX_PIECES = 256  # of a post-processor's template
_MAX_DEPTH = 4
_FILE_BYTES_PER_TOKEN = 512

_KINDS: Mapping[str, frozenset[str]] = {
    "normalizer": frozenset(
        {"BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend"}
        | {"Replace", "Strip", "StripAccents"}
    ),
    "pre_tokenizer": frozenset(
        {"BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace", "Punctuation"}
        | {"Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"}
    ),
    "post_processor": frozenset({"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"}),
    "decoder": frozenset(
        {"BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
    ),
}
_SEQUENCES = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
_MODELS = {"BPE", "Unigram", "WordLevel", "WordPiece"}
_MODEL_OF_BPE = re.compile(r'\{\s*"type"\s*:\s*"BPE"')
# What follows the model if it is not the last value; a key may be spelled with escapes.
_FURTHER_KEY = re.compile(
    r'\}\s*,\s*"(?:added_tokens|decoder|normalizer|post_processor|pre_tokenizer|[^"]*\\[^"]*)"\s*:'
)


class _RejectedError(Exception):
    """The reason why a tokenizer is rejected."""


def check_tokenizer(
    text: str, name: object, vocab_size: int | None = None, *, error: type[LlmEdgeError] = BundleError
) -> None:
    """Check the content of a tokenizer.json.

    Args:
        text: the content.
        name: of the file, for messages.
        vocab_size: number of tokens of the model; None skips the limits that depend on it.
        error: raised if the tokenizer is rejected.
    """
    try:
        spec = _parse(text)
        _check_sizes(text, spec, vocab_size)
        patterns: list[str] = []
        for part in _KINDS:
            steps = list(_steps(spec.get(part), part))
            if len(steps) > _MAX_STEPS:
                raise _RejectedError(f"its {part} has {len(steps):,} steps, more than {_MAX_STEPS}")
            growth = math.prod(_growth(step) for step in steps)
            if growth > _MAX_GROWTH:
                raise _RejectedError(f"its {part} can make a text {growth:,} times as long")
            for step in steps:
                _check_step(step, part, patterns)
        if isinstance(spec.get("model"), dict):
            _check_model(spec["model"])
        reason = check_patterns(patterns)
    except _RejectedError as rejected:
        raise error(f"{name}: unusable tokenizer: {rejected}") from rejected
    if reason is not None:
        raise error(f"{name}: unusable tokenizer: {reason}")


def _parse(text: str) -> dict[str, Any]:
    """The content as an object; without its model if that is BPE's, which takes most of the time and needs no check."""
    head = _before_bpe(text)
    try:
        spec = json.loads(text if head is None else head + '"model": null}', object_pairs_hook=_unique)
    except RecursionError as error:
        raise _RejectedError("it is nested too deeply") from error
    except ValueError as error:
        if head is not None:  # "model" is not a key of the outermost object
            spec = _parse_whole(text)
        else:
            raise _RejectedError(f"it is not JSON ({error})") from error
    if not isinstance(spec, dict):
        raise _RejectedError("it is not a JSON object")
    return spec


def _parse_whole(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (RecursionError, ValueError) as error:
        raise _RejectedError("it is not JSON") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _RejectedError("an object has the same key twice")
    return result


def _before_bpe(text: str) -> str | None:
    """What precedes the key "model", if its value is a BPE model and no other key of the outermost object follows."""
    start = text.find('"model"')
    value = start + len('"model"')
    colon = re.compile(r"\s*:\s*").match(text, value) if start >= 0 else None
    if colon is None or not _MODEL_OF_BPE.match(text, colon.end()):
        return None
    at = text.find("}", value)
    while at >= 0:
        if _FURTHER_KEY.match(text, at):
            return None
        at = text.find("}", at + 1)
    return text[:start]


def _check_sizes(text: str, spec: Mapping[str, Any], vocab_size: int | None) -> None:
    added = spec.get("added_tokens") or []
    contents = [token.get("content") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    if vocab_size is not None:
        if len(contents) > vocab_size:
            raise _RejectedError(f"it has {len(contents):,} added tokens, but the model {vocab_size:,} tokens")
        if len(text) > 16 * MIB + _FILE_BYTES_PER_TOKEN * vocab_size:
            raise _RejectedError(f"it is too large for a model of {vocab_size:,} tokens")
    if len(contents) > _MAX_ADDED:
        raise _RejectedError(f"it has {len(contents):,} added tokens, more than {_MAX_ADDED:,}")
    check_lengths(content for content in contents if isinstance(content, str))


def check_lengths(tokens: Iterable[str], fail: Callable[[str], Exception] = _RejectedError) -> None:
    """Raise `fail(reason)` for added or special tokens that are too long."""
    squares = 0
    for token in tokens:
        if len(token) > MAX_TOKEN:
            raise fail(f"the token {short_repr(token[:20])}... has {len(token):,} characters, more than {MAX_TOKEN:,}")
        squares += len(token) ** 2
    if squares > _MAX_ADDED_SQUARES:
        raise fail("its added tokens are too long")


def _steps(step: Any, part: str, depth: int = 0) -> Iterable[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder, without sequences of them."""
    if step is None:
        return
    if not isinstance(step, dict) or depth > _MAX_DEPTH:
        raise _RejectedError(f"its {part} is not a step, or nested too deeply")
    kind = step.get("type")
    if kind == "Sequence":
        inner = step.get(_SEQUENCES[part])
        if not isinstance(inner, list):
            raise _RejectedError(f"its {part} is a sequence without steps")
        for each in inner:
            yield from _steps(each, part, depth + 1)
    elif isinstance(kind, str) and kind in _KINDS[part]:
        yield step
    else:
        raise _RejectedError(f"its {part} has the unknown type {short_repr(kind)}")


def _pattern(step: Mapping[str, Any]) -> tuple[str, bool]:
    """The pattern that a step looks for, and whether it is a regular expression."""
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and len(pattern) == 1:
        (kind, value), *_ = pattern.items()
        if kind in ("String", "Regex") and isinstance(value, str):
            return value, kind == "Regex"
    raise _RejectedError(f"a {step['type']} has no pattern")


def _growth(step: Mapping[str, Any]) -> int:
    """The factor by which a step can lengthen a text."""
    if step["type"] != "Replace":
        return 1
    (pattern, is_regex), content = _pattern(step), step.get("content")
    if not isinstance(content, str):
        raise _RejectedError("a Replace has no content")
    if is_regex or not pattern:  # may match nothing, at every position
        return 1 + len(content)
    return max(1, -(-len(content) // len(pattern)))


def _check_step(step: Mapping[str, Any], part: str, patterns: list[str]) -> None:
    """Check the fields of a step, and collect its regular expression."""
    kind = step["type"]
    if kind in ("Replace", "Split"):
        pattern, is_regex = _pattern(step)
        if is_regex:
            patterns.append(pattern)
    if part == "post_processor":
        _check_pieces(step)
        return
    for key, value in step.items():
        if isinstance(value, str) and key != "precompiled_charsmap" and len(value) > _MAX_TEXT:
            raise _RejectedError(f"{key} of a {kind} has {len(value):,} characters, more than {_MAX_TEXT}")
        if isinstance(value, int) and not 0 <= value <= _MAX_COUNT:
            raise _RejectedError(f"{key} of a {kind} is {short_repr(value)}, not from 0 to {_MAX_COUNT}")
    if kind == "FixedLength" and step.get("length") == 0:
        raise _RejectedError("a FixedLength has the length 0")
    if kind == "Precompiled":
        _check_charsmap(step.get("precompiled_charsmap"))


def _check_pieces(step: Mapping[str, Any]) -> None:
    for key in ("single", "pair"):
        if isinstance(step.get(key), list) and len(step[key]) > _MAX_PIECES:
            raise _RejectedError(f"its post_processor adds {len(step[key]):,} tokens")
    special = step.get("special_tokens")
    tokens = special.values() if isinstance(special, dict) else ()
    ids = [token.get("ids") for token in tokens if isinstance(token, dict)]
    added = sum(len(each) for each in ids if isinstance(each, list))
    if added > _MAX_PIECES:
        raise _RejectedError(f"its post_processor adds {added:,} tokens")


def _check_charsmap(encoded: Any) -> None:
    """Check SentencePiece's compiled normalization: the size of a trie, the trie, and texts that end with NUL."""
    try:
        data = base64.b64decode(encoded, validate=True)
        size = int.from_bytes(data[:4], "little")
        texts = data[4 + size :]
        if len(data) < 4 or size % 4 or not 1024 <= size <= len(data) - 4:
            raise ValueError("the size of its trie is wrong")
        texts.decode("utf-8")
    except (TypeError, ValueError, binascii.Error) as error:
        raise _RejectedError("its precompiled_charsmap is damaged") from error
    if max(map(len, texts.split(b"\0"))) > _MAX_TEXT:
        raise _RejectedError("its precompiled_charsmap inserts too long a text")


def _check_model(model: Mapping[str, Any]) -> None:
    kind, vocab = model.get("type"), model.get("vocab")
    if kind is not None and not (isinstance(kind, str) and kind in _MODELS):
        raise _RejectedError(f"its model has the unknown type {short_repr(kind)}")
    unknown = model.get("unk_token")
    if kind in ("WordLevel", "WordPiece") and not (
        isinstance(vocab, dict) and isinstance(unknown, str) and unknown in vocab
    ):
        raise _RejectedError(f"its vocabulary lacks the unknown token {short_repr(unknown)}")
    longest = model.get("max_input_chars_per_word", 100)
    if not isinstance(longest, int) or not 0 <= longest <= _MAX_WORD:
        raise _RejectedError(f"max_input_chars_per_word is {short_repr(longest)}, not from 0 to {_MAX_WORD}")
    if kind == "Unigram" and isinstance(vocab, list):
        tokens = (entry[0] for entry in vocab if isinstance(entry, list) and entry)
        if max((len(token) for token in tokens if isinstance(token, str)), default=0) > MAX_TOKEN:
            raise _RejectedError(f"a token has more than {MAX_TOKEN:,} characters")
