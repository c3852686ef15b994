"""`InMemoryStore`: a store for conversations that are not saved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llm_edge.chat.history.conversation import Conversation, Message
from llm_edge.chat.history.store import LEAF, Store


class InMemoryStore(Store):
    """A `Store` without a file; a conversation exists only as the object that the caller has."""

    def __init__(self) -> None:
        self._last_id = 0

    def close(self) -> None:
        pass

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
        self._last_id = max(self._last_id, *conversation.messages, 0) + 1
        message = Message(
            id=self._last_id,
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
        pass

    def add_records(self, message: int, data: bytes) -> None:
        pass

    def drop_records(self, message: int) -> None:
        pass

    def records(self, message: int) -> list[bytes]:  # noqa: ARG002
        return []

    def _set(self, number: int, column: str, value: object) -> None:
        pass
