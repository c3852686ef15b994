"""What is kept of the tokens of an answer: how probable each was, its runners-up, and how they are written.

A record is packed in pieces, as an answer grows, and read back without the model that made it. Knows no store.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_edge.runtime.errors import InputError
from llm_edge.runtime.sampling.logprobs import TokenLogprob

_DIGITS = 5  # behind the point of a log-probability
_LARGEST = 64 << 20  # bytes of a piece, unpacked
_DAMAGED = "the record of this answer's tokens is damaged: have it answered again (r at the message)"


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token of an answer.

    Attributes:
        logprob: its own, and those of the runners-up.
        texts: what these tokens say, by id; others may be among them.
    """

    logprob: TokenLogprob
    texts: Mapping[int, str]

    def text(self, token: int) -> str:
        """What a token says."""
        return self.texts.get(token, f"<{token}>")


class Recorder:
    """Makes records of tokens, and asks once how each is written.

    Args:
        text_of: gives what a token says.
    """

    def __init__(self, text_of: Callable[[int], str]) -> None:
        self._text_of = text_of
        self._texts: dict[int, str] = {}

    def record(self, logprob: TokenLogprob) -> TokenRecord:
        """Of a token."""
        for token in (logprob.token, *(each for each, _ in logprob.top)):
            if token not in self._texts:
                self._texts[token] = self._text_of(token)
        return TokenRecord(logprob, self._texts)


def pack(records: Sequence[TokenRecord]) -> bytes:
    """Tokens of one recorder, to be kept."""
    texts: dict[int, str] = {}
    tokens = []
    for each in records:
        found = each.logprob
        top = [[token, _rounded(logprob)] for token, logprob in found.top]
        tokens.append([found.token, _rounded(found.logprob), top])
        texts |= {token: each.text(token) for token in (found.token, *(token for token, _ in found.top))}
    return zlib.compress(json.dumps({"texts": texts, "tokens": tokens}, separators=(",", ":")).encode(), 1)


def unpack(data: bytes) -> list[TokenRecord]:
    """What `pack` made.

    Raises:
        InputError: it is something else.
    """
    try:
        opened = zlib.decompressobj()
        read = json.loads(opened.decompress(data, _LARGEST))
        texts = {int(token): _text(text) for token, text in read["texts"].items()}
        return [
            TokenRecord(
                TokenLogprob(int(token), _number(logprob), tuple((int(id_), _number(value)) for id_, value in top)),
                texts,
            )
            for token, logprob, top in read["tokens"]
        ]
    except (zlib.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(_DAMAGED) from error


def _rounded(logprob: float) -> float | None:
    return round(logprob, _DIGITS) if math.isfinite(logprob) else None


def _number(value: Any) -> float:
    return -math.inf if value is None else float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
