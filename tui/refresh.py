"""How often a screen looks at an answer that grows, so that drawing it leaves the time to making it."""

from __future__ import annotations

import time
from typing import Final

FASTEST: Final = 1 / 20  # seconds between two looks
_SLOWEST = 1 / 4
_SHARE = 0.03  # of the time may go into looking and drawing


class RefreshThrottle:
    """The looks at one answer, on the thread that makes this and draws."""

    def __init__(self) -> None:
        self._next = 0.0
        self._spent = time.thread_time()

    @property
    def due(self) -> bool:
        """Whether it is time to look."""
        return time.perf_counter() >= self._next

    def look(self) -> None:
        """One looks now: the next time the sooner, the less this thread has done since the look before."""
        spent = time.thread_time()
        cost, self._spent = spent - self._spent, spent
        self._next = time.perf_counter() + min(max(cost / _SHARE, FASTEST), _SLOWEST)
