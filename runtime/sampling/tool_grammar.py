"""`tool_constraint`: the constraint that answers with tool calls are held to, as a grammar for llguidance.

Free text may come first, up to the trigger of the format; from there on every byte is constrained, so that calls are
always well-formed, name a given tool, and have arguments that conform to its schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.constraint import Constraint, literal_pattern, refused_constraint
from llm_edge.runtime.sampling.json_schema.keywords import RESTRICTING, without_keywords
from llm_edge.runtime.sampling.json_schema.normalize import JSON_STYLE, enforceable
from llm_edge.runtime.text.special_token_mask import any_of
from llm_edge.runtime.text.tool_format import ToolFormat

_MAX_LENGTH = 10_000  # of repetitions in a regular expression
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
# What is enforced of a schema that cannot be enforced completely.
_STRUCTURE = frozenset(
    ("type", "properties", "required", "additionalProperties", "items", "prefixItems", "enum", "const", "anyOf", "$ref")
)


def tool_constraint(
    form: ToolFormat,
    tools: Sequence[tuple[str, Mapping[str, Any]]],
    special_ids: Mapping[str, int],
    *,
    required: bool = False,
    parallel: bool = True,
    otherwise: Constraint | None = None,
) -> Constraint:
    """The constraint for an answer that may call tools.

    Args:
        form: how calls are written.
        tools: names, and JSON schemas of the arguments. What a schema says and cannot be enforced is left out.
        special_ids: special tokens of the vocabulary; in the format, their spelling stands for the token.
        required: the answer is a call and nothing else, apart from white space.
        parallel: several calls are allowed, if the format has them.
        otherwise: what an answer without a call has to conform to; None = any text.

    Raises:
        ParameterError: `otherwise` is a grammar, which cannot be combined with tools.
    """
    return Constraint("tools", _Grammar(form, special_ids).text(tools, required, parallel, otherwise))


class _Grammar:
    def __init__(self, form: ToolFormat, special_ids: Mapping[str, int]) -> None:
        self._form = form
        self._specials = special_ids
        self._pattern = any_of(special_ids)
        self._rules: list[str] = []

    def text(
        self,
        tools: Sequence[tuple[str, Mapping[str, Any]]],
        required: bool,
        parallel: bool,
        otherwise: Constraint | None,
    ) -> str:
        form, trigger = self._form, self._form.trigger
        after_trigger = form.prefix.lstrip()[len(trigger) :]
        bodies = [self._body(number, name, schema) for number, (name, schema) in enumerate(tools)]
        self._rules.append(f"body: {' | '.join(bodies)}")
        more = ""
        if parallel and form.separator is not None:
            more = f"({self._literal(form.separator + form.begin)} body)*"
        calls = " ".join(filter(None, (self._literal(after_trigger), "body", more, self._literal(form.closing))))
        self._rules.append(f"calls: {calls}")
        if required:
            # Models that reason write line breaks before they call.
            self._rules += [f"start: SPACE? {self._literal(trigger)} calls", "SPACE: /[ \\n]{1,4}/"]
        elif self._pattern.search(trigger):  # a special token, which no text can spell
            self._rules += [f"start: {self._otherwise(otherwise, None)} | TEXT? {self._literal(trigger)} calls"]
            self._rules.append("TEXT: /(.|\\n)*/")
        else:
            self._rules.append(f"start: {self._otherwise(otherwise, trigger)} | head calls")
            self._rules += [f"head[lazy]: TEXT {json.dumps(trigger)}", "TEXT: /(.|\\n)*/"]
        return "\n".join(reversed(self._rules))

    def _otherwise(self, constraint: Constraint | None, trigger: str | None) -> str:
        """The rule for answers without a call."""
        if constraint is None:
            if trigger is None:
                return "TEXT"
            self._rules.append(f"NO_CALL: /(.|\\n)*/ & ~/(.|\\n)*{literal_pattern(trigger)}(.|\\n)*/")
            return "NO_CALL"
        if constraint.kind in ("json", "json_schema"):
            self._rules.append(f"other: %json {_styled(enforceable(json.loads(constraint.text)))}")
            return "other"
        if constraint.kind in ("regex", "choice"):
            self._rules.append(f"OTHER: /{constraint.text.replace('/', '[/]')}/")
            return "OTHER"
        raise refused_constraint(constraint.kind, "a grammar cannot be combined with tools: remove one of them")

    def _body(self, number: int, name: str, schema: Mapping[str, Any]) -> str:
        """The rule for a call, from its name to its end."""
        form = self._form
        if form.parameters is None:
            arguments = f"%json {_enforceable(schema, form.item_separator, form.key_separator)}"
        else:
            arguments = self._arguments(number, schema)
        self._rules.append(f"args_{number}: {arguments}")
        return f"{self._literal(name + form.between)} args_{number} {self._literal(form.end)}"

    def _arguments(self, number: int, schema: Mapping[str, Any]) -> str:
        """The rule for arguments that are written one by one, in the order of `properties`."""
        form = self._form.parameters
        assert form is not None
        properties = schema.get("properties")
        known = [*properties.items()] if isinstance(properties, Mapping) else []
        required = schema.get("required")
        needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set[str]()

        def rest(at: int, started: bool) -> str:
            """The name of the rule for the arguments from this one on."""
            rule = f"args_{number}_{at}{'s' if started else ''}"
            if rule in made:
                return rule
            made.add(rule)
            if at == len(known):
                self._rules.append(f'{rule}: ""')
                return rule
            name, value = known[at]
            separator = self._literal(form.separator) if started else ""
            head = self._literal(form.begin + name + form.between)
            one = f"{separator} {head} {self._value(f'value_{number}_{at}', value)} {rest(at + 1, True)}"
            skip = "" if name in needed else f" | {rest(at + 1, started)}"
            self._rules.append(f"{rule}: {one}{skip}")
            return rule

        made: set[str] = set()
        return rest(0, False)

    def _value(self, rule: str, schema: Any) -> str:
        """The rule for one value and the text after it."""
        form = self._form.parameters
        assert form is not None
        if not form.quoted and takes_text(schema):
            options = schema.get("enum") if isinstance(schema, Mapping) else None
            if isinstance(options, list) and options and all(isinstance(option, str) for option in options):
                self._rules.append(f"{rule}: {' | '.join(json.dumps(option) for option in options)}")
                return f"{rule} {self._literal(form.end)}"
            self._rules.append(f"{rule}[lazy]: /(.|\\n){_length(schema)}/ {json.dumps(form.end)}")
            return rule
        self._rules.append(f"{rule}: %json {_enforceable(schema, ', ', ': ', any_of={})}")
        return f"{rule} {self._literal(form.end)}"

    def _literal(self, text: str) -> str:
        """A text as Lark; spelled special tokens become tokens."""
        parts, at = [], 0
        for match in self._pattern.finditer(text):
            if match.start() > at:
                parts.append(json.dumps(text[at : match.start()]))
            parts.append(f"<[{self._specials[match[0]]}]>")
            at = match.end()
        if at < len(text):
            parts.append(json.dumps(text[at:]))
        return " ".join(parts)


def _length(schema: Any) -> str:
    """The repetition in a regular expression for the length of a string."""
    low, high = (schema.get(key) if isinstance(schema, Mapping) else None for key in ("minLength", "maxLength"))
    low = low if isinstance(low, int) and 0 <= low <= _MAX_LENGTH else 0
    return f"{{{low},{high}}}" if isinstance(high, int) and low <= high <= _MAX_LENGTH else "*"


def takes_text(schema: Any) -> bool:
    """Whether a value of this schema may be a string, which some formats write without quotes."""
    if not isinstance(schema, Mapping):
        return True
    kind = schema.get("type")
    if kind is None:
        options = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(options, list):
            return any(map(takes_text, options))
        values = schema.get("enum")
        return not isinstance(values, list) or any(isinstance(value, str) for value in values)
    return "string" in kind if isinstance(kind, list) else kind == "string"


def _enforceable(schema: Any, item_separator: str, key_separator: str, any_of: Mapping[str, Any] = _ANY_OBJECT) -> str:
    """A schema as JSON text that llguidance enforces; `any_of` in place of one that it cannot."""
    attempts: list[Callable[[], str]] = [
        lambda: enforceable(schema),
        lambda: enforceable(without_keywords(schema, RESTRICTING - _STRUCTURE)),
    ]
    text = json.dumps(any_of)
    for attempt in attempts:
        try:
            text = attempt()
            break
        except ParameterError:
            continue
    return _styled(text, item_separator=item_separator, key_separator=key_separator)


def _styled(schema: str, **style: str) -> str:
    """A schema within a grammar, with the settings that are an argument of llguidance elsewhere."""
    return json.dumps({**json.loads(schema), "x-guidance": {**JSON_STYLE, **style}}, ensure_ascii=False)
