"""Reads SentencePiece's tokenizer.model, a protobuf message (sentencepiece_model.proto)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import AddedToken, pre_tokenizers, processors

from llm_edge.checkpoint.text.converted import ConvertedTokenizer
from llm_edge.checkpoint.text.ranked_bpe import MAX_TOKENS
from llm_edge.checkpoint.text.sentencepiece_bpe import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Pieces,
    build_tokenizer,
)
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_bytes

_MAX_BYTES = 64 * MIB
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}
_BPE = 2  # TrainerSpec.model_type
# Fields: ModelProto, SentencePiece, TrainerSpec, NormalizerSpec
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _ROLE_IDS = 3, {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES = 2, 3, 4
_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast")

Field = tuple[int, Any]
"""Number and value: an integer, 4 or 8 bytes, or the bytes of a string or message."""


def read_sentencepiece(path: Path, config: Mapping[str, Any]) -> ConvertedTokenizer | None:
    """Read a tokenizer.model with a BPE vocabulary and without normalization, such as those of Llama and Gemma.

    Text is split as SentencePiece does, which transformers' conversion does not if it begins with a space.

    Args:
        path: the file.
        config: content of tokenizer_config.json.

    Returns:
        None if it is of another kind.

    Raises:
        CheckpointError: the file is damaged.
    """
    message = list(_fields(read_bytes(path, _MAX_BYTES, error=CheckpointError), path))
    trainer, normalizer = (dict(_merged(message, number, path)) for number in (_TRAINER, _NORMALIZER))
    if trainer.get(_MODEL_TYPE, 1) != _BPE or config.get("tokenizer_class") not in _CLASSES:
        return None
    if normalizer.get(_CHARSMAP) or normalizer.get(_EXTRA_SPACES, 1):  # text is normalized
        return None
    tokens, scores, types = _pieces(message, path)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        _fail(path, "has a piece twice")
    prefix = bool(normalizer.get(_DUMMY_PREFIX, 1))
    tokenizer = build_tokenizer(Pieces(vocab, types, scores, prefix, str(path)))
    if prefix and config.get("legacy") is False:  # no space after special tokens
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    roles = _roles(trainer, tokens, types)
    bos = roles.get("bos_token")
    add_bos = bos is not None and config.get("add_bos_token", True) is True
    if add_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, vocab[bos])]
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != USER_DEFINED)
            for token, kind in zip(tokens, types, strict=True)
            if token and kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    ends = (vocab[roles["eos_token"]],) if "eos_token" in roles else ()
    return ConvertedTokenizer(tokenizer.to_str(), {**roles, "add_bos_token": add_bos}, ends)


def _pieces(message: list[Field], path: Path) -> tuple[list[str], list[float], list[int]]:
    """Return text, score and type of every piece."""
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    for number, value in message:
        if number != _PIECES:
            continue
        piece = dict(_fields(value if isinstance(value, bytes) else b"", path))
        text, score, kind = piece.get(_PIECE, b""), piece.get(_SCORE, bytes(4)), piece.get(_TYPE, NORMAL)
        if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4 or not isinstance(kind, int):
            _fail(path, f"piece {len(tokens)} is damaged")
        try:
            tokens.append(text.decode("utf-8"))
        except UnicodeDecodeError:
            _fail(path, f"piece {len(tokens)} is not UTF-8")
        scores.append(struct.unpack("<f", score)[0])
        types.append(kind)
    if not 0 < len(tokens) <= MAX_TOKENS:
        _fail(path, f"has {len(tokens)} pieces")
    return tokens, scores, types


def _roles(trainer: Mapping[int, Any], tokens: list[str], types: list[int]) -> dict[str, str]:
    """Return the special tokens by their roles."""
    roles = {}
    for role, (number, default) in _ROLE_IDS.items():
        index = trainer.get(number, default)
        if isinstance(index, int) and 0 <= index < len(tokens) and types[index] in (UNKNOWN, CONTROL):
            roles[role] = tokens[index]
    return roles


def _merged(message: list[Field], wanted: int, path: Path) -> Iterator[Field]:
    """Yield the fields of all embedded messages with a number; of a repeated one the last counts."""
    for number, value in message:
        if number == wanted and isinstance(value, bytes):
            yield from _fields(value, path)


def _fields(data: bytes, path: Path) -> Iterator[Field]:
    """Yield the fields of a protobuf message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at, path)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at, path)
            yield number, value
            continue
        length = _WIDTHS.get(kind, -1)
        if kind == _BYTES:
            length, at = _varint(data, at, path)
        if length < 0 or at + length > len(data):
            _fail(path, "is not a SentencePiece model, or truncated")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int, path: Path) -> tuple[int, int]:
    """Return a number of up to ten bytes, and the position after it."""
    value = 0
    for shift, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value, at + shift + 1
    raise _error(path, "is not a SentencePiece model, or truncated")


def _fail(path: Path, reason: str) -> NoReturn:
    raise _error(path, reason)


def _error(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: {reason}: give the model's tokenizer.json")
