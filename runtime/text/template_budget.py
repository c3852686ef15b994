"""`Budget`: limits on the work and memory of an untrusted chat template."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llm_edge.runtime.errors import TemplateError
from llm_edge.runtime.safe_io import MIB

MAX_WEIGHT = 16 * MIB  # bytes of any single value
MAX_DEPTH = 100  # nesting of lists
MAX_PIECES = 300_000  # parts of a split string
BUDGET = 300_000_000  # per rendering, in estimated nanoseconds
DEADLINE_S = 2.0  # seconds of processor time, in case the estimates are far off
MAX_BITS = 4096  # of an integer
BYTE, STEP = 4, 600  # cost of handling a byte and of a loop iteration
ITEM = 16  # size of an element besides its content
FILTER_COSTS: Mapping[str, int] = {
    **dict.fromkeys(("abs", "attr", "d", "default", "float", "int", "round", "safe"), 0),
    **dict.fromkeys(("count", "first", "items", "last", "length"), 0),
    **dict.fromkeys(("capitalize", "e", "escape", "forceescape", "lower", "replace", "string", "trim", "upper"), 4),
    **dict.fromkeys(("center", "format", "indent", "truncate"), 8),
    **dict.fromkeys(("batch", "join", "list", "reverse", "slice"), 60),
    **dict.fromkeys(("tojson", "urlencode"), 60),
    **dict.fromkeys(("max", "min", "title", "unique"), 600),
    **dict.fromkeys(("reject", "select"), 1500),
    **dict.fromkeys(("dictsort", "groupby", "map", "rejectattr", "selectattr", "sort", "sum"), 3000),
}
"""Cost of each available filter per element of the filtered value (a character of a string), besides its size.

