"""Chat format of models whose config has a `tokens:` section: control tokens, template and sampling parameters.

A conversation is `question [question end] answer [answer end]` repeated, without role names or added white space; a
system message precedes the first question. The prompt of an answer with reasoning ends with `[think start]`; from
earlier answers only the text after the last `[think end]` is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_edge.checkpoint.meta.tokenizer import Vocabulary
from llm_edge.model.config_reader import ConfigReader
from llm_edge.runtime.bundle import Guards, ReasoningTokens
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import short_repr

MAX_NEWLINES = 3
"""Default limit of consecutive newlines: two blank lines, as between Python functions."""

_DEFAULTS = {"padding": 0, "question_end": 1, "answer_end": 2, "think_start": 7, "think_end": 8}
_ROLE_NAMES: Mapping[str, tuple[str, ...]] = {
    "padding": ("padding", "pad"),
    "question_end": ("question_end", "end_question", "end_of_question", "q_end", "eoq"),
    "answer_end": ("answer_end", "end_answer", "end_of_answer", "a_end", "eoa"),
    "think_start": ("think_start", "start_think", "start_of_think", "thinking_start", "reasoning_start"),
    "think_end": ("think_end", "end_think", "end_of_think", "thinking_end", "reasoning_end"),
}
_SUFFIXES = ("", "_id", "_token", "_token_id")
_SAMPLING = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 50,
    "repetition_penalty": 1.1,
    "max_new_tokens": 100,
}
_MAX = 2**31 - 1
# Key of generation_config.json -> keys of the config's `generation:`, minimum, maximum
_NUMBERS: Mapping[str, tuple[tuple[str, ...], float, float]] = {
    "temperature": (("temperature", "temp"), 0.0, 100.0),
    "top_p": (("top_p",), 0.0, 1.0),
    "min_p": (("min_p",), 0.0, 1.0),
    "repetition_penalty": (("repetition_penalty", "repeat_penalty", "rep_penalty"), 0.01, 100.0),
}
_COUNTS: Mapping[str, tuple[tuple[str, ...], int, int]] = {
    "top_k": (("top_k",), 0, _MAX),
    "repetition_window": (
        ("repetition_window", "repetition_penalty_window", "penalty_window", "rep_window", "repeat_last_n"), -1, _MAX
    ),
    "max_new_tokens": (("max_new_tokens", "max_tokens", "max_length", "max_gen_len", "max_len"), 1, _MAX),
}  # fmt: skip
_NEWLINES = ("max_newlines", "max_consecutive_newlines")
_RANDOM_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Ids of the tokens that structure a conversation; `think_*` are None for models without reasoning."""

    padding: int
    question_end: int
    answer_end: int
    think_start: int | None
    think_end: int | None

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids."""
        ids = (self.padding, self.question_end, self.answer_end, self.think_start, self.think_end)
        return tuple(index for index in ids if index is not None)

    @property
    def reasoning(self) -> ReasoningTokens | None:
        """The tokens around reasoning, or None."""
        if self.think_start is None or self.think_end is None:
            return None
        return ReasoningTokens(self.think_start, self.think_end)


def read_control_tokens(section: Mapping[str, Any] | None, where: str, vocabulary: Vocabulary) -> ControlTokens | None:
    """Read the control tokens from a config's `tokens:` section, in which they are given by id or by text.

    Keys are those of `_ROLE_NAMES`, optionally with one of `_SUFFIXES`; case is ignored. Missing roles have the
    default ids (padding 0, question end 1, answer end 2, think start 7, think end 8). Null for both think roles means
    that the model does not reason.

    Args:
        section: the config's `tokens:`; None uses the default ids if all five are control tokens.
        where: path of the section, for error messages.
        vocabulary: vocabulary of the model.

    Raises:
        CheckpointError: an id is not in the vocabulary, is an ordinary text token, or has two roles.
    """
    if section is None:
        return ControlTokens(**_DEFAULTS) if all(map(vocabulary.is_control, _DEFAULTS.values())) else None
    values: dict[str, Any] = {}
    unknown = []
    for key, value in section.items():
        name = str(key).lower().replace("-", "_")
        role = next((role for role, names in _ROLE_NAMES.items() if name in _suffixed(names)), None)
        if role is None:
            unknown.append(key)
        elif role in values and values[role] != value:
            raise CheckpointError(f"{where}: {key} gives a second id for the token {role}")
        else:
            values[role] = value
    ids: dict[str, int | None] = {}
    for role, default in _DEFAULTS.items():
        reasoning = role.startswith("think")
        if role in values:
            no_reasoning = reasoning and values[role] is None
            ids[role] = None if no_reasoning else _token(values[role], role, where, vocabulary)
        elif unknown and not reasoning:
            raise CheckpointError(
                f"{where}: no key for the token {role} "
                f"(found {', '.join(map(short_repr, unknown[:8]))}): name it {role}"
            )
        elif reasoning and not vocabulary.is_control(default):
            ids[role] = None
        else:
            ids[role] = _token(default, role, where, vocabulary)
    if (ids["think_start"] is None) != (ids["think_end"] is None):
        raise CheckpointError(f"{where}: think_start and think_end must both be set, or both be null")
    roles: dict[int, str] = {}
    for role, index in ids.items():
        if index is not None and roles.setdefault(index, role) != role:
            raise CheckpointError(f"{where}: {roles[index]} and {role} are both token {index}: give different ids")
    return ControlTokens(**ids)  # type: ignore[arg-type]  # the first three are never None


def chat_template(tokens: ControlTokens, vocabulary: Vocabulary) -> str:
    """Return the Jinja chat template; `enable_thinking=false` omits the think start from the prompt."""

    def token_literal(role: re.Match[str]) -> str:
        index = getattr(tokens, role[1])
        return _jinja_string("" if index is None else vocabulary.text(index) or "")

    return re.sub(r"<(question_end|answer_end|think_start|think_end)>", token_literal, _TEMPLATE)


def read_generation(section: ConfigReader | None, tokens: ControlTokens | None) -> dict[str, Any]:
    """Read sampling parameters from a config's `generation:`, with the keys of generation_config.json.

    With control tokens, missing parameters have the defaults of the chat format. `repetition_window`, which Hugging
    Face does not have, is the number of recent tokens that the repetition penalty covers (-1: all).

    Raises:
        CheckpointError: a value is not a number, or out of range.
    """
    found: dict[str, Any] = dict(_SAMPLING) if tokens is not None else {}
    if section is not None:
        for name, (keys, low, high) in _NUMBERS.items():
            for key in _first_present(section, keys):
                found[name] = _bounded(section, key, section.number(key), low, high)
        for name, (keys, minimum, maximum) in _COUNTS.items():
            for key in _first_present(section, keys):
                found[name] = _bounded(section, key, section.integer(key), minimum, maximum)
        if any(name in found for name in _RANDOM_SAMPLING):
            found["do_sample"] = section.flag("do_sample", True)
    if found.get("temperature") == 0:
        found["do_sample"] = False
    if not found.get("do_sample", True):
        found = {name: value for name, value in found.items() if name not in _RANDOM_SAMPLING}
    # What generation_config.json otherwise implies is not what these configs mean.
    if found.get("do_sample"):
        found.setdefault("top_k", 0)
    if "repetition_penalty" in found:
        found.setdefault("repetition_window", 64)
    if tokens is not None:
        found |= {"eos_token_id": [tokens.answer_end], "pad_token_id": tokens.padding}
    return found


def read_guards(section: ConfigReader | None, tokens: ControlTokens) -> Guards:
    """Return the guards of the chat format; `generation:` may set `max_newlines` (0: no limit)."""
    max_newlines: int | None = MAX_NEWLINES
    if section is not None:
        for key in _first_present(section, _NEWLINES):
            max_newlines = _bounded(section, key, section.integer(key), 0, _MAX) or None
    return Guards(max_newlines, single_think_end=tokens.reasoning is not None)


def _token(value: object, role: str, where: str, vocabulary: Vocabulary) -> int:
    index = vocabulary.id(value) if isinstance(value, str) else value
    if not isinstance(index, int) or isinstance(index, bool) or not vocabulary.text(index):
        raise CheckpointError(
            f"{where}: {role} is {short_repr(value)}, which is not a token of {vocabulary.where}: correct its id"
        )
    if not vocabulary.is_control(index):
        text = f"{short_repr(vocabulary.text(index))} in {vocabulary.where}"
        raise CheckpointError(
            f"{where}: {role} is token {index}, {text}, which is an ordinary text token: correct its id"
        )
    return index


def _suffixed(names: tuple[str, ...]) -> set[str]:
    return {name + suffix for name in names for suffix in _SUFFIXES}


def _first_present(section: ConfigReader, keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if key in section)[:1]


def _bounded(section: ConfigReader, key: str, value: Any, low: float, high: float) -> Any:
    if not low <= value <= high:  # also rejects NaN
        section.fail(f"{key} is {short_repr(value)}; it must be {low:g} to {high:g}")
    return value


def _jinja_string(text: str) -> str:
    """Return a Jinja string literal."""

    def escaped(char: str) -> str:
        return f"\\{char}" if char in "'\\" else char if char.isprintable() else f"\\U{ord(char):08x}"

    return f"'{''.join(map(escaped, text))}'"


_TEMPLATE = """\
{%- set question_end = <question_end> -%}
{%- set answer_end = <answer_end> -%}
{%- set think_start = <think_start> -%}
{%- set think_end = <think_end> -%}
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type != 'text' -%}
                {{- raise_exception('this model reads text only, not ' + (part.type | string)) -}}
            {%- endif -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- set content = text(message.content) -%}
    {%- if message.role == 'user' -%}
        {{- content + question_end -}}
    {%- elif message.role == 'assistant' -%}
        {%- set answer = content.split(think_end)[-1] if think_end else content -%}
        {%- set whole = think_end and loop.last and not add_generation_prompt -%}
        {%- if whole and message.reasoning_content -%}
            {{- think_start + message.reasoning_content + think_end + answer + answer_end -}}
        {%- elif whole and answer != content -%}
            {{- (content if content.startswith(think_start) else think_start + content) + answer_end -}}
        {%- else -%}
            {{- answer + answer_end -}}
        {%- endif -%}
    {%- elif message.role == 'system' and loop.first -%}
        {{- content -}}
    {%- elif message.role == 'system' -%}
        {{- raise_exception('a system message can only be the first one') -}}
    {%- else -%}
        {{- raise_exception('this model has no role ' + message.role + '; it knows system, user and assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not (enable_thinking is defined and enable_thinking is false) -%}
    {{- think_start -}}
{%- endif -%}
"""
