"""`StreamReader`: reads a slow stream on a thread, for a consumer that polls, waits with a timeout, or cancels."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from llm_edge.runtime.errors import LlmEdgeError, MachineError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Source(Protocol[T_co]):
    """A stream that can be cancelled."""

    def __iter__(self) -> Iterator[T_co]:
        """Yield the items; called once, on the reader's thread."""

    def cancel(self) -> None:
        """End the iteration soon; may be called from any thread."""


class StreamReader(Generic[T]):
    """Reads a stream to its end on a thread.

    Args:
        source: the stream.
        max_queued: number of items read ahead at which the thread waits; 0 = no limit.
    """

    def __init__(self, source: Source[T], max_queued: int = 0) -> None:
        self.cancelled = False
        self._source = source
        self._max_queued = max_queued
        self._items: deque[T | LlmEdgeError] = deque()
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="llm-chat-reader", daemon=True)
        self._thread.start()

    def drain(self) -> list[T | LlmEdgeError]:
        """Return the items since the last call; an error is the last item."""
        with self._changed:
            items = list(self._items)
            self._items.clear()
            self._changed.notify_all()
            return items

    def wait(self, seconds: float) -> bool:
        """Wait until there is an item or the stream has ended; returns False at the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._items) or self._ended, seconds)

    def next(self, seconds: float) -> T | None:
        """Return the next item; None at the end or once cancelled.

        Raises:
            LlmEdgeError: the stream failed.
            TimeoutError: there was no item for so many seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._ended or self.cancelled, seconds):
                raise TimeoutError
            if self.cancelled or not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
        if isinstance(item, LlmEdgeError):
            raise item
        return item

    def cancel(self) -> None:
        """Cancel the stream; what it still yields can be drained."""
        with self._changed:
            self.cancelled = True
            self._changed.notify_all()
        self._source.cancel()

    def join(self) -> None:
        """Wait for the end of the stream."""
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._source:
                self._put(item)
        except LlmEdgeError as error:
            self._put(error)
        except Exception as error:  # noqa: BLE001 (any failure is reported to the consumer)
            self._put(MachineError(f"the answer failed unexpectedly ({type(error).__name__}: {error})"))
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, item: T | LlmEdgeError) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: not self._max_queued or len(self._items) < self._max_queued or self.cancelled
            )
            self._items.append(item)
            self._changed.notify_all()
