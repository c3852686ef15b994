"""Bodies of the page's requests."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from llm_edge.server.web.chats import AnswerOptions

_MAX_TEXT = 4_000_000  # characters
Text = Annotated[str, StringConstraints(max_length=_MAX_TEXT)]
Id = Annotated[int, Field(ge=1, le=2**53)]
Params = Annotated[dict[str, Any], Field(max_length=100)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Answer(_Body):
    """What every request for an answer has; see `AnswerOptions`."""

    model: str = ""
    params: Params = {}
    system: Text | None = None
    thinking: bool | None = None

    def options(self) -> AnswerOptions:
        """The options of the answer."""
        params = {name: value for name, value in self.params.items() if name != "system"}
        return AnswerOptions(self.model, params, self.system, self.thinking)


class Ask(_Answer):
    """A question; `chat` = None starts a conversation."""

    text: Annotated[str, StringConstraints(max_length=_MAX_TEXT, min_length=1, pattern=r"\S")]
    chat: Id | None = None


class Again(_Answer):
    """Another answer to a question, or more of an answer."""

    message: Id


class Edit(_Answer):
    """Another text for a message."""

    message: Id
    text: Text


class Select(_Body):
    """The branch to show."""

    message: Id


class ChatChange(_Body):
    """A conversation's new title, pin or system prompt."""

    title: Annotated[str, StringConstraints(max_length=1000)] | None = None
    pinned: bool | None = None
    system: Text | None = None


class ParamChange(_Body):
    """The parameters that differ from the model's defaults."""

    params: Params


class Preset(_Body):
    """A preset to save."""

    name: Annotated[str, StringConstraints(max_length=200)]
    params: Params


class Question(_Body):
    """A quick question."""

    text: Text