Others (pprint, urlize, striptags, wordwrap, xmlattr, ...) are slow on hostile input and not available.
"""
_WIDE = re.compile(r"\d{5}")  # a width or precision in a format
_CONTAINERS: tuple[Any, ...] = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))


def plain_data(value: Any, where: str, depth: int = 0) -> Any:
    """Rebuild JSON-like data from exact built-in types, so that templates can call no other methods."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if depth >= MAX_DEPTH:
        raise TemplateError(f"{where[:80]}: nested too deeply")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TemplateError(f"{where}: the key {key!r} is not a string")
        return {str(key): plain_data(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise TemplateError(f"{where}: {type(value).__name__} is not plain JSON data")


class LimitError(Exception):
    """A template exceeded a limit."""


class Budget:
    """The remaining budget of one rendering, and the sizes of the containers measured so far."""

    def __init__(self) -> None:
        self.left, self._next_look, self._deadline = BUDGET, BUDGET, time.thread_time() + DEADLINE_S
        self._known: dict[int, tuple[object, int, int]] = {}  # holds the object, so that its id is not reused

    def spend(self, cost: int) -> None:
        """Deduct a cost; raises LimitError when the budget is exhausted."""
        self.left -= cost
        if self.left < self._next_look:
            self._next_look = self.left - BUDGET // 100
            if self.left < 0 or time.thread_time() > self._deadline:
                raise LimitError("too much work")

    def fits(self, weight: int) -> None:
        """Raise LimitError for a value that would be too large, before it is built."""
        if weight > MAX_WEIGHT:
            raise LimitError(f"a value of more than {MAX_WEIGHT // MIB} MiB")

    def measure(self, value: Any) -> tuple[int, int]:
        """The size of a value, counting shared parts each time they occur, and its nesting depth."""
        if isinstance(value, str):
            return (len(value) if value.isascii() else 4 * len(value)), 0
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise LimitError("too large a number")
            return ITEM, 0
        if isinstance(value, range):
            return ITEM * len(value), 1
        if not isinstance(value, _CONTAINERS):
            return ITEM, 0
        if (known := self._known.get(id(value))) is None:
            weight = depth = 0
            self.spend(4 * BYTE * ITEM * (len(value) + 1))
            for child in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
                below = self.measure(child)
                weight, depth = weight + below[0] + ITEM, max(depth, below[1])
                self.fits(weight)
            if depth >= MAX_DEPTH:
                raise LimitError("lists nested too deeply")
            known = self._known[id(value)] = value, weight, depth + 1
        return known[1], known[2]

    def weight(self, value: object) -> int:
        """The size of a value; raises LimitError if it is too large."""
        weight = self.measure(value)[0]
        self.fits(weight)
        return weight

    def read(self, value: Any) -> Any:
        """Deduct the cost of reading a whole value."""
        self.spend(BYTE * self.weight(value))
        return value

    def made(self, value: Any) -> Any:
        """Deduct the cost of a new value: a whole string, or the elements of a list that are new."""
        weight = self.weight(value)
        if isinstance(value, str):
            self.spend(BYTE * weight)
        return value

    def each(self, values: Iterable[Any], cost: int = STEP) -> Iterator[Any]:
        """Deduct the cost of every iteration of a loop."""
        for value in values:
            self.spend(cost)
            yield value

    def text(self, value: object) -> str:
        """Return `str(value)`."""
        if not isinstance(value, str):
            self.read(value)
        return str(self.made(str(value)))

    def concat(self, parts: Iterable[str], between: str = "") -> str:
        """Return `between.join(parts)`."""
        taken, weight, gap = [], 0, self.measure(between)[0]
        for part in parts:
            weight += self.measure(part)[0] + gap
            self.fits(weight)
            taken.append(part)
        self.spend(BYTE * weight)
        return between.join(taken)

    def percent(self, pattern: str, values: Any) -> str:
        """Return `pattern % values`."""
        items = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else [values]
        star = "*" in pattern
        if _WIDE.search(pattern) or (star and any(isinstance(v, int) and abs(v) > 9999 for v in items)):
            raise LimitError("a string padded too far")
        width = 400 + (9999 if star else max(map(int, re.findall(r"\d+", pattern)), default=0))
        heaviest = max(map(self.weight, items), default=0)
        self.fits(len(pattern) + pattern.count("%") * (width if heaviest <= ITEM else width + 4 * heaviest))
        return str(self.made(pattern % values))

    def json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: Any = False,
    ) -> str:
        """Return `json.dumps(value, ...)`."""
        for pad in (indent, *(separators or ())):
            width = abs(pad) if isinstance(pad, int) else len(pad) if isinstance(pad, str) else 0
            self.fits(width * (self.weight(value) // ITEM + 1))
        make = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        # With an indent the text can be far larger than its value, so it is built part by part (slowly).
        return make.encode(value) if indent is None else self.concat(self.each(make.iterencode(value)))

    def format_field(self, value: Any, spec: str) -> str:
        """Return `format(value, spec)`."""
        if _WIDE.search(spec):
            raise LimitError("a string padded too far")
        return str(self.made(format(self.read(value), spec)))

    def operate(self, operator: str, run: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        """Return `left operator right`, computed by `run`."""
        if operator == "%" and isinstance(left, str):
            return self.percent(left, right)
        weights = self.weight(left), self.weight(right)
        if operator == "*":
            for a, b, weight in ((left, right, weights[0]), (right, left, weights[1])):
                if isinstance(a, str | list | tuple) and isinstance(b, int):
                    self.fits((weight if isinstance(a, str) else weight + ITEM) * b)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > MAX_BITS:
                raise LimitError("too large a number")
        elif operator == "+" and isinstance(left, str | list | tuple):
            self.fits(sum(weights))
        return self.made(run(left, right))

    def split(self, method: Callable[[str | None, int], list[str]], sep: str | None = None, maxsplit: int = -1) -> Any:
        """Return `method(sep, maxsplit)` for a string's split or rsplit."""
        bounded = maxsplit if 0 <= maxsplit <= MAX_PIECES else MAX_PIECES
        pieces = method(sep, bounded)
        if bounded != maxsplit and len(pieces) > MAX_PIECES:
            raise LimitError("a string split into too many pieces")
        return self.made(pieces)

    def allow(self, name: str, owner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise LimitError for a method or filter whose result or work would be unbounded, before it runs."""
        numbers = [
            abs(a) if isinstance(a, int) else len(a) for a in (*args, *kwargs.values()) if isinstance(a, int | str)
        ]
        largest = max(numbers, default=4)
        if name in ("center", "ljust", "rjust", "zfill"):
            self.fits(4 * largest)
        elif name == "indent":
            self.fits(4 * largest * (_lines(owner) if isinstance(owner, str) else 1))
        elif name == "replace":
            old, new = (kwargs.get(key, arg) for key, arg in zip(("old", "new"), (*args, "", ""), strict=False))
            owner, old = str(owner), str(old)
            times = owner.count(old) if old else len(owner) + 1
            self.fits(self.weight(owner) + times * 6 * self.weight(str(new)))  # 6: a character may be escaped
        elif name in ("escape", "e", "forceescape"):
            self.fits(6 * self.weight(owner))
        elif name in ("sort", "dictsort", "groupby", "unique"):
            self.spend(4 * BYTE * self.weight(owner))
        elif (name in ("batch", "slice") and largest > 100_000) or (name == "round" and largest > 300):
            raise LimitError(f"{name} with too large a number")
        elif (name == "int" and isinstance(owner, str) and len(owner) > 4300) or (
            name == "splitlines" and _lines(owner) > MAX_PIECES
        ):
            raise LimitError(f"{name} of too long a string")
        elif name in ("strip", "lstrip", "rstrip", "trim", "rfind", "rindex", "rsplit", "rpartition"):
            self.spend(len(owner) * largest if isinstance(owner, str) else 0)  # quadratic


def _lines(text: str) -> int:
    return 1 + sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))
