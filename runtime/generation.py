"""`Generation` and `AsyncGeneration`: a caller's handle on a running generation."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from llm_edge.runtime.errors import LlmEdgeError, ParameterError
from llm_edge.runtime.process import ProcessBound
from llm_edge.runtime.results import GenerationChunk, GenerationResult, collect

if TYPE_CHECKING:
    import asyncio  # takes 15 ms, and only tasks need it

    from llm_edge.runtime.sampling.params import SamplingParams

_ONE_READER = "this generation is being read by another thread or task: read it in one place only"


class Generation(ProcessBound):
    """A generation of a `Model`: iterate it for `GenerationChunk`s, or ask for the `result`.

    It has one reader at a time; for a second one, ParameterError is raised.

    Attributes:
        adjust: changes the sampling parameters from the next step on, except the constraint. Thread-safe.
    """

    def __init__(
        self,
        chunks: Iterator[GenerationChunk],
        cancelled: threading.Event,
        adjust: Callable[[SamplingParams], None] = lambda _: None,
        on_cancel: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        self._chunks = chunks
        self._cancelled = cancelled
        self._on_cancel = on_cancel
        self._reading = threading.Lock()
        self.adjust = adjust

    def __iter__(self) -> Iterator[GenerationChunk]:
        return self

    def __next__(self) -> GenerationChunk:
        self.check_process()
        if not self._reading.acquire(blocking=False):
            raise ParameterError(_ONE_READER)
        try:
            return next(self._chunks)
        finally:
            self._reading.release()

    def cancel(self) -> None:
        """End it with `FinishReason.CANCELLED`; a running step is terminated. Thread-safe."""
        self._cancelled.set()
        self._on_cancel()

    def result(self) -> GenerationResult:
        """Run to the end and return everything from here on."""
        return collect(self)


class AsyncGeneration(ProcessBound):
    """A generation of an `Engine`, for one reader: a thread that iterates it, or a task with `async for`.

    It progresses whether it is read or not. Leaving `with generation:` cancels it if it is unfinished, and so does
    cancelling a task that waits for it. A second thread or task that reads it gets ParameterError.

    Attributes:
        cancelled: its end was requested.
        adjust: changes the sampling parameters from the next step on, except the constraint. Thread-safe.
    """

    def __init__(self, adjust: Callable[[SamplingParams], None] = lambda _: None) -> None:
        super().__init__()
        self.cancelled = False
        self.adjust = adjust
        self._items: deque[GenerationChunk | LlmEdgeError] = deque()
        self._lock = threading.Lock()
        self._wake: Callable[[], object] | None = None
        self._reader: weakref.ref[_Reader] | None = None  # None, or a dead reference: nobody reads
        self._exhausted = False

    def cancel(self) -> None:
        """End it with `FinishReason.CANCELLED` within one step, which is terminated after a second. Thread-safe."""
        self.cancelled = True

    def put(self, item: GenerationChunk | LlmEdgeError) -> None:
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
        return _Reader(self)

    def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        return _Reader(self)

    def __enter__(self) -> AsyncGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._exhausted:
            self.cancel()

    def _next(
        self, reader: _Reader, wake: Callable[[], object], task: asyncio.Task[Any] | None = None
    ) -> GenerationChunk | None:
        """The next chunk; if there is none yet, `wake` is called once there is.

        Raises:
            StopIteration: there are no more.
            LlmEdgeError: the generation failed, or another reader is reading it.
        """
        self.check_process()
        with self._lock:
            if self._exhausted:
                raise StopIteration
            self._claim(reader, (threading.get_ident(), task))
            if not self._items:
                self._wake = wake
                return None
            item = self._items.popleft()
            self._exhausted = isinstance(item, LlmEdgeError) or item.finish_reason is not None
        if isinstance(item, LlmEdgeError):
            raise item
        return item

    def _claim(self, reader: _Reader, place: tuple[int, asyncio.Task[Any] | None]) -> None:
        """Make this the reader, unless another one waits, or belongs to another thread or task."""
        current = self._reader() if self._reader is not None else None
        if current is not None:
            abandoned = current.task is not None and current.task.done()
            elsewhere = current is not reader and current.place != place
            if not abandoned and (self._wake is not None or elsewhere):
                raise ParameterError(_ONE_READER)
        reader.place = place
        self._reader = weakref.ref(reader)

    def _stop_waiting(self, wake: Callable[[], object]) -> None:
        with self._lock:
            if self._wake is wake:
                self._wake = None


class _Reader:
    """An iteration over a generation; `place` is the thread and the task that advanced it last."""

    def __init__(self, generation: AsyncGeneration) -> None:
        self.place: tuple[int, asyncio.Task[Any] | None] = (0, None)
        self._generation = generation
        self._started = False

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The task that advanced it last; None = a thread did."""
        return self.place[1]

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> GenerationChunk:
        while True:
            ready = threading.Lock()  # cheaper than an Event; the engine releases it
            ready.acquire()
            chunk = self._generation._next(self, wake := ready.release)
            if chunk is not None:
                return chunk
            try:
                ready.acquire()
            finally:
                self._generation._stop_waiting(wake)  # after Ctrl-C

    def __aiter__(self) -> _Reader:
        return self

    async def __anext__(self) -> GenerationChunk:
        import asyncio

        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            if self._started:  # so that other tasks (one may cancel this) get a turn
                await asyncio.sleep(0)
            self._started = True
            while True:
                ready = asyncio.Event()
                wake = functools.partial(loop.call_soon_threadsafe, ready.set)
                try:
                    chunk = self._generation._next(self, wake, task)
                except StopIteration:
                    raise StopAsyncIteration from None
                if chunk is not None:
                    return chunk
                try:
                    await ready.wait()
                finally:
                    self._generation._stop_waiting(wake)
        except asyncio.CancelledError:
            self._generation.cancel()
            raise
