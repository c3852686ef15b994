"""Terminates steps: at their time limit, when their result is no longer wanted, and on Ctrl-C.

One thread per process watches the running steps. It has to see signals itself: Python runs their handlers on the main
thread between two bytecodes, so not while that thread is inside onnxruntime.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

from llm_edge.runtime.errors import ParameterError

_POLL = 0.25  # seconds between checks while a step runs
_SIGNALS = {int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)}


class Reason(Enum):
    """Why a step was terminated."""

    TIMEOUT = "timeout"
    UNWANTED = "unwanted"
    SIGNAL = "signal"


class WatchedStep:
    """A context manager: the step in its body can be terminated through onnxruntime's run options.

    Args:
        options: the step's run options; no other step uses them at the same time.
        limit: time limit in seconds; None = none.
        unwanted: whether the step's result is no longer wanted; called on the watchdog's thread.
        patience: seconds for which an unwanted step may continue.

    Attributes:
        reason: why the step was terminated; None if it was not.
    """

    __slots__ = ("_fd_is_ours", "began", "limit", "on_main_thread", "options", "patience", "reason", "unwanted")

    def __init__(self, options: Any, limit: float | None, unwanted: Callable[[], bool], patience: float) -> None:
        self.options = options
        self.limit = limit
        self.unwanted = unwanted
        self.patience = patience
        self.reason: Reason | None = None
        self.began = time.monotonic()
        self.on_main_thread = threading.current_thread() is threading.main_thread()
        self._fd_is_ours = False

    def __enter__(self) -> WatchedStep:
        watchdog = _running_watchdog()
        watchdog.add(self)
        if self.on_main_thread:
            with contextlib.suppress(ValueError):  # not the main interpreter
                previous = signal.set_wakeup_fd(watchdog.signal_fd, warn_on_full_buffer=False)
                if previous in (-1, watchdog.signal_fd):
                    self._fd_is_ours = True
                else:  # an event loop's: it has to see the signals
                    signal.set_wakeup_fd(previous)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Stop watching; may be called again, after a signal's handler raised at the end of the `with` statement."""
        if self._fd_is_ours:
            signal.set_wakeup_fd(-1)
            self._fd_is_ours = False
        _running_watchdog().remove(self)


def check_running_steps() -> None:
    """Terminate steps that are no longer wanted now, rather than at the next check."""
    if _watchdog is not None:
        _watchdog.wake()


def check_step_seconds(seconds: float | None) -> None:
    """Raise ParameterError for an impossible time limit; None = no limit."""
    valid = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < math.inf
    if seconds is not None and not valid:
        raise ParameterError(f"step_seconds is {seconds!r}; use a number above 0, or None")


class _Watchdog:
    def __init__(self) -> None:
        self.process = os.getpid()
        self._receiver, self._sender = socket.socketpair()  # Windows accepts only a socket as the signals' descriptor
        self._sender.setblocking(False)
        self._steps: dict[int, WatchedStep] = {}  # by the address of their options
        self._idle = True
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="llm-edge-watchdog", daemon=True).start()

    @property
    def signal_fd(self) -> int:
        """Where Python writes the number of each signal that arrives."""
        return self._sender.fileno()

    def add(self, step: WatchedStep) -> None:
        with self._lock:
            step.options.terminate = False  # a signal may have prevented the removal of the step before
            self._steps[id(step.options)] = step
            idle, self._idle = self._idle, False
        if idle:
            self.wake()

    def remove(self, step: WatchedStep) -> None:
        with self._lock:
            self._steps.pop(id(step.options), None)

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # a full buffer wakes it too
            self._sender.send(b"\0")

    def _run(self) -> None:
        while True:
            self._receiver.settimeout(None if self._idle else _POLL)
            try:
                received = self._receiver.recv(4096)
            except TimeoutError:
                received = b""
            self._check(signalled=not _SIGNALS.isdisjoint(received))

    def _check(self, *, signalled: bool) -> None:
        with self._lock:  # so that a step that has just ended is not terminated, nor the one after it
            now = time.monotonic()
            for step in self._steps.values():
                if reason := _reason_to_terminate(step, now - step.began, signalled=signalled):
                    step.reason = step.reason or reason
                    step.options.terminate = True
            self._idle = not self._steps


def _reason_to_terminate(step: WatchedStep, seconds: float, *, signalled: bool) -> Reason | None:
    if signalled and step.on_main_thread:
        return Reason.SIGNAL
    if step.limit is not None and seconds > step.limit:
        return Reason.TIMEOUT
    return Reason.UNWANTED if seconds >= step.patience and step.unwanted() else None


_watchdog: _Watchdog | None = None
_starting = threading.Lock()


def _running_watchdog() -> _Watchdog:
    """This process's watchdog; its thread does not survive a fork."""
    global _watchdog
    found = _watchdog
    if found is not None and found.process == os.getpid():
        return found
    with _starting:
        if _watchdog is None or _watchdog.process != os.getpid():
            _watchdog = _Watchdog()
        return _watchdog
