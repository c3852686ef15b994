"""`Background`: a call that runs on its own thread while the caller does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """A call on its own thread, started at once.

    As a context manager it waits for the call at the end of the block and raises its error, also in place of an
    Exception of the block.
    """

    def __init__(self, call: Callable[[], T], name: str) -> None:
        self._call = call
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def result(self) -> T:
        """Wait for the call; returns its result or raises its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def __enter__(self) -> Background[T]:
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.join()
        if self._error is not None and (error is None or isinstance(error, Exception)):
            raise self._error from None

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:  # noqa: BLE001 (raised where the result is collected)
            self._error = error
