"""Progress of downloads in words. Knows what a progress bar is asked to do, and nothing of what is downloaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

SAY_EVERY_SECONDS = 5.0

_ANEW = 4  # times that a file may arrive before it is given up: some servers break off for ever, and some never end


def in_words(size: int) -> str:
    """A size in bytes as people read it: 812 bytes, 3 kB, 98 MB, 4.9 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}" if unit == "GB" else f"{size / factor:,.0f} {unit}"
    return f"{size} bytes"


def downloads_told(say: Callable[[str], None], name: str = "", size: int | None = None) -> type[Any]:
    """A class to stand for tqdm's bar where huggingface_hub wants one; it draws nothing.

    Args:
        say: is told every few seconds how much has arrived.
        name: what arrives.
        size: its bytes; where several times as many arrive, OSError ends the download.
    """

    class Told:
        """The bar of one file. Of tqdm's interface, what the package uses."""

        def __init__(self, *_: Any, total: float | None = None, initial: float = 0, **__: Any) -> None:
            self.total = total
            self.n = initial
            self._received = 0
            self._said = time.monotonic()

        def update(self, count: float | None = 1) -> None:
            count = int(count or 0)
            self.n += count
            self._received += max(count, 0)
            if size is not None and self._received > _ANEW * (size + 1024):
                raise OSError(f"{name} does not come to its end")
            now = time.monotonic()
            if size and now - self._said >= SAY_EVERY_SECONDS:
                self._said = now
                say(f"downloading {name}: {in_words(int(self.n))} of {in_words(size)}")

        def __enter__(self) -> Told:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def _nothing(self, *_: Any, **__: Any) -> None:
            pass

        format_dict: Mapping[str, Any] = MappingProxyType({})
        close = refresh = reset = clear = _nothing
        update_transfer = set_transfer_postfix_str = _nothing  # what the network brings is not told apart
        set_description = set_description_str = set_postfix = set_postfix_str = _nothing

    return Told
