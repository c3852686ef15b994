"""`Comparison`: two answers to one question, side by side, each with its own model and parameters.

Nothing is stored unless an answer is added to a conversation with `ChatSession.add_answer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llm_edge.chat.history.conversation import Conversation, Message
from llm_edge.chat.history.store import InMemoryStore
from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.responder import Responder
from llm_edge.chat.running_answer import Update
from llm_edge.chat.session import ChatSession


class ComparisonSide:
    """One side of a comparison."""

    def __init__(self, responder: Responder, parameters: ChatParameters) -> None:
        self.session = ChatSession(InMemoryStore(), parameters)
        self.session.set_responder(responder)
        self.answer: Message | None = None
        self.waiting = False  # for the other side to answer first

    @property
    def responder(self) -> Responder:
        """The model that answers."""
        responder = self.session.responder
        assert responder is not None
        return responder

    @property
    def busy(self) -> bool:
        """Whether an answer is being generated or still to be started."""
        return self.waiting or self.session.answering is not None

    def ask(self, history: Sequence[Message], text: str) -> Message:
        """Ask a question after a conversation, which is not modified."""
        system = self.session.parameters.system
        messages = {each.id: dataclasses.replace(each) for each in history}
        self.session.conversation = Conversation(system=system, messages=messages, leaf=max(messages, default=None))
        self.answer = self.session.ask(text)
        return self.answer


class Comparison:
    """Asks two sides the same question after a conversation.

    Attributes:
        in_turn: start the second answer after the first one, so that they do not compete for the machine; always so
            if one responder is on both sides, since it answers one question at a time.
    """

    def __init__(self, first: ComparisonSide, second: ComparisonSide, history: Sequence[Message]) -> None:
        self.sides = [first, second]
        self.in_turn = False
        self._history = list(history)
        self._text = ""

    @property
    def busy(self) -> bool:
        """Whether an answer is being generated or still to be started."""
        return any(side.busy for side in self.sides)

    def ask(self, text: str) -> None:
        """Ask both sides; replaces their previous answers."""
        self.close()
        self._text = text
        first, second = self.sides
        second.answer = None
        first.ask(self._history, text)
        if self.in_turn or first.responder is second.responder:
            second.waiting = True
        else:
            second.ask(self._history, text)

    def poll(self) -> list[Update | None]:
        """Poll both sides."""
        updates = [side.session.poll() for side in self.sides]
        first, second = self.sides
        if second.waiting and not first.busy:
            second.waiting = False
            second.ask(self._history, self._text)
        return updates

    def stop(self) -> None:
        """Stop both answers."""
        self.sides[1].waiting = False
        for side in self.sides:
            side.session.stop()

    def replace(self, responder: Responder) -> Responder:
        """Use another model on the second side; returns the previous one."""
        previous = self.sides[1].responder
        self.close()
        before = self.sides[1].session.parameters
        if responder.settings_key == previous.settings_key:
            changed = before.changed
        else:  # another model has its own parameters
            changed = {"system": before.system} if before.system else {}
        self.sides[1] = ComparisonSide(responder, ChatParameters(responder.default_params, changed))
        return previous

    def close(self) -> None:
        """Stop both answers and wait for their end."""
        self.stop()
        for side in self.sides:
            side.session.close()
