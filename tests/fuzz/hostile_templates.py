"""Bundles with hostile chat templates: random Jinja programs that are costly, endless, large or not allowed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from damaged_bundles import ask, copy, correct_manifest
from jinja2.filters import FILTERS
from jinja2.tests import TESTS
from sandbox import Command

METHODS = tuple(name for kind in (str, dict, list) for name in dir(kind))
ATTRIBUTES = ("__class__", "__mro__", "__globals__", "__init__", "mro", "_x", "role", "content", "x", "append")
SIZES = ("0", "3", "100", "9999", "10000", "99999", "1000000", "10**9", "2**62", "-5", "10**4000")
FORMATS = (
    "%s",
    "%9999d",
    "%999999999d",
    "%*d",
    "{0:>9999}",
    "{:>999999999}",
    "{0.__class__}",
    "{x[y]}",
    "{!r}",
    "%(a)s",
)
FORMATS += ("{:{}}", "%c", "%.99999f", "{0!a:^9999}", "%", "{", "{:%Y}")
SYNTAX = ("%}", "{{", "{%", "endfor", "'", "|", "(", "~", "not", "is", "in", "-", "**", "[", "\\", "\u2028", "#}")


class Writer:
    """Writes random expressions and statements, nested only so deep."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def expression(self, depth: int = 0) -> str:
        rng, deeper = self.rng, lambda: self.expression(depth + 1)
        if depth > 3 or rng.random() < 0.15:
            return rng.choice((*self.atoms(), rng.choice(SIZES), f"'{rng.choice(FORMATS)}'"))
        kinds: tuple[Callable[[], str], ...] = (
            lambda: f"({deeper()}|{rng.choice(list(FILTERS))}{self.arguments(depth)})",
            lambda: f"({deeper()}|{rng.choice(list(FILTERS))}|{rng.choice(list(FILTERS))})",
            lambda: f"({deeper()}.{rng.choice(METHODS)}{self.arguments(depth) or '()'})",
            lambda: f"({deeper()}).{rng.choice(ATTRIBUTES)}",
            lambda: f"({deeper()} {rng.choice(('+', '-', '*', '/', '//', '%', '**', '~', 'and', 'or'))} {deeper()})",
            lambda: f"({deeper()} {rng.choice(('==', '<', 'in', 'not in', '>='))} {deeper()})",
            lambda: f"({deeper()} is {rng.choice(list(TESTS))}{self.arguments(depth)})",
            lambda: f"({deeper()})[{rng.choice((':', '::-1', '1:', rng.choice(SIZES), deeper()))}]",
            lambda: f"[{', '.join(deeper() for _ in range(rng.randrange(4)))}]",
            lambda: f"{{{deeper()}: {deeper()}}}",
            lambda: f"range({rng.choice(SIZES)})",
            lambda: f"({deeper()} if {deeper()} else {deeper()})",
            lambda: f"'{rng.choice(FORMATS)}'.format({deeper()}, {deeper()})",
            lambda: f"('{rng.choice(FORMATS)}' % ({deeper()},))",
            lambda: f"(({deeper()})|tojson(indent={rng.choice(SIZES)}))",
            lambda: f"strftime_now({deeper()})",
            lambda: f"m({deeper()})",
            lambda: f"namespace(a={deeper()}).a",
        )
        return rng.choice(kinds)()

    def atoms(self) -> tuple[str, ...]:
        return ("messages", "messages[0].content", "'a'", "x", "ns.x", "loop", "loop.index", "bos_token", "none", "ns")

    def arguments(self, depth: int) -> str:
        count = self.rng.choice((0, 0, 1, 1, 2, 3))
        return f"({', '.join(self.expression(depth + 1) for _ in range(count))})" if count else ""

    def statement(self, depth: int = 0) -> str:
        rng, inner = self.rng, lambda: self.statement(depth + 1)
        if depth > 3:
            return f"{{{{ {self.expression(2)} }}}}"
        size = rng.choice(SIZES)
        kinds: tuple[Callable[[], str], ...] = (
            lambda: f"{{{{ {self.expression()} }}}}",
            lambda: f"{{{{ {self.expression()} }}}}",
            lambda: f"{{% for x in {self.expression(1)} %}}{inner()}{{% endfor %}}",
            lambda: f"{{% for x in range({size}) %}}{inner()}{{% endfor %}}",
            lambda: (
                f"{{% for x in range({size}) %}}{{% for y in range({size}) %}}{inner()}{{% endfor %}}{{% endfor %}}"
            ),
            lambda: (
                f"{{% for x in range(99) %}}{{% set ns.x = ns.x {rng.choice('~+*')} ns.x %}}{{% endfor %}}{inner()}"
            ),
            lambda: f"{{% for x in range(20) %}}{{% set ns.x = [ns.x, ns.x] %}}{{% endfor %}}{inner()}",
            lambda: f"{{% for x in [[1]] recursive %}}{inner()}{{{{ loop([x]) }}}}{{% endfor %}}",
            lambda: f"{{% macro m(a) %}}{inner()}{{{{ m(a) }}}}{{% endmacro %}}{{{{ m(1) }}}}",
            lambda: f"{{% macro m(a) %}}{{{{ m(a) }}}}{{{{ m(a) }}}}{{% endmacro %}}{{{{ m({self.expression(1)}) }}}}",
            lambda: f"{{% set x = {self.expression()} %}}{inner()}",
            lambda: f"{{% set x %}}{inner()}{{% endset %}}{{{{ x * {size} }}}}",
            lambda: f"{{% set ns.x = {self.expression()} %}}{inner()}",
            lambda: f"{{% if {self.expression()} %}}{inner()}{{% else %}}{inner()}{{% endif %}}",
            lambda: f"{{% call m({self.expression(1)}) %}}{inner()}{{% endcall %}}",
            lambda: f"{{% filter {rng.choice(list(FILTERS))} %}}{inner()}{{% endfilter %}}",
            lambda: f"{{{{ raise_exception({self.expression()}) }}}}",
            lambda: f"{{% generation %}}{inner()}{{% endgeneration %}}",
            lambda: f"{{% include {self.expression(2)} %}}{{% import 'os' as os %}}",
            lambda: f"{{% with x = {self.expression()} %}}{inner()}{{% endwith %}}{inner()}",
        )
        return rng.choice(kinds)()


