"""`read_yaml`: reads a small YAML file of settings as plain data, safely.

PyYAML parses the text into events, from which dicts, lists, strings, numbers, booleans and None are built, never other
objects. Anchors and aliases, tags, merge keys, duplicate keys and multiple documents are rejected, so that a small
file cannot expand to a large value and every key has one meaning. Numbers follow YAML 1.2 (`1e-5` is a number, `1:30`
is not).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from llm_edge.runtime.errors import CheckpointError, LlmEdgeError
from llm_edge.runtime.safe_io import read_text

_MAX_BYTES = 65_536
_MAX_EVENTS = 20_000
_MAX_DEPTH = 20
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


def read_yaml(path: Path, *, error: type[LlmEdgeError] = CheckpointError) -> dict[str, Any]:
    """Read the mapping in a file of at most 64 KiB.

    A file that is not YAML, or contains more than plain settings, raises `error`.
    """
    text = read_text(path, _MAX_BYTES, error=error)
    _check_nesting(text, path, error)
    try:
        value = _Events(yaml.parse(text, Loader=yaml.SafeLoader), path, error).document()
    except yaml.MarkedYAMLError as e:
        line = f" (line {e.problem_mark.line + 1})" if e.problem_mark else ""
        raise error(f"{path}: not YAML: {e.problem}{line}") from e
    except yaml.YAMLError as e:  # an invalid character
        raise error(f"{path}: not YAML: {' '.join(str(e).split())[:200]}") from e
    if not isinstance(value, dict):
        raise error(f"{path}: no settings: a mapping of names to values is required")
    return value


def _check_nesting(text: str, path: Path, error: type[LlmEdgeError]) -> None:
    """Reject deeply nested brackets before parsing, since PyYAML takes quadratic time on them."""
    depth = 0
    for bracket in _BRACKETS.finditer(text):
        depth = depth + 1 if bracket[0] in "[{" else max(depth - 1, 0)
        if depth > 2 * _MAX_DEPTH:  # twice, because brackets in strings and comments count too
            raise error(f"{path}: is nested deeper than {_MAX_DEPTH} levels")


class _Events:
    """Builds values from PyYAML's events."""

    def __init__(self, events: Iterator[Any], path: Path, error: type[LlmEdgeError]) -> None:
        self._events = events
        self._path = path
        self._error = error
        self._count = 0

    def document(self) -> Any:
        """Return the value of the only document, or None for an empty file."""
        value = None
        for documents, event in enumerate(self._events_of(yaml.DocumentStartEvent)):
            if documents:
                self._fail(event, "contains a second document")
            value = self._value(self._next(), 0)
        return value

    def _events_of(self, kind: type) -> Iterator[Any]:
        while not isinstance(event := self._next(), yaml.StreamEndEvent):
            if isinstance(event, kind):
                yield event

    def _next(self) -> Any:
        event = next(self._events)
        self._count += 1
        if self._count > _MAX_EVENTS:
            self._fail(event, f"contains more than {_MAX_EVENTS:,} entries")
        if getattr(event, "anchor", None) is not None:
            self._fail(event, "contains an anchor or alias (& or *): write the value out")
        if getattr(event, "tag", None) is not None:
            self._fail(event, f"contains the tag {event.tag[:80]!a}: give the plain value")
        return event

    def _value(self, event: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            self._fail(event, f"is nested deeper than {_MAX_DEPTH} levels")
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
                self._fail(event, "has a list or mapping as a key")
            if event.value == "<<" and event.style is None:
                self._fail(event, "contains a merge key (<<): write the values out")
            if event.value in mapping:
                self._fail(event, f"has a duplicate key {event.value[:80]!a}")
            mapping[event.value] = self._value(self._next(), depth + 1)
        return mapping

    def _fail(self, event: Any, reason: str) -> NoReturn:
        raise self._error(f"{self._path}: {reason} (line {event.start_mark.line + 1})")


def _plain(text: str) -> Any:
    """Return the value of an unquoted scalar."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    return float(text.replace("_", "")) if _FLOAT.fullmatch(text) else text
