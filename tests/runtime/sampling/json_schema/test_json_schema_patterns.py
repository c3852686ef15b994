"""Patterns are enforced as JavaScript and Python read them, or refused with the reason."""

from __future__ import annotations

import json
import re

import pytest
from json_answers import answers

from llm_edge.runtime.errors import ParameterError


def texts(pattern: str, count: int = 15) -> list[str]:
    """Random answers of a string with a pattern."""
    schema = {"type": "string", "pattern": pattern, "maxLength": 12}
    return [json.loads(answer) for answer in answers(schema, count)]


SAME = [
    r"^a$",
    r"a",
    r"(^a|b$)",
    r"^(a|b)c",
    r"^[^a&]$",
    r"^[\w.-]+$",
    r"^\d\D\w\W\s\S$",
    r"^[\s\S]{3}$",
    r"^[^\D]$",
    r"^[^\W\d]$",
    r"^.$",
    r"^~a&b#$",
    r"^\-\"\\$",
    r"^\x41\u0042$",
    r"^a{2}b{1,}c{0,2}$",
    r"^a*?b+?c??$",
    r"^(?:a|b){2}$",
    r"^(?P<n>a)b$",
    r"^]}$",
    r"^\$\^\.\*$",
    r"^$",
    r"|a",
    r"^(?i:ab)$",
    r"(?i)^ab$",
    r"^[^\n\r]+$",
]
OTHERS = {  # in JavaScript's syntax, and in Python's
    "^[^a&&b]$": "^[^a&b]$",
    "^[+--]$": "^[+,-]$",
    "^[[]$": r"^\[$",
    r"^[\w-.]$": r"^[\w.-]$",
    r"^\/$": "^/$",
    r"^\ud83d\ude00\u{61}$": "^\U0001f600a$",
    r"^\t\n\r\f$": "^\t\n\r\f$",
    r"^\cJ$": "^\n$",
    "^(?<n>a)b$": "^ab$",
    r"\Aab\Z": "^ab$",
    "^a{b}$": r"^a\{b\}$",
}


@pytest.mark.parametrize(("pattern", "python"), [*((each, each) for each in SAME), *OTHERS.items()])
def test_answers_match_the_pattern_in_python(pattern: str, python: str) -> None:
    found = texts(pattern)
    assert found
    for text in found:
        assert re.search(python, text), text


LOOK_AHEADS = [
    r"^(?!a)[ab]{2}$",
    r"^(?=a)[ab]{2}$",
    r"^(?!ab)[ab]{2,4}$",
    r"^(?!ab$)[ab]{2,4}$",
    r"^(?!.*a)[abc]{3}$",
    r"^(?!.*ab)[abc]{3,6}$",
    r"^(?!.*aa)[ab]{2,6}$",
    r"^(?!\s*$).{2}",
    r"^(?!a|bb)(?=.*c)[abc]{3}$",
    r"^(?![ab]*$)[abc]+$",
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,4}|(?=[\d.]{1,7}0*$)\d{0,4}\.\d{0,2}0*$)",
]


@pytest.mark.parametrize("pattern", LOOK_AHEADS)
def test_leading_look_aheads_are_enforced(pattern: str) -> None:
    found = texts(pattern, 40)
    assert found
    for text in found:
        assert re.search(pattern, text), text


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "not closed"),
        (")", "not opened"),
        ("[a", "not closed"),
        ("[]", "empty"),
        ("[b-a]", "out of order"),
        ("a**", "nothing to repeat"),
        ("*", "nothing to repeat"),
        ("{,3}", "in JavaScript"),
        ("a{20000}", "more than 10,000 times"),
        (r"\bfoo", "not supported"),
        (r"(a)\1", "not supported"),
        (r"\q", "not supported"),
        ("\\", "not supported"),
        (r"\ud800", "surrogate"),
        ("(?<=a)b", "look-around"),
        ("a(?!b)", "look-around"),
        ("(?", "look-around"),
        ("^(?!(a|b)*c)", "look-ahead"),
        ("(?x)a b", "flag"),
        (r"\p{Nonsense}", "."),
    ],
)
def test_other_patterns_are_refused_in_one_line(pattern: str, reason: str) -> None:
    with pytest.raises(ParameterError, match=rf"^constraint \(json_schema\): [^\n]*{reason}[^\n]*$"):
        texts(pattern)
