"""What a caller holds of an answer that is made elsewhere, by an engine's thread. Knows no model."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType

from llm_edge.runtime.results import (
    GenerationChunk,
    GenerationResult,
    collect,
)
from llm_edge.runtime.sampling.params import SamplingParams


class AsyncGeneration:
    """An answer on its way from an `Engine`, for one reader: a thread that iterates it, or a task (`async for`).

    It grows whether it is read or not. Leaving `with answer:` cancels what is not finished; so does the end of a task
    that waits for it.

    Args:
        adjust: takes other parameters.

    Attributes:
        cancelled: somebody asked for its end.
        adjust: gives parameters by which the tokens from the next step on are drawn; from any thread. The constraint
            stays what it was.
    """

    def __init__(self, adjust: Callable[[SamplingParams], None] = lambda _: None) -> None:
        self.cancelled = False
        self.adjust = adjust
        self._items: deque[GenerationChunk | Exception] = deque()
        self._lock = threading.Lock()
        self._wake: Callable[[], object] | None = None
        self._read = False  # to its end

    def cancel(self) -> None:
        """End it with `FinishReason.CANCELLED`, within one step; from any thread."""
        self.cancelled = True

    def put(self, item: GenerationChunk | Exception) -> None:
        """For the engine: one piece more, or what went wrong instead of the rest."""
        with self._lock:
            self._items.append(item)
            wake, self._wake = self._wake, None
        if wake is not None:
            try:
                wake()
            except RuntimeError:  # the reader's event loop is closed
                self.cancelled = True

    def result(self) -> GenerationResult:
        """Wait for the end and return everything from here on."""
        return collect(self)

    async def aresult(self) -> GenerationResult:
        """As `result`, for a task."""
        return collect([piece async for piece in self])

    def __iter__(self) -> Iterator[GenerationChunk]:
        while not self._read:
            ready = threading.Event()
            item = self._next(ready.set)
            if item is None:
                ready.wait()
            else:
                yield self._opened(item)

    async def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        loop = asyncio.get_running_loop()
        while not self._read:
            ready = asyncio.Event()
            item = self._next(lambda ready=ready: loop.call_soon_threadsafe(ready.set))  # type: ignore[misc]
            if item is not None:
                yield self._opened(item)
            try:  # also behind an item: others of the loop get their turn, whoever cancels this among them
                await (asyncio.sleep(0) if item is not None else ready.wait())
            except asyncio.CancelledError:
                self.cancel()
                raise

    def __enter__(self) -> AsyncGeneration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._read:
            self.cancel()

    def _next(self, wake: Callable[[], object]) -> GenerationChunk | Exception | None:
        """The next item; if there is none, `wake` is called once there is."""
        with self._lock:
            if self._items:
                return self._items.popleft()
            self._wake = wake
            return None

    def _opened(self, item: GenerationChunk | Exception) -> GenerationChunk:
        if isinstance(item, Exception):
            self._read = True
            raise item
        self._read = item.finish_reason is not None
        return item


class Generation:
    """An answer on its way: iterate it for `GenerationChunk`s, or ask for the `result`.

    `cancel` may be called from any thread; the generation ends within one step. So may `adjust`: it gives parameters
    by which the tokens from the next step on are drawn. The constraint stays what it was.
    """

    def __init__(
        self,
        pieces: Iterator[GenerationChunk],
        cancelled: threading.Event,
        adjust: Callable[[SamplingParams], None] = lambda _: None,
    ) -> None:
        self._pieces = pieces
        self._cancelled = cancelled
        self.adjust = adjust

    def __iter__(self) -> Iterator[GenerationChunk]:
        return self._pieces

    def cancel(self) -> None:
        """End it with `FinishReason.CANCELLED`."""
        self._cancelled.set()

    def result(self) -> GenerationResult:
        """Run to the end and return everything from here on."""
        return collect(self._pieces)
