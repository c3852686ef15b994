"""Ends what takes too long, from a thread of its own. Knows not what it is."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llm_edge.runtime.errors import ParameterError


class Watchdog:
    """Watches one piece of work after another.

    Args:
        seconds: what a piece may take; None for any time.
        end: called where one takes longer, and
        resume: called behind that piece, before the next one.

    Raises:
        ParameterError: `seconds` is no time.
    """

    def __init__(self, seconds: float | None, end: Callable[[], None], resume: Callable[[], None]) -> None:
        if seconds is not None and not 0 < seconds < math.inf:
            raise ParameterError(f"step_seconds is {seconds!r}; numbers above 0, or None, are possible")
        self._end, self._resume = end, resume
        self._began: float | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if seconds is not None:
            threading.Thread(target=self._watch, args=(seconds,), name="llm-edge-watchdog", daemon=True).start()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A piece of work."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:  # the next one is not ended for this one's time
                self._began = None
                self._resume()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self, most: float) -> None:
        while not self._closed.wait(min(most / 4, 1.0)):
            with self._lock:
                if self._began is not None and time.monotonic() - self._began > most:
                    self._end()
