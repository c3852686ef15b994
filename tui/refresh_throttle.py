"""How often the screen polls a growing answer, so that drawing leaves most of the time to generation."""

from __future__ import annotations

import time
from typing import Final

SHORTEST_INTERVAL: Final = 1 / 20  # seconds
_LONGEST_INTERVAL = 1 / 4
_MAX_SHARE = 0.03  # of the time may be spent polling and drawing


class RefreshThrottle:
    """Adapts the interval between polls to the CPU time that the UI thread spends on each."""

    def __init__(self) -> None:
        self._next = 0.0
        self._spent = time.thread_time()

    @property
    def due(self) -> bool:
        """Whether it is time to poll."""
        return time.perf_counter() >= self._next

    def polled(self) -> None:
        """Schedule the next poll, later the more CPU time this thread has used since the last one."""
        spent = time.thread_time()
        cost, self._spent = spent - self._spent, spent
        self._next = time.perf_counter() + min(max(cost / _MAX_SHARE, SHORTEST_INTERVAL), _LONGEST_INTERVAL)
