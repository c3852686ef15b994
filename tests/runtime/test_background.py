"""Calls on their own thread: results, errors, and which error wins."""

from __future__ import annotations

import threading

import pytest

from llm_edge.runtime.background import Background


def fail() -> int:
    raise KeyError("background")


def test_the_result_is_that_of_the_call_on_another_thread() -> None:
    call = Background(threading.get_ident, "call")
    assert call.result() != threading.get_ident()
    assert call.result() == call.result()


def test_a_block_ends_after_its_call() -> None:
    started, released = threading.Event(), threading.Event()

    def wait() -> bool:
        started.set()
        return released.wait(60)

    with Background(wait, "call") as call:
        assert started.wait(60)
        released.set()
    assert call.result()


def test_the_error_of_the_call_is_raised() -> None:
    with pytest.raises(KeyError, match="background"):
        Background(fail, "call").result()
    with pytest.raises(KeyError, match="background"), Background(fail, "call"):
        pass


def test_the_error_of_the_call_replaces_an_error_of_the_block_but_no_interrupt() -> None:
    with pytest.raises(KeyError, match="background"), Background(fail, "call"):
        raise ValueError("block")
    with pytest.raises(KeyboardInterrupt), Background(fail, "call"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="block"), Background(threading.get_ident, "call"):
        raise ValueError("block")
