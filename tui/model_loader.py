"""Loads models in the background while the current one keeps answering."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from textual.message import Message as Event
from textual.widget import Widget
from textual.worker import get_current_worker

from llm_edge.chat.choice import Choice, called, open_responder, remember
from llm_edge.chat.responder import Responder
from llm_edge.chat.session import ChatSession
from llm_edge.chat.settings import Settings
from llm_edge.runtime.errors import LlmEdgeError, MachineError
from llm_edge.tui.notifications import notify

_POLL_SECONDS = 0.05


class ModelLoader:
    """Loads one model at a time on a worker thread of a widget, and posts `Loaded` or `Failed` to the widget."""

    class Loaded(Event):
        """A model was loaded."""

        def __init__(self, responder: Responder) -> None:
            super().__init__()
            self.responder = responder

    class Failed(Event):
        """A model could not be loaded."""

        def __init__(self, error: LlmEdgeError) -> None:
            super().__init__()
            self.error = error

    def __init__(self, widget: Widget, session: ChatSession, settings: Settings) -> None:
        self.loading = False
        self._widget, self._session, self._settings = widget, session, settings

    def start(self, load: Callable[[], Responder]) -> None:
        """Call `load` on a worker thread; a load that is still running is abandoned."""
        self.loading = True
        self._widget.run_worker(functools.partial(self._load, load), thread=True, exclusive=True, group="load")

    def choose(self, choice: Choice) -> None:
        """Load a choice of the user's, and remember it."""
        current = self._session.responder
        meanwhile = f" {current.name} answers until it is ready." if current is not None else ""
        notify(self._widget, f"Loading {called(choice)} …{meanwhile}")
        self.start(self.opener(choice))

    def opener(self, choice: Choice) -> Callable[[], Responder]:
        """A function that opens a choice; for a worker thread. It returns once the session's answer has ended."""

        def open_choice() -> Responder:
            worker = get_current_worker()
            responder = open_responder(choice)
            while self._session.answering is not None and not worker.is_cancelled:
                time.sleep(_POLL_SECONDS)
            if not worker.is_cancelled:
                try:
                    remember(choice, self._settings)
                except MachineError as error:
                    self._widget.app.call_from_thread(notify, self._widget, str(error), "warning")
            return responder

        return open_choice

    def _load(self, load: Callable[[], Responder]) -> None:
        worker = get_current_worker()
        try:
            responder = load()
        except LlmEdgeError as error:
            if not worker.is_cancelled:
                self._widget.post_message(self.Failed(error))
            return
        if worker.is_cancelled:  # the user chose another model meanwhile
            responder.close()
        else:
            self._widget.post_message(self.Loaded(responder))
