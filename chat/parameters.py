"""`ChatParameters`: the parameters of a chat as values to show and edit."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from typing import Any

from llm_edge.chat.text import one_line
from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.parameter_spec import ParameterSpec, refused
from llm_edge.runtime.sampling.params import PARAMETERS, SamplingParams
from llm_edge.runtime.sampling.presets import PRESET_PARAMETERS, apply_preset

OFF = "off"
MAX_SUMMARY_VALUE = 40  # characters of a value in a summary


def _text(name: str, title: str, help_: str, order: int) -> ParameterSpec:
    return ParameterSpec(name, "text", False, "", title, help_, "output", order=order)


# What a chat sets beyond sampling; changes apply from the next answer on.
CHAT_ONLY: Mapping[str, ParameterSpec] = {
    "json_schema": _text("json_schema", "JSON schema", "the next answer is JSON of this schema; {} = any object", 16),
    "system": _text("system", "System prompt", "instructions for the model before the conversation", 17),
}
_EDITABLE_KINDS = ("float", "int", "bool", "strings", "text")
EDITABLE: Mapping[str, ParameterSpec] = {
    spec.name: spec
    for spec in sorted([*PARAMETERS.values(), *CHAT_ONLY.values()], key=lambda spec: spec.order)
    if spec.kind in _EDITABLE_KINDS
}
"""The parameters that a person can edit, in the order in which they are shown."""


class ChatParameters:
    """The parameters of a chat: the model's defaults and the user's changes.

    Attributes:
        defaults: of the model.
        changed: what differs from them, by name, as JSON values.
    """

    def __init__(self, defaults: SamplingParams, changed: Mapping[str, Any] | None = None) -> None:
        self.defaults = defaults
        self.changed: dict[str, Any] = {}
        self.load(changed or {})

    def value(self, name: str) -> Any:
        """The current value as a JSON value; None = off."""
        return self.changed[name] if name in self.changed else self.default(name)

    def default(self, name: str) -> Any:
        """The model's default as a JSON value."""
        if name in CHAT_ONLY:
            return ""
        value = getattr(self.defaults, name)
        return list(value) if isinstance(value, tuple) else value

    def set(self, name: str, value: Any) -> None:
        """Change a value.

        Raises:
            ParameterError: unknown name, or a value that it cannot have.
        """
        if name not in CHAT_ONLY and name not in PARAMETERS:
            raise ParameterError(f"{reprlib.repr(name)}: unknown parameter; available: {', '.join(EDITABLE)}")
        if name in CHAT_ONLY and not isinstance(value, str):
            raise refused(name, value, "text")
        changed = {**self.changed, name: value}
        if value == self.default(name):
            del changed[name]
        self._params(changed)  # validates
        self.changed = changed

    def set_text(self, name: str, text: str) -> None:
        """Change a value to what was typed; empty text means off, or the model's default.

        Raises:
            ParameterError: as in `set`, or the text does not fit the parameter.
        """
        spec = CHAT_ONLY.get(name) or PARAMETERS.get(name)
        self.set(name, text if spec is None else _parsed(spec, text, self.default(name)))

    def step(self, name: str, steps: int) -> None:
        """Move a number by so many steps within its slider; one step below the end is off, where that is allowed."""
        spec, value = EDITABLE[name], self.value(name)
        if spec.kind == "bool":
            self.set(name, steps > 0)
        if (slider := spec.slider) is None:
            return
        if value is None:
            self.set(name, slider.start if steps > 0 else None)
        elif spec.optional and value + steps * slider.step < slider.low:
            self.set(name, None)
        else:
            new = min(max(value + steps * slider.step, slider.low), slider.high)
            if spec.kind == "float":
                new = round(new / slider.step) * slider.step
            self.set(name, round(new, 6) if spec.kind == "float" else int(new))

    def text(self, name: str) -> str:
        """The current value as it is shown and typed."""
        value = self.value(name)
        if value is None or value is False:
            return OFF
        if value is True:
            return "on"
        if isinstance(value, float):
            return f"{value:.3f}".rstrip("0").rstrip(".") if round(value, 3) == value else repr(value)
        if isinstance(value, list):
            return "\n".join(map(_escaped, value))
        return str(value)

    def load(self, changed: Mapping[str, Any]) -> None:
        """Replace all changes.

        Raises:
            ParameterError: a parameter cannot have its value; nothing is changed then.
        """
        before, self.changed = self.changed, {}
        try:
            for name, value in changed.items():
                self.set(name, value)
        except ParameterError:
            self.changed = before
            raise

    def with_preset(self, preset: str) -> dict[str, Any]:
        """What `changed` would be with a built-in preset, which leaves other parameters as they are.

        Raises:
            ParameterError: there is no such preset.
        """
        params = apply_preset(preset, self.defaults)
        decided = {name: getattr(params, name) for name in sorted(PRESET_PARAMETERS)}
        kept = {name: value for name, value in self.changed.items() if name not in PRESET_PARAMETERS}
        return {**kept, **{name: value for name, value in decided.items() if value != self.default(name)}}

    def set_defaults(self, defaults: SamplingParams) -> None:
        """Switch to another model's defaults; changes are kept as far as they differ from them."""
        changed = {**self.changed}
        self.defaults = defaults
        self.load(changed)

    @property
    def params(self) -> SamplingParams:
        """The current values for the runtime."""
        return self._params(self.changed)

    @property
    def system(self) -> str:
        """The system prompt; empty for the chat template's default."""
        return str(self.value("system"))

    def _params(self, changed: Mapping[str, Any]) -> SamplingParams:
        schema = changed.get("json_schema", "").strip()
        given = {name: value for name, value in changed.items() if name not in CHAT_ONLY}
        if schema:
            given["constraint"] = Constraint.json() if schema == "{}" else Constraint.json_schema(schema)
        return dataclasses.replace(self.defaults, **given)


