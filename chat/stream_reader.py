"""An answer that comes from a thread of its own, for a screen that looks when it has time. Knows no widgets."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from llm_edge.chat.responder import Reply
from llm_edge.runtime.errors import LlmEdgeError, MachineError
from llm_edge.runtime.results import GenerationChunk
from llm_edge.runtime.sampling.params import SamplingParams


class StreamReader:
    """Reads a reply to its end.

    Args:
        begin: gives the reply; called on the thread, for a prompt may take its time.
    """

    def __init__(self, begin: Callable[[], Reply]) -> None:
        self._news: deque[GenerationChunk | LlmEdgeError] = deque()
        self._reply: Reply | None = None
        self._params: SamplingParams | None = None
        self._cancelled = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(begin,), name="llm-chat-answer", daemon=True)
        self._thread.start()

    def drain(self) -> list[GenerationChunk | LlmEdgeError]:
        """What has come since the last call; an error, or a piece with a finish reason, is the last there is."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def cancel(self) -> None:
        """End the reply."""
        with self._lock:
            self._cancelled = True
            if self._reply is not None:
                self._reply.cancel()

    def adjust(self, params: SamplingParams) -> None:
        """Parameters for the tokens to come."""
        with self._lock:
            self._params = params
            if self._reply is not None:
                self._reply.adjust(params)

    def join(self) -> None:
        """Wait for the thread."""
        self._thread.join()

    def _run(self, begin: Callable[[], Reply]) -> None:
        try:
            reply = begin()
            with self._lock:
                self._reply = reply
                if self._params is not None:
                    reply.adjust(self._params)
                if self._cancelled:
                    reply.cancel()
            self._news.extend(reply)
        except LlmEdgeError as error:
            self._news.append(error)
        except Exception as error:  # noqa: BLE001 (whatever it is, the chat goes on and says so)
            self._news.append(MachineError(f"the answer failed unexpectedly ({type(error).__name__}: {error})"))
