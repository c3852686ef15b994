"""Text messages about the progress of downloads, in place of huggingface_hub's progress bars."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

REPORT_SECONDS = 5.0

_MAX_ATTEMPTS = 4  # a file is given up after this many times its size: some servers restart or send data forever


def format_size(size: int) -> str:
    """Format a size: 812 bytes, 3 kB, 98 MB, 4.9 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}" if unit == "GB" else f"{size / factor:,.0f} {unit}"
    return f"{size} bytes"


def progress_class(report: Callable[[str], None], name: str = "", size: int | None = None) -> type[Any]:
    """Return a replacement for tqdm that reports text messages instead of drawing a bar.

    Args:
        report: called every few seconds with the downloaded and the total size.
        name: name of the file.
        size: size of the file in bytes; None reports nothing. Receiving several times as many bytes raises OSError.
    """

    class Progress:
        """The part of tqdm's interface that the package uses."""

        def __init__(self, *_: Any, total: float | None = None, initial: float = 0, **__: Any) -> None:
            self.total = total
            self.n = initial
            self._received = 0
            self._reported = time.monotonic()

        def update(self, count: float | None = 1) -> None:
            count = int(count or 0)
            self.n += count
            self._received += max(count, 0)
            if size is not None and self._received > _MAX_ATTEMPTS * (size + 1024):
                raise OSError(f"{name} is larger than stated, or its download keeps restarting")
            now = time.monotonic()
            if size and now - self._reported >= REPORT_SECONDS:
                self._reported = now
                report(f"downloading {name}: {format_size(int(self.n))} of {format_size(size)}")

        def __enter__(self) -> Progress:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def _nothing(self, *_: Any, **__: Any) -> None:
            pass

        format_dict: Mapping[str, Any] = MappingProxyType({})
        close = refresh = reset = clear = _nothing
        update_transfer = set_transfer_postfix_str = _nothing  # of a second bar for network traffic
        set_description = set_description_str = set_postfix = set_postfix_str = _nothing

    return Progress
