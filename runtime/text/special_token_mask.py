"""`SpecialTokenMask`: keeps the text of a conversation from spelling special tokens in a rendered chat template."""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from llm_edge.runtime.errors import InputError, TemplateError

_ROLES = frozenset({"system", "user", "assistant", "tool", "developer", "function", "ipython", "model"})
_RARE = range(0x20000, 0x2A6DE)  # CJK extension B: printable, no white space, no case


_TYPED_BY_OTHERS = frozenset({"user", "tool", "function", "ipython"})
"""Roles whose text cannot contain a control token of the template; answers consist of what the model generated."""


class Spellings:
    """Finds where a text spells one of some tokens, or could become part of such a spelling."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = list(tokens)
        self._first = frozenset(text[0] for text in self._tokens if text)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return any_of(self._tokens)

    @functools.cached_property
    def _partial(self) -> PartialMatches:
        return PartialMatches(self._tokens)

    def occur_in(self, text: str) -> bool:
        """Whether a text spells one of the tokens."""
        return not self._first.isdisjoint(text) and self._pattern.search(text) is not None

    def places(self, text: str, *, ends: bool = True) -> set[int]:
        """Positions of characters without which no token could be read in the text or, with `ends`, across its ends."""
        places = self._partial.places(text) if ends else set()
        match = None if self._first.isdisjoint(text) else self._pattern.search(text)
        while match is not None:  # including overlapping matches
            places.add(match.start())
            match = self._pattern.search(text, match.start() + 1)
        return places


class PartialMatches:
    """Finds where the ends of a text could become part of the spelling of a token."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._specials = [text for text in tokens if len(text) > 1]
        self._starts = {text[:n] for text in self._specials for n in range(1, len(text))}
        self._ends = {text[-n:] for text in self._specials for n in range(1, len(text))}
        self._longest = max(map(len, self._specials), default=1) - 1

    def places(self, text: str) -> set[int]:
        """Positions of characters without which no special token could extend into this text."""
        places = set()
        stripped = text.strip()
        for part, start in {text: 0, stripped: text.find(stripped)}.items():  # templates trim
            for n in range(1, min(len(part), self._longest) + 1):
                if part[-n:] in self._starts:
                    places.add(start + len(part) - n)
                if part[:n] in self._ends:
                    places.add(start + n - 1)
            if 0 < len(part) < self._longest and any(part in special[1:-1] for special in self._specials):
                places.add(start)
        return places


class SpecialTokenMask:
    """Replaces characters in a conversation so that none of its text can be read as a special token.

    In questions, tools and their results it cannot be read as another control token either. The substitute is one of
    Unicode's rarest characters, absent from the conversation, so that templates can trim, measure, slice and escape
    around it. Strings that the template compares with keep their ends.
    """

    def __init__(self, specials: Spellings, controls: Spellings, literals: frozenset[str], unmasked: object) -> None:
        self._specials, self._controls, self._literals, self._unmasked = specials, controls, literals, unmasked
        self._stand_ins: dict[str, str] = {}

    @property
    def used(self) -> bool:
        """Whether there was anything to mask."""
        return bool(self._stand_ins)

    def message(self, message: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Mask a message; its role is an identifier and is rejected if it would need a mask."""
        role = message["role"]
        if self._specials.places(role, ends=role not in _ROLES | self._literals):
            raise TemplateError(f"messages[{index}]: the role {role!r} resembles part of a special token")
        controls = role in _TYPED_BY_OTHERS
        return {**{key: self.data(value, controls=controls) for key, value in message.items()}, "role": role}

    def data(self, value: Any, *, controls: bool = False) -> Any:
        """Mask the strings in JSON-like data; with `controls` also those that spell other control tokens."""
        if isinstance(value, str):
            return self._text(value, self._controls if controls else self._specials)
        if isinstance(value, dict):
            return {
                self.data(key, controls=controls): self.data(item, controls=controls) for key, item in value.items()
            }
        return [self.data(item, controls=controls) for item in value] if isinstance(value, list) else value

    def restore(self, text: str) -> str:
        """Restore the masked characters in a text."""
        for char, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, char).replace(json.dumps(stand_in)[1:-1], json.dumps(char)[1:-1])
        return text

    def _text(self, text: str, spellings: Spellings) -> str:
        places = spellings.places(text, ends=text not in self._literals)
        if not places:
            return text
        return "".join(self._stand_in(char) if i in places else char for i, char in enumerate(text))

    def _stand_in(self, char: str) -> str:
        if char not in self._stand_ins:
            if len(self._taken) > len(_RARE) // 2:
                raise InputError("the text contains too many rare characters: remove some")
            while (found := chr(secrets.choice(_RARE))) in self._taken:
                pass
            self._taken.add(found)
            self._stand_ins[char] = found
        return self._stand_ins[char]

    @functools.cached_property
    def _taken(self) -> set[str]:
        text = json.dumps(self._unmasked, ensure_ascii=False)
        return set() if text.isascii() else set(re.findall(f"[{chr(_RARE[0])}-{chr(_RARE[-1])}]", text))


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, at each place the longest; without texts it matches nothing."""
    longest_first = sorted(filter(None, texts), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
