"""`VocabularyTable`: a BPE vocabulary in a form that takes no time to load and finds the parts that a text can use.

A sorted table of the tokens' texts, with each token's longest proper prefix that is a token too: all tokens at a place
of a text are found by one binary search and the chain of prefixes. Merges are listed by the token that they make.
"""

from __future__ import annotations

import array
import bisect
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

_MAGIC = b"llm-edge vocabulary 1\n"
_NONE = 2**32 - 1
_ARRAYS = ("starts", "ids", "prefixes", "by_id", "merge_starts", "merges")


class VocabularyTable(Sequence[bytes]):
    """The tokens of a BPE model, sorted by the UTF-8 of their texts.

    Args:
        data: what `packed` returned.

    Attributes:
        info: what was given to `packed`.

    Raises:
        ValueError: the data is damaged, or of another format.
    """

    def __init__(self, data: bytes) -> None:
        if not data.startswith(_MAGIC) or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise ValueError("not a table of a vocabulary, or damaged")
        end = data.index(b"\n", len(_MAGIC))
        header = json.loads(data[len(_MAGIC) : end])
        self.info: Any = header["info"]
        view, at = memoryview(data), -(-(end + 1) // 4) * 4
        arrays = {}
        for name, count in zip(_ARRAYS, header["counts"], strict=True):
            arrays[name] = view[at : at + 4 * count].cast("I")
            at += 4 * count
        self._texts = data[at:-4]
        self._starts, self._ids, self._prefixes = arrays["starts"], arrays["ids"], arrays["prefixes"]
        self._by_id, self._merge_starts, self._merges = arrays["by_id"], arrays["merge_starts"], arrays["merges"]
        self._longest = header["longest"]  # bytes of the longest token

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, place: int) -> bytes: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[bytes]: ...
    def __getitem__(self, place: int | slice) -> bytes | Sequence[bytes]:
        assert isinstance(place, int)
        return self._texts[self._starts[place] : self._starts[place + 1]]

    def token_id(self, text: str) -> int | None:
        """The id of the token with this text."""
        key = text.encode("utf-8", "surrogatepass")
        place = bisect.bisect_left(self, key)
        return self._ids[place] if place < len(self) and self[place] == key else None

    def text(self, number: int) -> str | None:
        """The text of a token; None if there is no such id."""
        place = self._by_id[number] if 0 <= number < len(self._by_id) else _NONE
        return None if place == _NONE else self[place].decode()

    def part(self, words: Iterable[str], also: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """All tokens that can occur in some words, and the merges that make them, in their order.

        Args:
            words: texts that the model encodes.
            also: further tokens to include, as far as they exist.

        Returns:
            ids by text, and pairs of texts.
        """
        places: set[int] = set()
        for word in words:
            data = word.encode()
            for start in range(len(data)):
                if data[start] & 0xC0 != 0x80:  # a character begins here
                    places.update(self._at(data[start : start + self._longest]))
        merges = []
        for place in places:
            for at in range(self._merge_starts[place], self._merge_starts[place + 1]):
                rank, left, right = self._merges[3 * at : 3 * at + 3]
                merges.append((rank, left, right))
        merges.sort()
        texts = {place: self[place].decode() for place in places}
        vocabulary = {text: self._ids[place] for place, text in texts.items()}
        for text in also:
            if (number := self.token_id(text)) is not None:
                vocabulary[text] = number
        return vocabulary, [(texts[left], texts[right]) for _, left, right in merges]

    def _at(self, text: bytes) -> Iterator[int]:
        """The places of all tokens that a text begins with."""
        place = bisect.bisect_right(self, text) - 1
        while 0 <= place < _NONE:
            if text.startswith(self[place]):
                yield place
            place = self._prefixes[place]


def packed(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], info: Any) -> bytes:
    """The data of a table.

    Args:
        vocabulary: ids by text.
        merges: pairs of tokens, in their order.
        info: anything that JSON can hold.
    """
    pairs = sorted((text.encode(), number) for text, number in vocabulary.items())
    places = {text: place for place, (text, _) in enumerate(pairs)}
    prefixes: list[int] = []
    open_: list[int] = []  # the tokens that the current one begins with
    for place, (text, _) in enumerate(pairs):
        while open_ and not text.startswith(pairs[open_[-1]][0]):
            open_.pop()
        prefixes.append(open_[-1] if open_ else _NONE)
        open_.append(place)
    by_id = [_NONE] * (max(vocabulary.values(), default=-1) + 1)
    for place, (_, number) in enumerate(pairs):
        by_id[number] = place
    made: list[list[int]] = [[] for _ in pairs]
    for rank, (left, right) in enumerate(merges):
        one, other = left.encode(), right.encode()
        made[places[one + other]] += (rank, places[one], places[other])
    columns = {
        "starts": itertools.accumulate((len(text) for text, _ in pairs), initial=0),
        "ids": (number for _, number in pairs),
        "prefixes": prefixes,
        "by_id": by_id,
        "merge_starts": itertools.accumulate((len(each) // 3 for each in made), initial=0),
        "merges": itertools.chain.from_iterable(made),
    }
    arrays = [array.array("I", columns[name]) for name in _ARRAYS]
    longest = max((len(text) for text, _ in pairs), default=1)
    header = {"info": info, "counts": [len(each) for each in arrays], "longest": longest}
    data = _MAGIC + json.dumps(header).encode() + b"\n"
    data += bytes(-len(data) % 4) + b"".join(each.tobytes() for each in arrays) + b"".join(text for text, _ in pairs)
    return data + zlib.crc32(data).to_bytes(4, "little")
