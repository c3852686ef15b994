"""`ModelParameters`: which parameters a conversation has when its model changes, and which a new one starts with.

Parameters belong to a conversation and a model: another model has its own, and a new conversation starts with the
model's defaults and what the command line set. Presets carry values from one conversation to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_edge.chat.history.conversation import ASSISTANT, Conversation
from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.responder import Responder
from llm_edge.runtime.errors import ParameterError


class ModelParameters:
    """Sets the parameters of a chat when its model or conversation changes.

    Attributes:
        current: the parameters in use.
        new_system: the system prompt of new conversations.
    """

    def __init__(self, current: ChatParameters) -> None:
        self.current = current
        self.new_system = current.system
        self._given_system = current.system  # the one that the current conversation brought along
        self._start_values = without_system(current.changed)
        self._start_model = ""  # the `settings_key` of the model that the start values are for
        self._kept: dict[str, dict[str, Any]] = {}  # of other models in this conversation, by `settings_key`

    def set_start_values(self, values: Mapping[str, Any]) -> None:
        """Change parameters of the current model, which new conversations with it start with too.

        Raises:
            ParameterError: a value is not allowed.
        """
        self.current.load({**self.current.changed, **values})
        self._start_values = without_system(values)

    def use_model(self, previous: Responder | None, responder: Responder, conversation: Conversation) -> None:
        """Use a model's own parameters, or those that it had in this conversation."""
        before = without_system(self.current.changed)
        self.current.set_defaults(responder.default_params)
        if previous is None:
            self._start_model = responder.settings_key
            if conversation.messages:
                self._load_values_of(conversation, responder)
            return
        self._kept[previous.settings_key] = before
        self.load(self._kept.get(responder.settings_key, self._own_values(responder)))

    def use_conversation(self, conversation: Conversation, responder: Responder | None) -> None:
        """Use the system prompt of a conversation, and the parameters of its last answer by the current model."""
        self.keep_system()
        self._kept.clear()
        self._load_values_of(conversation, responder)
        self.current.set("system", conversation.system)
        self._given_system = conversation.system

    def reset(self, parameters: ChatParameters, responder: Responder | None) -> None:
        """Restore the values that conversations with this model start with; the system prompt stays."""
        _load(parameters, self._own_values(responder))

    def load(self, values: Mapping[str, Any]) -> None:
        """Replace all values except the system prompt."""
        _load(self.current, values)

    def keep_system(self) -> None:
        """New conversations use a system prompt that the user wrote, but not one of an old conversation."""
        if self.current.system != self._given_system:
            self.new_system = self._given_system = self.current.system

    def _own_values(self, responder: Responder | None) -> Mapping[str, Any]:
        """What conversations with a model start with, as far as it differs from the model's defaults."""
        first = responder is None or not self._start_model or responder.settings_key == self._start_model
        return self._start_values if first else {}

    def _load_values_of(self, conversation: Conversation, responder: Responder | None) -> None:
        name = responder.name if responder is not None else ""
        answers = (each for each in reversed(conversation.path()) if each.role == ASSISTANT)
        answer = next((each for each in answers if each.model == name), None)
        try:
            values = without_system(answer.params) if answer is not None else self._own_values(responder)
            self.load({name: value for name, value in values.items() if name != "logprobs"})
        except ParameterError:  # stored by another version
            self.load(self._own_values(responder))


def without_system(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters without the system prompt, which belongs to the conversation."""
    return {name: value for name, value in values.items() if name != "system"}


def _load(parameters: ChatParameters, values: Mapping[str, Any]) -> None:
    system = {"system": parameters.system} if parameters.system else {}
    parameters.load({**values, **system})
