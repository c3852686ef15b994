"""Reads a small YAML file of settings as plain data. Knows no key; builds no objects, whatever tags a file names.

PyYAML cuts the text into events, and these become dicts, lists, texts, numbers, truth values and null. What lets a
small file become a large value, or one key mean two things, is refused: anchors and aliases, tags, merge keys,
repeated keys, several documents. Numbers are those of YAML 1.2 (`1e-5` is one, `1:30` is not).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import read_text

_MOST_BYTES = 65_536
_MOST_EVENTS = 20_000
_MOST_DEPTH = 20
_BRACKETS = re.compile(r"[\[\]{}]")
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]{0,999}")
_FLOAT = re.compile(r"[-+]?(\.[0-9][0-9_]{0,99}|[0-9][0-9_]{0,999}(\.[0-9_]{0,99})?)([eE][-+]?[0-9]{1,9})?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null"), None),
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
    ".nan": math.nan,
    **dict.fromkeys((".inf", "+.inf"), math.inf),
    "-.inf": -math.inf,
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file of at most 64 KiB.

    Raises:
        CheckpointError: not YAML, or more than plain settings.
    """
    text = read_text(path, _MOST_BYTES, error=CheckpointError)
    _refuse_nests(text, path)
    try:
        value = _Events(yaml.parse(text, Loader=yaml.SafeLoader), path).document()
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise CheckpointError(f"{path}: not YAML: {error.problem}{line}") from error
    except yaml.YAMLError as error:  # a character that no text has
        raise CheckpointError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: no settings in it: a mapping of names to values was expected")
    return value


def _refuse_nests(text: str, path: Path) -> None:
    """Refuse brackets in brackets before PyYAML sees them: for each of them it looks at all the others once more."""
    depth = 0
    for bracket in _BRACKETS.finditer(text):
        depth = depth + 1 if bracket[0] in "[{" else max(depth - 1, 0)
        if depth > 2 * _MOST_DEPTH:  # some may stand in texts and comments
            raise CheckpointError(f"{path}: is nested deeper than {_MOST_DEPTH} levels")


class _Events:
    """From PyYAML's events to values."""

    def __init__(self, events: Iterator[Any], path: Path) -> None:
        self._events = events
        self._path = path
        self._count = 0

    def document(self) -> Any:
        """The only document; None where there is none."""
        value = None
        for documents, event in enumerate(self._kinds(yaml.DocumentStartEvent)):
            if documents:
                self._fail(event, "holds a second document")
            value = self._value(self._next(), 0)
        return value

    def _kinds(self, kind: type) -> Iterator[Any]:
        while not isinstance(event := self._next(), yaml.StreamEndEvent):
            if isinstance(event, kind):
                yield event

    def _next(self) -> Any:
        event = next(self._events)
        self._count += 1
        if self._count > _MOST_EVENTS:
            self._fail(event, f"holds more than {_MOST_EVENTS:,} entries")
        if getattr(event, "anchor", None) is not None:
            self._fail(event, "holds an anchor or alias (& or *): write the value out")
        if getattr(event, "tag", None) is not None:
            self._fail(event, f"holds the tag {event.tag[:80]!a}: give the plain value")
        return event

    def _value(self, event: Any, depth: int) -> Any:
        if depth > _MOST_DEPTH:
            self._fail(event, f"is nested deeper than {_MOST_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent):
            return event.value if event.style is not None else _plain(event.value)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := self._next(), yaml.SequenceEndEvent):
                items.append(self._value(event, depth + 1))
            return items
        mapping: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self._fail(event, "has a list or mapping for a key")
            if event.value == "<<" and event.style is None:
                self._fail(event, "holds a merge key (<<): write the values out")
            if event.value in mapping:
                self._fail(event, f"has the key {event.value[:80]!a} twice")
            mapping[event.value] = self._value(self._next(), depth + 1)
        return mapping

    def _fail(self, event: Any, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {reason} (line {event.start_mark.line + 1})")


def _plain(text: str) -> Any:
    """What a text without quotes stands for."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    return float(text.replace("_", "")) if _FLOAT.fullmatch(text) else text
