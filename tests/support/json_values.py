"""Copies of a JSON value in which one value, wherever it is, is replaced by one of another type."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = ({}, [], [[]], {"a": 1}, "text", 5, -1, 1.5, 10**30, True, None)


def with_value(content: Any, value: Any) -> Iterator[Any]:
    """Copies of `content`, in each of which `value` stands in another place."""
    yield value
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inner in items:
        for replaced in with_value(inner, value):
            changed = copy.copy(content)
            changed[key] = replaced
            yield changed
