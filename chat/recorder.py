"""A chat line by line among the kept conversations, as it goes. Knows no terminal and no model.

A store that fails does not end the chat: from then on nothing is kept, and that is told.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

from llm_edge.chat.figures import figures_of
from llm_edge.chat.history.conversation import ASSISTANT, USER, Message, title_of
from llm_edge.chat.history.store import KEEP_EVERY, Store
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.results import FinishReason, GenerationChunk, Timings
from llm_edge.runtime.sampling.params import SamplingParams


class ConversationRecorder:
    """See the module.

    Args:
        store: where conversations are kept.
        name: of the model, and
        detail: its precision.
        defaults: the model's own parameters; what differs from them is kept.
        system: system prompt; "" = the template's own.
        note: hears where a conversation is kept, and that it cannot be.

    Attributes:
        error: why nothing is kept any more.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        detail: str,
        defaults: SamplingParams,
        system: str,
        note: Callable[[str], None],
    ) -> None:
        self._store = store
        self._name, self._detail = name, detail
        self._defaults, self._system = defaults, system
        self._note = note
        self._before: int | None = None
        self._answer: Message | None = None
        self._since = 0.0
        self.error: LlmEdgeError | None = None
        self.begin()

    def begin(self) -> None:
        """A new conversation."""
        self._conversation = self._store.new(system=self._system)
        self._told = False

    def asked(self, text: str, params: SamplingParams, about: str) -> None:
        """A question, whose answer begins; `about` is what the conversation is named by, if it is its first."""
        self._before = self._conversation.leaf
        self._since = time.monotonic()
        self._conversation.title = self._conversation.title or title_of(about)
        self._try(lambda: self._add(text, params))

    def take(self, piece: GenerationChunk) -> None:
        """A piece of the answer."""
        if self._answer is None:
            return
        if piece.reasoning:
            self._answer.reasoning += piece.text
        else:
            self._answer.content += piece.text
        if time.monotonic() - self._since >= KEEP_EVERY:
            self._since = time.monotonic()
            self._update(self._answer)

    def ended(self, reason: FinishReason, timings: Timings | None, *, joins: bool) -> None:
        """The answer ended, or was interrupted where there are no timings.

        `joins`: it belongs to the conversation; otherwise the next question follows the one before it.
        """
        answer, self._answer = self._answer, None
        if answer is None:
            return
        if timings is not None:
            answer.finished, answer.figures = True, figures_of(timings, reason, self._detail)
        self._update(answer)
        if not joins:
            self._try(lambda: self._store.set_leaf(self._conversation, self._before))
        if self.error is None and not self._told:
            self._told = True
            self._note(f"(saved in {self._store.path})")

    def _add(self, text: str, params: SamplingParams) -> None:
        self._store.add(self._conversation, USER, text)
        changed = _changed(params, self._defaults)
        self._answer = self._store.add(self._conversation, ASSISTANT, model=self._name, params=changed)

    def _update(self, answer: Message) -> None:
        self._try(lambda: self._store.update(answer))

    def _try(self, change: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            change()
        except LlmEdgeError as error:
            self.error, self._answer = error, None
            self._note(f"error: {error} (nothing is saved from here on)")


def _changed(params: SamplingParams, defaults: SamplingParams) -> dict[str, Any]:
    """What differs from the defaults, as JSON values."""
    changed = {}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value != getattr(defaults, field.name):
            changed[field.name] = json.loads(json.dumps(value, default=str))
    return changed
