"""`LazyTokenizer`: a BPE tokenizer of the `tokenizers` library that is loaded only as far as texts need it.

Loading a vocabulary of 262,144 tokens takes the library a second and 300 MB. Encoding a text needs the tokens that
occur in it, and the merges that make them: a `VocabularyTable` finds these, and the library encodes the text with them.
Normalizer, pre-tokenizer, added tokens, post-processor and decoder are the whole tokenizer's.
"""

from __future__ import annotations

import functools
import json
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import tokenizers
from tokenizers.models import BPE, Unigram

from llm_edge.runtime.text.vocabulary_table import VocabularyTable, packed

_MIN_TOKENS = 16_384  # smaller vocabularies load quickly
_CHARACTERS_PER_TOKEN = 0.2  # of texts encoded in total, after which loading everything has become cheaper
_OPTIONS = ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
_UNSUPPORTED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class LazyTokenizer:
    """The parts of a `tokenizers.Tokenizer` that `Tokenizer` uses.

    Args:
        table: of the model, whose info is that of `table_of`.
        load: loads the whole tokenizer, which long texts need, and whatever else the table cannot do.
    """

    def __init__(self, table: VocabularyTable, load: Callable[[], tokenizers.Tokenizer]) -> None:
        self._table = table
        self._load = load
        self._options: dict[str, Any] = table.info["options"]
        self._size: int = table.info["size"]
        self._small = tokenizers.Tokenizer.from_str(table.info["tokenizer"])
        self._small.no_truncation()
        self._small.no_padding()
        self._words = Unigram([(secrets.token_hex(16), 0.0)], 0, False)  # its tokens are whole words
        self._added: dict[int, tokenizers.AddedToken] = self._small.get_added_tokens_decoder()
        self._special = {token.content for token in self._added.values() if token.special}
        self._always = [*(_BYTES if self._options.get("byte_fallback") else ()), self._options.get("unk_token") or ""]
        self._left = _CHARACTERS_PER_TOKEN * len(table)
        self._lock = threading.Lock()  # guards the model of `_small`

    @property
    def normalizer(self) -> Any:
        return self._small.normalizer

    def encode(self, text: str, add_special_tokens: bool = True) -> tokenizers.Encoding:
        """As of the library."""
        self._left -= len(text)
        if self._left < 0 or "whole" in self.__dict__:
            return self.whole.encode(text, add_special_tokens=add_special_tokens)
        with self._lock:
            self._small.model = self._words
            words = set(self._small.encode(text, add_special_tokens=False).tokens)
            vocabulary, merges = self._table.part(words, self._always)
            self._small.model = BPE(vocabulary, merges, **self._options)
            return self._small.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """As of the library."""
        tokens = []
        for number in ids:
            if not 0 <= number < 2**32:
                raise OverflowError("a token id is out of range")
            token = self.id_to_token(number)
            if token is not None and not (skip_special_tokens and token in self._special):
                tokens.append(token)
        decoder = self._small.decoder
        return decoder.decode(tokens) if decoder is not None else " ".join(tokens)

    def id_to_token(self, number: int) -> str | None:
        """As of the library."""
        added = self._added.get(number)
        return added.content if added is not None else self._table.text(number)

    def token_to_id(self, text: str) -> int | None:
        """As of the library."""
        found: int | None = self._small.token_to_id(text) if text in self._added_texts else self._table.token_id(text)
        return found

    def get_added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """As of the library."""
        return self._added

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """As of the library."""
        return self._size if with_added_tokens else len(self._table)

    def get_vocab(self) -> dict[str, int]:
        """As of the library."""
        vocabulary: dict[str, int] = self.whole.get_vocab()
        return vocabulary

    def to_str(self) -> str:
        """As of the library."""
        return str(self.whole.to_str())

    @functools.cached_property
    def whole(self) -> tokenizers.Tokenizer:
        """The whole tokenizer, loaded on first use."""
        return self._load()

    @functools.cached_property
    def _added_texts(self) -> frozenset[str]:
        return frozenset(token.content for token in self._added.values())


Backend: TypeAlias = tokenizers.Tokenizer | LazyTokenizer


def loads_slowly(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a table is worth making."""
    return isinstance(tokenizer.model, BPE) and tokenizer.get_vocab_size() >= _MIN_TOKENS


def table_of(tokenizer: tokenizers.Tokenizer) -> bytes | None:
    """The data of a table for a `LazyTokenizer`; None for a model with options that it does not support."""
    spec = json.loads(tokenizer.to_str())
    model = spec["model"]
    vocabulary: dict[str, int] = model["vocab"]
    if any(model.get(name) for name in _UNSUPPORTED):
        return None
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    spec["model"] = {**model, "vocab": added, "merges": []}
    info = {
        "tokenizer": json.dumps(spec),
        "size": tokenizer.get_vocab_size(with_added_tokens=True),
        "options": {name: model[name] for name in _OPTIONS if model.get(name) is not None},
    }
    return packed(vocabulary, [_pair(merge) for merge in model["merges"]], info)


def _pair(merge: Any) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
