"""Conversations, messages and parameters as JSON for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llm_edge.chat.figures import figures_line
from llm_edge.chat.history.conversation import ASSISTANT, Conversation, Message
from llm_edge.chat.history.search import Summary
from llm_edge.chat.model_parameters import without_system
from llm_edge.chat.parameters import CHAT_ONLY, EDITABLE, ChatParameters
from llm_edge.chat.presets import MODEL_DEFAULTS, Presets
from llm_edge.chat.token_records import TokenRecord
from llm_edge.runtime.sampling.parameter_spec import ParameterSpec
from llm_edge.runtime.sampling.presets import DESCRIPTIONS, PRESET_PARAMETERS, PRESETS
from llm_edge.server.web.markdown import render

_GROUPS = {
    "sampling": "Sampling",
    "penalties": "Penalties",
    "dry": "Repetition (DRY)",
    "limits": "Length",
    "reasoning": "Reasoning",
    "tokens": "Tokens",
    "output": "Output",
}
_EXACT = 2**53  # larger integers are not exact in JavaScript


def summary_view(summary: Summary, running: bool) -> dict[str, Any]:
    """A conversation in the list."""
    return {
        "id": summary.id,
        "title": summary.title,
        "pinned": summary.pinned,
        "updated": summary.updated,
        "model": summary.model,
        "snippet": summary.snippet,
        "running": running,
    }


def chat_view(
    conversation: Conversation,
    used: int,
    context: int | None,
    running: int | None = None,
    blocks: Sequence[str] = (),
) -> dict[str, Any]:
    """The path of a conversation that is shown.

    Args:
        conversation: the conversation.
        used: number of tokens of the context in use.
        context: length of the context, if it is known.
        running: id of the answer being generated.
        blocks: the HTML of that answer.
    """
    path = conversation.path()
    last = next((each for each in reversed(path) if each.role == ASSISTANT), None)
    return {
        "id": conversation.id,
        "title": conversation.title,
        "pinned": conversation.pinned,
        "system": conversation.system,
        "running": running,
        "used": used,
        "context": context,
        "model": last.model if last is not None else "",
        "params": without_system(last.params) if last is not None else {},
        "messages": [
            _message_view(each, conversation, blocks if each.id == running else None, running) for each in path
        ],
    }


def _message_view(
    message: Message, conversation: Conversation, blocks: Sequence[str] | None, running: int | None
) -> dict[str, Any]:
    answer = message.role == ASSISTANT
    rendered = blocks if blocks is not None else render(message.content) if answer else ()
    return {
        "id": message.id,
        "role": message.role,
        "text": message.content,
        "blocks": list(rendered),
        "reasoning": message.reasoning,
        "model": message.model,
        "created": message.created,
        "figures": figures_line(message.figures, without_system(message.params)) if message.id != running else "",
        "error": message.figures.get("error", ""),
        "finished": message.finished,
        "branches": conversation.siblings(message.id),
    }


def parameter_views() -> list[dict[str, Any]]:
    """The parameters that can be edited, by group."""
    groups = list(_GROUPS)
    specs = [spec for spec in EDITABLE.values() if spec.name != "system"]  # it belongs to the conversation
    return [_parameter_view(spec) for spec in sorted(specs, key=lambda spec: (groups.index(spec.group), spec.order))]


def _parameter_view(spec: ParameterSpec) -> dict[str, Any]:
    slider = spec.slider
    return {
        "name": spec.name,
        "kind": spec.kind,
        "optional": spec.optional,
        "title": spec.title,
        "help": f"{spec.help[0].upper()}{spec.help[1:]}.",
        "detail": spec.detail,
        "group": _GROUPS[spec.group],
        "more": spec.order >= 100 or spec.name in CHAT_ONLY,
        "default": list(spec.default) if isinstance(spec.default, tuple) else spec.default,
        "between": [max(spec.between[0], -_EXACT), min(spec.between[1], _EXACT)] if spec.between else None,
        "slider": [slider.low, slider.high, slider.step, slider.start] if slider else None,
    }


def preset_views(presets: Presets, model: str, defaults: ChatParameters) -> list[dict[str, Any]]:
    """The presets for a model, with the values that differ from its defaults.

    `decides` lists the parameters that a preset sets; None = all.
    """
    own = set(presets.own(model))
    built_in = {name for name in PRESETS if name not in own}
    return [
        {
            "name": name,
            "description": DESCRIPTIONS.get(name, "") if name in built_in else text,
            "own": name in own and name != MODEL_DEFAULTS,
            "values": dict(presets.values(model, name, defaults)),
            "decides": sorted(PRESET_PARAMETERS) if name in built_in else None,
        }
        for name, text in presets.offered(model).items()
    ]


def record_views(records: Sequence[TokenRecord]) -> list[dict[str, Any]]:
    """The tokens of an answer with their probabilities, and the most probable alternatives."""
    return [
        {
            "text": record.text(record.logprob.token),
            "p": math.exp(min(record.logprob.logprob, 0.0)),
            "top": [[record.text(token), math.exp(min(value, 0.0))] for token, value in record.logprob.top],
        }
        for record in records
    ]
