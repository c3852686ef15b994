"""Translates the regular expressions of JSON Schema (ECMA-262) to the syntax of Rust's regex crate.

Validators disagree about `\\d`, `\\w`, `\\s` and `.`: the translation matches only what is a match in JavaScript and in
Python. Leading look-aheads become further expressions that must match as well.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_REPEAT = 10_000
MAX_PATTERN = 32_768  # characters; llguidance takes minutes to compile larger ones
MAX_LOOK_AHEADS = 20

# Shorthand classes: what every validator takes for a member, and what any of them does.
_NARROW = {
    "d": "0-9",
    "w": "0-9A-Za-z_",
    "s": r"\x{9}-\x{d}\x{20}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}",
}
_WIDE = {
    "d": r"\p{Nd}",
    "w": r"\p{Alphabetic}\p{M}\p{N}\p{Pc}",
    "s": _NARROW["s"] + r"\x{1c}-\x{1f}\x{85}\x{feff}",
}
_CONTROL = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_ANY = r"[^\x{a}\x{d}\x{2028}\x{2029}]"
_GROUP = re.compile(r"\((?:\?(?:(i?):|P?<[A-Za-z_]\w*>))?", re.ASCII)
_REPEAT = re.compile(r"\{(\d{1,9})(?:(,)(\d{0,9}))?\}", re.ASCII)
_CODE = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}|c([A-Za-z])")
_PROPERTY = re.compile(r"[pP](?:[A-Z]|\{[A-Za-z_]{1,40}(?:=[A-Za-z_]{1,40})?\})")

_SECONDS = r"\d+(?:[.,]\d+)?S"
_CLOCK = rf"T(?:\d+H(?:\d+M)?(?:{_SECONDS})?|\d+M(?:{_SECONDS})?|{_SECONDS})"
# Expressions with look-aheads inside, and ones without that match nothing else: zod's z.iso.duration().
_KNOWN = {
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$": (
        rf"^P(?:\d+W|(?:\d+Y(?:\d+M)?(?:\d+D)?|\d+M(?:\d+D)?|\d+D)(?:{_CLOCK})?|{_CLOCK})$"
    )
}
# pydantic's Decimal(max_digits, decimal_places): the look-ahead limits the number of digits.
_DIGITS = re.compile(r"\(\?=\[\\d\.\]\{1,(\d+)\}0\*\$\)(\\d\{0,(\d+)\}\\\.\\d\{0,(\d+)\}0\*\$)")


class PatternError(ValueError):
    """An expression that is invalid or cannot be enforced; the message says why."""


class _Item(NamedTuple):
    """A member of a character class: a code point, or a set in Rust's syntax for inclusion and for exclusion."""

    code: int | None
    narrow: str
    wide: str


def translate(pattern: str) -> list[str]:
    """Expressions of Rust's regex crate, all of which a string has to match (somewhere, as in JSON Schema).

    Raises:
        PatternError: the expression is invalid, or uses what cannot be enforced.
    """
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"it has more than {MAX_PATTERN:,} characters")
    pattern = _DIGITS.sub(_without_digit_limit, _KNOWN.get(pattern, pattern))
    conditions: list[str] = []
    while (found := re.match(r"\^\(\?([=!])", pattern)) and not _alternatives(pattern)[1:]:
        if len(conditions) >= MAX_LOOK_AHEADS:
            raise PatternError(f"it has more than {MAX_LOOK_AHEADS} look-aheads")
        end = _closing(pattern, 1)
        inside = _alternatives(pattern[4:end])
        if found[1] == "=":
            conditions += _whole(f"^(?:{pattern[4:end]})")
        else:
            conditions += [_not_ahead(each) for each in inside]
        pattern = "^" + pattern[end + 1 :]
    return [*conditions, *_whole(pattern)]


def _without_digit_limit(found: re.Match[str]) -> str:
    limit, rest, whole, fraction = found.groups()
    return rest if int(whole) + int(fraction) + 1 <= int(limit) else found[0]


def _whole(pattern: str) -> list[str]:
    return [_Translator(pattern).all()]