def as_json_values(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters with lists in place of tuples, as `ChatParameters.changed` has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sampling.items()}


def summarize(changed: Mapping[str, Any]) -> str:
    """Changed parameters in one line; empty if there are none."""
    parts = []
    for name, value in changed.items():
        shown = OFF if value is None else ", ".join(map(repr, value)) if isinstance(value, list) else str(value)
        parts.append(f"{title_of(name)} {one_line(shown, MAX_SUMMARY_VALUE)}".rstrip())
    return " · ".join(parts)


def title_of(name: str) -> str:
    """A parameter's title within a line."""
    spec = PARAMETERS.get(name) or CHAT_ONLY.get(name)
    title = spec.title if spec is not None else one_line(name.replace("_", " "), MAX_SUMMARY_VALUE)
    return title if title.split(" ")[0].isupper() else title.lower()


def _parsed(spec: ParameterSpec, text: str, default: Any) -> Any:
    """The JSON value that a text stands for; the parameter itself checks it."""
    if spec.kind == "text":
        return text
    stripped = text.strip()
    if spec.kind == "strings" and not stripped.startswith("["):
        return [_unescaped(line) for line in text.split("\n") if line]
    if stripped in ("", OFF, "none", "null"):
        return None if spec.optional else False if spec.kind == "bool" and stripped else default
    if spec.kind == "bool":
        return {"on": True, "true": True, "false": False}.get(stripped.lower(), text)
    try:
        if spec.kind in ("float", "int"):
            return float(stripped) if spec.kind == "float" else int(stripped)
        return json.loads(stripped)
    except (ValueError, RecursionError):
        wanted = {"float": "a number", "int": "an integer"}.get(spec.kind, "JSON")
        raise refused(spec.name, text, wanted) from None


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def _unescaped(text: str) -> str:
    """As typed: `\\n` stands for a line end."""
    found, rest = "", text
    while rest:
        head, mark, rest = rest.partition("\\")
        found += head
        if mark:
            found += {"n": "\n", "t": "\t", "\\": "\\"}.get(rest[:1], "\\" + rest[:1])
            rest = rest[1:]
    return found
