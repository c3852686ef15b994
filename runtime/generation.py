"""`Generation` and `AsyncGeneration`: a caller's handle on a running generation."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from llm_edge.runtime.results import GenerationChunk, GenerationResult, collect
from llm_edge.runtime.sampling.params import SamplingParams


class Generation:
    """A generation of a `Model`: iterate it for `GenerationChunk`s, or ask for the `result`.

    Attributes:
        adjust: changes the sampling parameters from the next step on, except the constraint. Thread-safe.
    """

    def __init__(
        self,
        chunks: Iterator[GenerationChunk],
        cancelled: threading.Event,
        adjust: Callable[[SamplingParams], None] = lambda _: None,
    ) -> None:
        self._chunks = chunks
        self._cancelled = cancelled
        self.adjust = adjust

    def __iter__(self) -> Iterator[GenerationChunk]:
        return self._chunks

    def cancel(self) -> None:
        """End it with `FinishReason.CANCELLED` within one step. Thread-safe."""
        self._cancelled.set()

    def result(self) -> GenerationResult:
        """Run to the end and return everything from here on."""
        return collect(self._chunks)


class AsyncGeneration:
    """A generation of an `Engine`, for one reader: a thread that iterates it, or a task with `async for`.

    It progresses whether it is read or not. Leaving `with generation:` cancels it if it is unfinished, and so does
    cancelling a task that waits for it.

    Attributes:
        cancelled: its end was requested.
        adjust: changes the sampling parameters from the next step on, except the constraint. Thread-safe.
    """

    def __init__(self, adjust: Callable[[SamplingParams], None] = lambda _: None) -> None:
        self.cancelled = False
        self.adjust = adjust
        self._items: deque[GenerationChunk | Exception] = deque()
        self._lock = threading.Lock()
        self._wake: Callable[[], object] | None = None
        self._exhausted = False

    def cancel(self) -> None:
        """End it with `FinishReason.CANCELLED` within one step. Thread-safe."""
        self.cancelled = True

    def put(self, item: GenerationChunk | Exception) -> None:
        """Append a chunk, or the error that ends the generation; called by the engine."""
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
        """`result` for a task."""
        return collect([chunk async for chunk in self])

    def __iter__(self) -> Iterator[GenerationChunk]:
        while not self._exhausted:
            ready = threading.Event()
            item = self._next(ready.set)
            if item is None:
                ready.wait()
            else:
                yield self._unwrap(item)

    async def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        loop = asyncio.get_running_loop()
        while not self._exhausted:
            ready = asyncio.Event()
            item = self._next(lambda ready=ready: loop.call_soon_threadsafe(ready.set))  # type: ignore[misc]
            if item is not None:
                yield self._unwrap(item)
            try:  # yields to the event loop after an item too, so that other tasks (one may cancel this) get a turn
                await (asyncio.sleep(0) if item is not None else ready.wait())
            except asyncio.CancelledError:
                self.cancel()
                raise

    def __enter__(self) -> AsyncGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._exhausted:
            self.cancel()

    def _next(self, wake: Callable[[], object]) -> GenerationChunk | Exception | None:
        """The next item; if there is none yet, `wake` is called once there is."""
        with self._lock:
            if self._items:
                return self._items.popleft()
            self._wake = wake
            return None

    def _unwrap(self, item: GenerationChunk | Exception) -> GenerationChunk:
        if isinstance(item, Exception):
            self._exhausted = True
            raise item
        self._exhausted = item.finish_reason is not None
        return item
