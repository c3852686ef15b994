"""Two answers to one question, side by side: each from somebody, with parameters of its own. Knows no widgets.

Nothing of it is kept, unless somebody takes an answer over with `ChatSession.adopt`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llm_edge.chat.history.conversation import Conversation, Message
from llm_edge.chat.history.store import LEAF, Store
from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.responder import Responder
from llm_edge.chat.session import ChatSession, Update


class InMemoryStore(Store):
    """A store that keeps nothing."""

    def __init__(self) -> None:
        self._last = 0

    def close(self) -> None:
        """Nothing is open."""

    def add(
        self,
        conversation: Conversation,
        role: str,
        content: str = "",
        *,
        parent: int | None = LEAF,
        model: str = "",
        params: Mapping[str, Any] | None = None,
        finished: bool | None = None,
    ) -> Message:
        """See `Store`."""
        self._last = max(self._last, *conversation.messages, 0) + 1
        message = Message(
            id=self._last,
            parent=conversation.leaf if parent == LEAF else parent,
            role=role,
            content=content,
            created=time.time(),
            model=model,
            params=dict(params or {}),
            finished=role == "user" if finished is None else finished,
        )
        conversation.attach(message)
        conversation.leaf = message.id
        return message

    def update(self, message: Message) -> None:
        """See `Store`."""

    def add_records(self, message: int, data: bytes) -> None:
        """See `Store`."""

    def drop_records(self, message: int) -> None:
        """See `Store`."""

    def records(self, message: int) -> list[bytes]:  # noqa: ARG002
        """See `Store`."""
        return []

    def set_system(self, conversation: Conversation, system: str) -> None:
        """See `Store`."""
        conversation.system = system


class ComparisonSide:
    """One of the two.

    Args:
        responder: who answers.
        knobs: the parameters; they are this side's own from here on.

    Attributes:
        session: asks, is polled, and has the parameters.
        answer: what was asked last; None so far.
        waiting: whether this side answers once the other has.
    """

    def __init__(self, responder: Responder, knobs: ChatParameters) -> None:
        self.session = ChatSession(InMemoryStore(), knobs)
        self.session.use(responder)
        self.answer: Message | None = None
        self.waiting = False

    @property
    def responder(self) -> Responder:
        """Who answers."""
        responder = self.session.responder
        assert responder is not None
        return responder

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way, or still to begin."""
        return self.waiting or self.session.answering is not None

    def ask(self, history: Sequence[Message], text: str) -> Message:
        """Answer a question behind a conversation, which stays as it is."""
        system = self.session.knobs.system
        messages = {each.id: dataclasses.replace(each) for each in history}
        self.session.conversation = Conversation(system=system, messages=messages, leaf=max(messages, default=None))
        self.answer = self.session.ask(text)
        return self.answer


class Comparison:
    """See the module.

    Args:
        first, second: the sides.
        history: of the conversation so far, which both know.

    Attributes:
        sides: the two.
        in_turn: whether the second begins when the first has ended, so that they do not share the machine; where one
            responder is on both sides they take turns anyway, for it answers one at a time.
    """

    def __init__(self, first: ComparisonSide, second: ComparisonSide, history: Sequence[Message]) -> None:
        self.sides = [first, second]
        self.in_turn = False
        self._history = list(history)
        self._text = ""

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return any(side.busy for side in self.sides)

    def ask(self, text: str) -> None:
        """Ask both; what they said before is gone."""
        self.stop()
        self._leave()
        self._text = text
        first, second = self.sides
        second.answer = None
        first.ask(self._history, text)
        if self.in_turn or first.responder is second.responder:
            second.waiting = True
        else:
            second.ask(self._history, text)

    def poll(self) -> list[Update | None]:
        """What came on each side."""
        news = [side.session.poll() for side in self.sides]
        first, second = self.sides
        if second.waiting and not first.busy:
            second.waiting = False
            second.ask(self._history, self._text)
        return news

    def stop(self) -> None:
        """End both."""
        self.sides[1].waiting = False
        for side in self.sides:
            side.session.stop()

    def replace(self, responder: Responder) -> Responder:
        """Let somebody else answer on the second side; returns who did before."""
        before = self.sides[1].responder
        self.stop()
        self._leave()
        self.sides[1] = ComparisonSide(responder, self.sides[1].session.knobs)
        return before

    def close(self) -> None:
        """End both and wait for that; may take a moment."""
        self.stop()
        self._leave()

    def _leave(self) -> None:
        for side in self.sides:
            side.session.close()
