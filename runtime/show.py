"""Shows values out of a stranger's file in messages: short, printable, quick whatever they are."""

from __future__ import annotations

import reprlib

_LIMIT = 80

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _LIMIT


def show(value: object) -> str:
    """A value as one short line of ASCII."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    shown = ascii(value[:_LIMIT]) if isinstance(value, str | bytes) else ascii(_Shown(_repr.repr(value)))
    return shown if len(shown) <= _LIMIT + 20 else shown[:_LIMIT] + "..."


class _Shown:
    """A text that is a `repr` already."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text