def costly(rng: random.Random) -> str:
    """A filter or method applied to a large value, many times."""
    value = rng.choice(
        (
            "(messages[0].content * 100000)",
            "('ab ' * 500000)", "('&<' * 900000)", "range(100000)", "(range(99999)|list)",
            "('é\\n' * 300000)", "([[1, 'a']] * 30000)", "(['b', 'a'] * 50000)", "(('a' * 1000 + ' ') * 1000)",
            "[messages] * 9999", "('9' * 4000)", "(' ' * 1000000 + 'x')", "({'a': 'b' * 99999})",
        )
    )  # fmt: skip
    writer = Writer(rng)
    name = rng.choice(list(FILTERS))
    other = rng.choice(list(FILTERS))
    done = rng.choice(
        (
            f"{value}|{name}",
            f"{value}|{name}|{other}|list",
            f"{value}|{name}{writer.arguments(2)}",
            f"{value}|map('{name}')|{other}",
            f"{value}|select('{rng.choice(list(TESTS))}')|list",
            f"{value}.{rng.choice(METHODS)}()",
            f"{value}.{rng.choice(METHODS)}('a', 'bb' * 5000)",
            f"{value} in {value}",
            f"{value} == {value}",
            f"{value} is {rng.choice(list(TESTS))}",
            f"{value}[::-1] ~ {value}",
        )
    )
    times = rng.choice(("1", "50", "100000"))
    return f"{{% for x in range({times}) %}}{{% set y = {done} %}}{{% endfor %}}{{{{ y }}}}"


def program(rng: random.Random) -> str:
    """Several random statements."""
    writer = Writer(rng)
    return "{% set ns = namespace(x='ab') %}" + "".join(writer.statement() for _ in range(rng.choice((1, 2, 5))))


def edited(rng: random.Random, original: str) -> str:
    """The original template with pieces of syntax inserted, removed or repeated."""
    for _ in range(rng.choice((1, 2, 5))):
        at, to = sorted(rng.randrange(len(original) + 1) for _ in range(2))
        original = rng.choice(
            (
                original[:at] + rng.choice(SYNTAX) + original[at:],
                original[:at] + original[to:],
                original[:at] + original[at:to] * 3 + original[to:],
            )
        )
    return original


def large(rng: random.Random) -> str:
    """A template that is long or nested deeply."""
    count = rng.choice((100, 5000, 100_000))
    parts = rng.choice(
        (
            ("(", "1", ")"), ("[", "", "]"), ("-", "1", ""), ("not ", "1", ""), ("1+", "1", ""), ("x.", "y", ""),
            ("'a'~", "'b'", ""), ("x|e|", "e", ""), ("{'a':", "1", "}"), ("f(", "", ")"), ("1 if x else ", "2", ""),
        )
    )  # fmt: skip
    nested = "{{ " + parts[0] * count + parts[1] + parts[2] * count + " }}"
    blocks = "{% if 1 %}" * count + "{% endif %}" * count
    return rng.choice((nested, nested, blocks, "{{ 1 }}" * count, "x" * (count * 20), "{# " * count))


def make(originals: Path, folder: Path, number: int, rng: random.Random) -> Command:
    """A bundle with a hostile chat template."""
    bundle = copy(originals, folder)
    path = bundle / "chat_template.jinja"
    original = path.read_text(encoding="utf-8")
    kinds: tuple[Callable[[], str], ...] = (
        lambda: program(rng), lambda: costly(rng), lambda: program(rng), lambda: costly(rng),
        lambda: edited(rng, original), lambda: large(rng),
    )  # fmt: skip
    template = kinds[number % len(kinds)]()
    path.write_text(template, encoding="utf-8", errors="surrogatepass")
    correct_manifest(bundle, path.name)
    what = json.dumps(template[:200])
    return ask(what, *rng.choice(((), (), ("--system", "<|im_start|>a" * 200))))
