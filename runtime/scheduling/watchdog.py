"""`Watchdog`: a timeout for steps that cannot be interrupted from their own thread."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llm_edge.runtime.errors import ParameterError


class Watchdog:
    """Calls `terminate`, from another thread, if a step exceeds the timeout, and `resume` after every step.

    Raises:
        ParameterError: `seconds` is not a positive finite number; None = no timeout.
    """

    def __init__(self, seconds: float | None, terminate: Callable[[], None], resume: Callable[[], None]) -> None:
        if seconds is not None and not 0 < seconds < math.inf:
            raise ParameterError(f"step_seconds is {seconds!r}; use a number above 0, or None")
        self._terminate, self._resume = terminate, resume
        self._began: float | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if seconds is not None:
            threading.Thread(target=self._watch, args=(seconds,), name="llm-edge-watchdog", daemon=True).start()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Apply the timeout to the body of the `with` statement."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:  # so that the next step is not terminated for this one
                self._began = None
                self._resume()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self, limit: float) -> None:
        while not self._closed.wait(min(limit / 4, 1.0)):
            with self._lock:
                if self._began is not None and time.monotonic() - self._began > limit:
                    self._terminate()
