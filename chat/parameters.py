"""What a person can turn: the parameters of answers, as numbers and texts to edit. Knows no widgets and no model."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_edge.chat.text import one_line
from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.parameter_spec import refused
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.presets import PRESET_PARAMETERS, apply_preset

OFF = "off"
LONGEST_TOLD = 40  # characters of a value in a line of them


@dataclass(frozen=True, slots=True)
class Knob:
    """One thing to turn.

    Attributes:
        name: of the parameter.
        title: for people, and
        help: a line on what it does.
        kind: `float`, `int`, `optional` (a whole number or off), `lines` (texts, one a line), or `text`.
        step: by which a key turns it.
        low, high: between which keys turn it; typed values may lie beyond, within what the parameter allows.
        first: where a key turns it to from off.
    """

    name: str
    title: str
    help: str
    kind: str = "float"
    step: float = 0.05
    low: float = 0.0
    high: float = 1.0
    first: int = 0


KNOBS: tuple[Knob, ...] = (
    Knob("temperature", "Temperature", "0 always takes the most probable token; higher is bolder", high=2.0),
    Knob("top_p", "Top-p", "draw from the most probable tokens that make up this share; 1: all", low=0.05),
    Knob("top_k", "Top-k", "draw from so many most probable tokens; 0: all", "int", 5, 0, 200),
    Knob("min_p", "Min-p", "leave out tokens this much less probable than the best", step=0.01),
    Knob("repetition_penalty", "Repetition", "above 1 avoids tokens that came of late", low=0.5, high=2.0),
    Knob("presence_penalty", "Presence", "above 0 avoids tokens the answer has used", step=0.1, low=-2.0, high=2.0),
    Knob("frequency_penalty", "Frequency", "above 0 avoids what the answer uses often", step=0.1, low=-2.0, high=2.0),
    Knob("dry_multiplier", "DRY", "above 0 avoids repeating whole passages", step=0.1, high=5.0),
    Knob("xtc_probability", "XTC", "how often the most obvious tokens are left out"),
    Knob("mirostat_tau", "Mirostat", "above 0 holds the surprise at so many bits", step=0.5, high=10.0),
    Knob("max_tokens", "Max tokens", "length of an answer at most", "int", 64, 1, 32_768),
    Knob("seed", "Seed", "the same seed gives the same answer; off: another one each time", "optional", 1, 0, 2**32, 1),
    Knob("reasoning_budget", "Reasoning", "tokens a reasoning model may think", "optional", 64, 0, 32_768, 256),
    Knob("logprobs", "Token view", "keep so many runners-up of each token, to be looked at", "optional", 1, 0, 20, 5),
    Knob("stop", "Stop at", "an answer ends before any of these texts; one a line", "lines"),
    Knob("json_schema", "JSON schema", "the next answer is JSON of this schema; {} for any object", "text"),
    Knob("system", "System prompt", "what the model is told before the conversation", "text"),
)
BY_NAME: Mapping[str, Knob] = {knob.name: knob for knob in KNOBS}
NEXT_ANSWER = ("json_schema", "system")  # what is turned takes effect there; no sampling parameters of these names


class Knobs:
    """The parameters of a chat: a model's own, and what was turned.

    Attributes:
        defaults: the model's own.
        changed: what was turned, by name, as JSON values; what a preset of the runtime decides may be among them,
            without being one of the `KNOBS`.
    """

    def __init__(self, defaults: SamplingParams, changed: Mapping[str, Any] | None = None) -> None:
        self.defaults = defaults
        self.changed: dict[str, Any] = {}
        self.load(changed or {})

    def value(self, name: str) -> Any:
        """The value of now, as a JSON value; None for what is off."""
        return self.changed[name] if name in self.changed else self.default(name)

    def default(self, name: str) -> Any:
        """The model's own value."""
        if name in NEXT_ANSWER:
            return ""
        value = getattr(self.defaults, name)
        return list(value) if isinstance(value, tuple) else value

    def set(self, name: str, value: Any) -> None:
        """Turn it.

        Raises:
            ParameterError: it cannot have that value.
        """
        if name not in BY_NAME and name not in PRESET_PARAMETERS:
            raise ParameterError(f"{reprlib.repr(name)}: not known here; known: {', '.join(BY_NAME)}")
        if name in NEXT_ANSWER and not isinstance(value, str):
            raise refused(name, value, "a text")
        changed = {**self.changed, name: value}
        if value == self.default(name):
            del changed[name]
        self._params(changed)  # refuses
        self.changed = changed

    def type(self, name: str, text: str) -> None:
        """Turn it to what was typed; nothing typed is off, or the model's own value.

        Raises:
            ParameterError: that says nothing it could be.
        """
        kind, text = BY_NAME[name].kind, text if BY_NAME[name].kind == "text" else text.strip()
        if kind in ("float", "int", "optional"):
            self.set(name, _number(name, text, kind) if text and text != OFF else self._nothing(name))
        elif kind == "lines":
            self.set(name, [_unescaped(line) for line in text.split("\n") if line])
        else:
            self.set(name, text)

    def turn(self, name: str, steps: int) -> None:
        """Turn a number by so many steps, up or down, as far as it goes; down from its end it is off, where it can."""
        knob, value = BY_NAME[name], self.value(name)
        if knob.kind in ("lines", "text"):
            return
        if value is None:
            self.set(name, knob.first if steps > 0 else None)
        elif knob.kind == "optional" and value + steps * knob.step < knob.low:
            self.set(name, None)
        else:
            new = min(max(value + steps * knob.step, knob.low), knob.high)
            if knob.kind == "float":
                new = round(new / knob.step) * knob.step
            self.set(name, round(new, 6) if knob.kind == "float" else int(new))

    def text(self, name: str) -> str:
        """The value of now as it is shown and typed."""
        value = self.value(name)
        if value is None:
            return OFF
        if isinstance(value, float):
            return f"{value:.3f}".rstrip("0").rstrip(".") if round(value, 3) == value else repr(value)
        if isinstance(value, list):
            return "\n".join(map(_escaped, value))
        return str(value)

    def load(self, changed: Mapping[str, Any]) -> None:
        """Turn all of them: those of a preset to its values, the others to the model's own.

        Raises:
            ParameterError: one cannot have its value; nothing is turned then.
        """
        before, self.changed = self.changed, {}
        try:
            for name, value in changed.items():
                self.set(name, value)
        except ParameterError:
            self.changed = before
            raise

    def drawing(self, preset: str) -> dict[str, Any]:
        """What `changed` would be with a preset of the runtime; all that it does not decide stays as it is.

        Raises:
            ParameterError: there is none of this name.
        """
        params = apply_preset(preset, self.defaults)
        decided = {name: getattr(params, name) for name in sorted(PRESET_PARAMETERS)}
        kept = {name: value for name, value in self.changed.items() if name not in PRESET_PARAMETERS}
        return {**kept, **{name: value for name, value in decided.items() if value != self.default(name)}}

    def use(self, defaults: SamplingParams) -> None:
        """Another model's own parameters; what was turned stays turned, as far as it differs from them."""
        turned = {**self.changed}
        self.defaults = defaults
        self.load(turned)

    @property
    def params(self) -> SamplingParams:
        """What a runtime takes."""
        return self._params(self.changed)

    @property
    def system(self) -> str:
        """The system prompt; none for the template's own."""
        return str(self.value("system"))

    def _params(self, changed: Mapping[str, Any]) -> SamplingParams:
        schema = changed.get("json_schema", "").strip()
        given = {name: value for name, value in changed.items() if name not in NEXT_ANSWER}
        if schema:
            given["constraint"] = Constraint.json() if schema == "{}" else Constraint.json_schema(schema)
        return dataclasses.replace(self.defaults, **given)

    def _nothing(self, name: str) -> Any:
        return None if BY_NAME[name].kind == "optional" else self.default(name)


def told(changed: Mapping[str, Any]) -> str:
    """What was turned, in a line for people; nothing where nothing was."""
    parts = []
    for name, value in changed.items():
        shown = OFF if value is None else ", ".join(map(repr, value)) if isinstance(value, list) else str(value)
        parts.append(f"{title_of(name)} {one_line(shown, LONGEST_TOLD)}".rstrip())
    return " · ".join(parts)


def title_of(name: str) -> str:
    """What a parameter is called within a line."""
    title = BY_NAME[name].title if name in BY_NAME else one_line(name.replace("_", " "), LONGEST_TOLD)
    return title if title.split(" ")[0].isupper() else title.lower()


def _number(name: str, text: str, kind: str) -> float | int:
    try:
        return float(text) if kind == "float" else int(text)
    except ValueError:
        raise refused(name, text, "a number" if kind == "float" else "a whole number") from None


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def _unescaped(text: str) -> str:
    """As typed: a line end is written `\\n`."""
    found, rest = "", text
    while rest:
        head, mark, rest = rest.partition("\\")
        found += head
        if mark:
            found += {"n": "\n", "t": "\t", "\\": "\\"}.get(rest[:1], "\\" + rest[:1])
            rest = rest[1:]
    return found
