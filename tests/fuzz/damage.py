"""Random damage to files and to JSON values."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mutate import mutations

NUMBERS = (0, -1, 1, 2, 3, 7, 255, 65_536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, -(2**63), 2**64, 10**400)
NUMBERS_WITH_FRACTIONS = (0.0, -0.5, 0.1, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", " ", "x", "../x", "/etc/passwd", "\0", "\n", "a\u2028b", "\x1b[31m", "\ud83d", "é" * 300, "x" * 100_000)
TEXTS += ("llama", "auto", "null", "true", "-1", "1e999", "{{ 1/0 }}", "%n%s%x", "<|im_end|>", "model.safetensors")


def odd_value(rng: random.Random) -> Any:
    """A JSON value that a reader may not expect."""
    nested: Any = rng.choice((1, [], {}))
    for _ in range(rng.choice((1, 3, 200, 20_000))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    many = rng.choice(([0] * 100_000, {str(i): i for i in range(100_000)}, [[]] * 1000, ["x"] * 1000))
    others = (None, True, False, [], {}, [None], {"a": None}, [1, "a", None], nested, many)
    group = rng.choice((NUMBERS, NUMBERS_WITH_FRACTIONS, TEXTS, others))
    return rng.choice(group)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        items = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
        for key, inner in items:
            found.append((each, key))
            waiting.append(inner)
    return found


def change_value(value: Any, rng: random.Random) -> str:
    """Change something in a JSON object or array; returns what."""
    everywhere = places(value)
    if not everywhere:
        return "nothing"
    top = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    container, key = rng.choice(top if rng.random() < 0.5 else everywhere)
    old = container[key]
    how = rng.choice(("replace", "replace", "replace", "remove", "near", "swap", "repeat"))
    if how == "remove":
        del container[key]
    elif how == "near" and isinstance(old, int | float):
        container[key] = rng.choice((old + 1, old - 1, -old, old * 2, old // 2 if old == old else 0, old + 0.5))
    elif how == "near" and isinstance(old, str) and old:
        at = rng.randrange(len(old))
        container[key] = old[:at] + rng.choice(("", "x", "\n", "{", '"', "\u00e9")) + old[at + 1 :]
    elif how == "swap":
        other, name = rng.choice(everywhere)
        if name in other if isinstance(other, dict) else name < len(other):
            container[key] = json.loads(json.dumps(other[name]))
    elif how == "repeat" and isinstance(old, list | str):
        container[key] = old * rng.choice((2, 3, 100))
    else:
        container[key] = odd_value(rng)
    return f"{how} {str(key)[:40]!r}"


def dump(value: Any) -> bytes:
    """JSON that may have numbers and nesting that readers refuse."""
    try:
        return json.dumps(value).encode()
    except (RecursionError, ValueError):  # ValueError: too long an integer
        depth = 20_000
        return b'{"a":' * depth + b"1" + b"}" * depth


def damage_json(path: Path, rng: random.Random) -> str:
    """Change one to three values of a JSON file; returns what."""
    value = json.loads(path.read_bytes())
    done = [change_value(value, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    path.write_bytes(dump(value))
    return f"{path.name}: {', '.join(done)}"


def damage_bytes(path: Path, rng: random.Random, headers: tuple[range, ...] = ()) -> str:
    """Flip bits, cut, or change integers of a file; returns what."""
    content = path.read_bytes()
    (damaged,) = mutations(content, 1, rng.getrandbits(32), headers)
    path.write_bytes(damaged)
    first = next((at for at, (a, b) in enumerate(zip(content, damaged, strict=False)) if a != b), len(damaged))
    return f"{path.name}: {len(content)} to {len(damaged)} bytes, damaged from byte {first}"


def flip(path: Path, rng: random.Random) -> str:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{path.name}: bit flipped in byte {at}"


def cut(path: Path, rng: random.Random) -> str:
    """Truncate a file."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])
    return f"{path.name}: cut from {len(content)} to {path.stat().st_size} bytes"
