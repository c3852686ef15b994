"""`Constraint`: the form an answer must have - JSON, a JSON schema, a regular expression, a grammar or a choice."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm_edge.runtime.errors import ParameterError

KINDS = ("json", "json_schema", "regex", "choice", "lark", "tools")
MAX_BYTES = 1_000_000
MAX_PATTERN_BYTES = 32_768  # of a hand-written grammar or expression; llguidance takes minutes to compile larger ones


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form that a whole answer must have; create one with the static methods below.

    JSON is generated without white space between its parts. Strings, arrays and repetitions without a bound may
    continue until `max_tokens`, where the answer is cut off: set `maxLength`, `maxItems` or `{1,20}` where it matters.

    Attributes:
        kind: `json`, `json_schema`, `regex`, `choice` or `lark`.
        text: the JSON schema (`json`, `json_schema`), regular expression (`regex`, `choice`) or grammar (`lark`); at
            most 1 MB, or 32 KiB of `regex` and `lark`.

    Raises:
        ParameterError: the kind is unknown, or the text is empty, too long or not a string.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ParameterError(f"constraint: unknown kind {reprlib.repr(self.kind)}; use one of {', '.join(KINDS)}")
        if not isinstance(self.text, str) or not self.text:
            raise refused_constraint(self.kind, f"{reprlib.repr(self.text)} is not a non-empty string")
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as e:
            raise refused_constraint(self.kind, "the text contains a lone surrogate, which is not a character") from e
        limit = MAX_PATTERN_BYTES if self.kind in ("regex", "lark") else MAX_BYTES
        if size > limit:
            raise refused_constraint(self.kind, f"{size:,} bytes exceed the limit of {limit:,}: shorten it")

    @staticmethod
    def json() -> Constraint:
        """Any JSON object."""
        return Constraint("json", '{"type":"object"}')

    @staticmethod
    def json_schema(schema: Mapping[str, object] | bool | str, unchecked: Sequence[str] = ()) -> Constraint:
        """JSON that conforms to a schema (or the JSON text of one); keys come in the order of `properties`.

        Args:
            schema: drafts 4 to 2020-12. A `format` that cannot be enforced is an annotation, as in the specification.
            unchecked: keywords that answers are not held to, such as `("uniqueItems",)`, because they cannot be
                enforced and the caller checks them; of `oneOf` several schemas may then match.
        """
        from llm_edge.runtime.sampling.json_schema.keywords import without_keywords

        try:
            value = json.loads(schema, object_pairs_hook=_unique) if isinstance(schema, str) else schema
            value = {} if value is True else dict(value) if isinstance(value, Mapping) else value
            value = without_keywords(value, unchecked) if unchecked else value
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except RecursionError as e:
            raise refused_constraint("json_schema", "nested too deeply") from e
        except (TypeError, ValueError) as e:
            raise refused_constraint("json_schema", f"not JSON: {e}") from e
        if not isinstance(value, dict):
            raise refused_constraint("json_schema", f"{reprlib.repr(value)} is not a schema, give a JSON object")
        return Constraint("json_schema", text)

    @staticmethod
    def regex(pattern: str) -> Constraint:
        """Text that a regular expression matches as a whole, in the syntax of Rust's regex crate.

        `\\d` and `\\w` match all Unicode digits and letters; `^`, `$` and look-around are not supported.
        """
        return Constraint("regex", pattern)

    @staticmethod
    def lark(grammar: str) -> Constraint:
        """Text of a context-free grammar in llguidance's variant of Lark (docs/syntax.md of llguidance)."""
        return Constraint("lark", grammar)

    @staticmethod
    def choice(options: Sequence[str]) -> Constraint:
        """One of several distinct, non-empty strings."""
        valid = isinstance(options, list | tuple) and all(isinstance(option, str) and option for option in options)
        if not valid or not options or len(set(options)) < len(options):
            raise refused_constraint("choice", f"{reprlib.repr(options)} is not a list of distinct non-empty strings")
        # A regular expression is a single lexeme of any size; one lexeme per option would soon hit llguidance's limits.
        return Constraint("choice", f"(?:{'|'.join(map(literal_pattern, options))})")

    def check(self) -> None:
        """Check, without a model, that answers can be held to this; takes 1 ms to several seconds.

        Raises:
            ParameterError: they cannot; the message says why.
        """
        from llm_edge.runtime.sampling.grammar import check_constraint

        check_constraint(self)


def refused_constraint(kind: str, reason: str) -> ParameterError:
    """The error for a constraint that cannot be used."""
    return ParameterError(f"constraint ({kind}): {reason}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; of a key given twice, readers take different ones."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {reprlib.repr(key)} is given twice")
    return found


def literal_pattern(text: str) -> str:
    """A regular expression that matches exactly this text: every special character is written as its code point."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)
