"""`Conversation`: a tree of messages, of which one path is shown."""

from __future__ import annotations

import re
from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_edge.chat.attachments import split_attachments
from llm_edge.chat.text import one_line

USER = "user"
ASSISTANT = "assistant"
ROLES = (USER, ASSISTANT)
TITLE_LENGTH = 60  # characters of a title taken from a question


@dataclass(slots=True)
class Message:
    """A question or an answer.

    Attributes:
        id: greater than 0 and than its parent's.
        parent: id of the message it follows; None = it is the first.
        role: "user" or "assistant".
        content: the text, as Markdown.
        reasoning: reasoning that precedes the answer; never sent back to the model.
        created: Unix time in seconds.
        model: name of the model that answered.
        params: parameters that differed from the model's defaults, as JSON values.
        figures: tokens, tokens_per_second, finish_reason and so on, as JSON values.
        finished: False while an answer is generated, and permanently if the program ended meanwhile.
    """

    id: int
    parent: int | None
    role: str
    content: str = ""
    reasoning: str = ""
    created: float = 0.0
    model: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    finished: bool = True


@dataclass
class Conversation:
    """Messages that branch where a question was edited or an answer regenerated.

    Attributes:
        id: 0 until it is stored.
        title: one line.
        pinned: whether it is listed before the others.
        created, updated: Unix time in seconds.
        system: system prompt; "" = the chat template's default.
        messages: all messages by id; `attach` adds one.
        leaf: last message of the path that is shown; None = nothing is shown.
    """

    id: int = 0
    title: str = ""
    pinned: bool = False
    created: float = 0.0
    updated: float = 0.0
    system: str = ""
    messages: dict[int, Message] = field(default_factory=dict)
    leaf: int | None = None
    _children: dict[int | None, list[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        messages, self.messages, self._children = self.messages, {}, {}
        for number in sorted(messages):
            self.attach(messages[number])

    def attach(self, message: Message) -> None:
        """Add a message; the path that is shown does not change.

        Raises:
            ValueError: the id is in use, the parent is missing or newer, or the role is unknown.
        """
        if message.id < 1 or message.id in self.messages:
            raise ValueError(f"message {message.id}: the id is less than 1 or already in use")
        if message.parent is not None and (message.parent not in self.messages or message.parent >= message.id):
            raise ValueError(f"message {message.id}: the parent {message.parent} is not an earlier message")
        if message.role not in ROLES:
            raise ValueError(f"message {message.id}: the role {message.role!r} is not one of {', '.join(ROLES)}")
        self.messages[message.id] = message
        insort(self._children.setdefault(message.parent, []), message.id)

    def path(self) -> list[Message]:
        """The messages that are shown, from the first to the leaf."""
        return self.path_to(self.leaf)

    def path_to(self, number: int | None) -> list[Message]:
        """The messages from the first one to this one."""
        path: list[Message] = []
        while number is not None:
            path.append(self.messages[number])
            number = path[-1].parent
        return path[::-1]

    def children(self, number: int | None) -> list[int]:
        """The messages that follow a message, the oldest first; None = the first messages."""
        return list(self._children.get(number, ()))

    def siblings(self, number: int) -> list[int]:
        """This message and the others that follow its parent, the oldest first."""
        return self.children(self.messages[number].parent)

    def select(self, number: int) -> None:
        """Show the branch with this message, down to the most recent message that follows it."""
        newest, waiting = number, [self.messages[number].id]
        while waiting:
            following = self._children.get(waiting.pop(), ())
            newest = max((newest, *following))
            waiting += following
        self.leaf = newest


def title_of(question: str) -> str:
    """A title for a question: its first line after attachments, shortened after a sentence or between words."""
    attachments, text = split_attachments(question)
    if attachments and not text.strip():
        return one_line(attachments[0].name, TITLE_LENGTH)
    for line in text[:20_000].splitlines():
        text = " ".join(line.lstrip("#>*- \t").split())
        if not text:
            continue
        if len(text) > TITLE_LENGTH:
            sentences = [end for end in _sentence_ends(text) if TITLE_LENGTH // 3 <= end <= TITLE_LENGTH]
            if sentences:
                return text[: sentences[-1]]
        return one_line(text, TITLE_LENGTH)
    return ""


def depth(value: Any) -> int:
    """Nesting depth of a JSON value; 0 for a scalar."""
    level, values = 0, [value]
    while values := [inner for outer in values for inner in _inside(outer)]:
        level += 1
    return level


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _sentence_ends(text: str) -> list[int]:
    return [match.end() for match in re.finditer("[.!?…](?= )|[\u3002\uff01\uff1f]", text[: TITLE_LENGTH + 2])]
