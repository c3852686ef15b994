"""`TokenRecord`: a token of an answer with its probability, its alternatives and their texts.

Records are packed in batches while an answer is generated, and can be read without the model.
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

_DIGITS = 5  # decimals of a log-probability
_MAX_BYTES = 64 << 20  # of an unpacked batch
_DAMAGED = "the token records of this answer are damaged: regenerate it (r on the message)"


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token of an answer."""

    logprob: TokenLogprob  # of the token and of the alternatives
    texts: Mapping[int, str]  # of at least these tokens, by id

    def text(self, token: int) -> str:
        """The text of a token."""
        return self.texts.get(token, f"<{token}>")


class Recorder:
    """Creates token records, and looks the text of each token up only once."""

    def __init__(self, text_of: Callable[[int], str]) -> None:
        self._text_of = text_of
        self._texts: dict[int, str] = {}

    def record(self, logprob: TokenLogprob) -> TokenRecord:
        """Create the record of a token."""
        for token in (logprob.token, *(each for each, _ in logprob.top)):
            if token not in self._texts:
                self._texts[token] = self._text_of(token)
        return TokenRecord(logprob, self._texts)


def pack(records: Sequence[TokenRecord]) -> bytes:
    """Serialize records of one recorder."""
    texts: dict[int, str] = {}
    tokens = []
    for each in records:
        found = each.logprob
        top = [[token, _rounded(logprob)] for token, logprob in found.top]
        tokens.append([found.token, _rounded(found.logprob), top])
        texts |= {token: each.text(token) for token in (found.token, *(token for token, _ in found.top))}
    return zlib.compress(json.dumps({"texts": texts, "tokens": tokens}, separators=(",", ":")).encode(), 1)


def unpack(data: bytes) -> list[TokenRecord]:
    """Deserialize the records that `pack` serialized.

    Raises:
        InputError: the data is damaged.
    """
    try:
        opened = zlib.decompressobj()
        read = json.loads(opened.decompress(data, _MAX_BYTES))
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