def _closing(pattern: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for at, char in _structure(pattern, start):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if depth == 0 and char == ")":
            return at
    raise PatternError("a group is not closed")


def _alternatives(pattern: str) -> list[str]:
    """The parts between the `|` outside all groups."""
    depth, parts, begin = 0, [], 0
    for at, char in _structure(pattern, 0):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if char == "|" and depth == 0:
            parts.append(pattern[begin:at])
            begin = at + 1
    return [*parts, pattern[begin:]]


def _structure(pattern: str, start: int) -> list[tuple[int, str]]:
    """Positions of `(`, `)` and `|` that are neither escaped nor in a character class."""
    found, in_class, at = [], False, start
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()|":
            found.append((at, char))
        at += 1
    return found


def _not_ahead(inside: str) -> str:
    """An expression that matches the strings at whose start `inside` does not match, or fewer."""
    inside = inside.removeprefix("^")
    anywhere = inside.startswith(".*")
    items, rest = _Translator(inside[2:] if anywhere else inside).sequence()
    if items and not anywhere and len(items) == 1 and rest == "*$":  # only such characters
        return _class([items[0]], negated=True)
    if items and not rest and anywhere and len(items) == 1:
        return f"^{_class(items, negated=True)}*$"
    if items and not rest and anywhere and len(items) == 2 and None not in (items[0].code, items[1].code):
        first, same = _class(items[:1]), items[0].code == items[1].code
        run, end = (first, "?") if same else (f"{first}+", "*")
        return f"^(?:{_class(items[:1], negated=True)}|{run}{_class(items, negated=True)})*{first}{end}$"
    if items and not anywhere and rest in ("", "$"):  # a text, as a prefix or as a whole
        out = _class([]) if rest else r"[^\x{0}-\x{10ffff}]"
        for item in reversed(items):
            out = f"(?:$|{_class([item], negated=True)}|{_class([item])}{out})"
        return f"^{out}"
    raise PatternError(f"(?!{inside[:40]}) is too general a look-ahead")


def _class(items: list[_Item], *, negated: bool = False) -> str:
    """A character class; without items, any character."""
    if not items:
        return r"[\x{0}-\x{10ffff}]"
    return f"[{'^' if negated else ''}{''.join(item.wide if negated else item.narrow for item in items)}]"


def _char(code: int) -> _Item:
    if 0xD800 <= code <= 0xDFFF or code > 0x10FFFF:
        raise PatternError("a lone surrogate is not a character")
    text = chr(code) if chr(code).isalnum() else f"\\x{{{code:x}}}"
    return _Item(code, text, text)


class _Translator:
    """Reads one expression from left to right."""

    def __init__(self, pattern: str) -> None:
        self._text, self._at = pattern, 0
        self._open = 0  # groups

    def all(self) -> str:
        """The translation of the whole expression."""
        out: list[str] = []
        quantifiable = False
        while self._at < len(self._text):
            char = self._text[self._at]
            if char in "*+?" or _REPEAT.match(self._text, self._at):
                if not quantifiable:
                    raise PatternError(f"nothing to repeat at position {self._at}")
                out.append(self._quantifier())
                quantifiable = False
                continue
            quantifiable = char not in "(|^$"
            if char in "^$|)":
                self._at += 1
                self._open -= char == ")"
                if self._open < 0:
                    raise PatternError("a group is closed that was not opened")
                out.append(char)
            elif char == "(":
                out.append(self._group())
            elif char == ".":
                self._at += 1
                out.append(_ANY)
            elif self._text[self._at : self._at + 2] in ("\\A", "\\Z", "\\z"):
                out.append("^" if self._text[self._at + 1] == "A" else "$")
                self._at += 2
                quantifiable = False
            else:
                out.append(self._single())
        if self._open:
            raise PatternError("a group is not closed")
        return "".join(out)

    def sequence(self) -> tuple[list[_Item], str]:
        """The characters and shorthand classes up to the first operator, and what follows."""
        items: list[_Item] = []
        while self._at < len(self._text) and self._text[self._at] not in "^$|().*+?{":
            if self._text[self._at] == "[":
                members, negated = self._members()
                items.append(_Item(None, _inside(members, negated, wide=False), _inside(members, negated, wide=True)))
            else:
                items.append(self._item())
        return items, self._text[self._at :]

    def _quantifier(self) -> str:
        found = _REPEAT.match(self._text, self._at)
        text = found[0] if found else self._text[self._at]
        if found and max(int(found[1]), int(found[3] or 0)) > MAX_REPEAT:
            raise PatternError(f"{text} repeats more than {MAX_REPEAT:,} times")
        self._at += len(text)
        if self._text[self._at : self._at + 1] == "?":  # lazy: the same strings match
            self._at += 1
        return text

    def _group(self) -> str:
        if self._text.startswith("(?i)", self._at):
            self._at += 4
            return "(?i)"
        found = _GROUP.match(self._text, self._at)
        assert found is not None
        self._at = found.end()
        if self._text.startswith("?", self._at):
            self._at -= 1
            raise PatternError(f"{self._text[self._at : self._at + 4]!r} is a look-around or a flag")
        self._open += 1
        return f"(?{found[1] or ''}:"

    def _single(self) -> str:
        if self._text[self._at] == "[":
            members, negated = self._members()
            return _class(members, negated=negated)
        item = self._item()
        return f"[{item.narrow}]" if item.code is None else item.narrow

    def _members(self) -> tuple[list[_Item], bool]:
        """The members of a character class, and whether it is negated."""
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        members: list[_Item] = []
        while not self._text.startswith("]", self._at):
            if self._at >= len(self._text):
                raise PatternError("a character class is not closed")
            item = self._item(in_class=True)
            if item.code is not None and re.match(r"-[^\]]", self._text[self._at : self._at + 2]):
                self._at += 1
                end = self._item(in_class=True)
                if end.code is None:
                    members += [item, _char(ord("-")), end]
                    continue
                if end.code < item.code:
                    raise PatternError("a range in a character class is out of order")
                item = _Item(None, *(f"{item.narrow}-{end.narrow}",) * 2)
            members.append(item)
        self._at += 1
        if not members:
            raise PatternError("a character class is empty")
        return members, negated

    def _item(self, *, in_class: bool = False) -> _Item:
        """A character or shorthand class."""
        char = self._text[self._at]
        self._at += 1
        if char == "{" and self._text.startswith(",", self._at) and not in_class:
            raise PatternError("{,n} is a text in JavaScript and a repetition in Python: write {0,n}")
        if char != "\\":
            return _char(ord(char))
        escape = self._text[self._at : self._at + 1]
        if code := _CODE.match(self._text, self._at):
            self._at = code.end()
            value = int(next(filter(None, code.groups()[:3])), 16) if not code[4] else ord(code[4]) % 32
            low = re.compile(r"\\u([dD][c-fC-F][0-9A-Fa-f]{2})").match(self._text, self._at)
            if low and 0xD800 <= value < 0xDC00:
                self._at = low.end()
                value = 0x10000 + ((value - 0xD800) << 10) + int(low[1], 16) - 0xDC00
            return _char(value)
        if found := _PROPERTY.match(self._text, self._at):
            self._at = found.end()
            return _Item(None, "\\" + found[0], "\\" + found[0])
        self._at += 1
        if escape.lower() in _NARROW:
            return _shorthand(escape)
        if in_class and escape == "b":
            return _char(8)
        if escape in _CONTROL and not (escape == "0" and self._text[self._at : self._at + 1].isdigit()):
            return _char(_CONTROL[escape])
        if not escape or escape.isalnum():
            raise PatternError(f"{chr(92) + escape!r} is not supported")
        return _char(ord(escape))


def _shorthand(letter: str) -> _Item:
    narrow, wide = _NARROW[letter.lower()], _WIDE[letter.lower()]
    if letter.islower():
        return _Item(None, narrow, wide)
    return _Item(None, f"[^{wide}]", f"[^{narrow}]")


def _inside(members: list[_Item], negated: bool, *, wide: bool) -> str:
    """A class as a member of another one."""
    return f"[{'^' if negated else ''}{''.join(item.wide if wide != negated else item.narrow for item in members)}]"
