"""`check_patterns`: rejects regular expressions of tokenizers that can take very long.

The `tokenizers` library matches by backtracking. Patterns of well-known models are accepted. In others, a repeated
group must not contain a choice or another repetition (the time would be exponential), and they are tried on difficult
texts in a separate process with limits on its time and memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_edge.runtime.safe_io import MIB
from llm_edge.runtime.text.known_patterns import KNOWN

_SECONDS = 2.0
_MAX_MEMORY = 256 * MIB  # that the trial of patterns may reserve
_MAX_PATTERN = 4096  # characters
_MAX_REPETITIONS = 8  # of variable length, in a row
_MAX_DIGITS = 3  # of the number of repetitions
_REPEATS = 2000  # characters of a text that patterns are tried on; the time may be quadratic in it, but not cubic

_ATOM = re.compile(r"\\[pP]\{\^?\w+\}|\\x\{[0-9A-Fa-f]+\}|\\.|\[|\(\?[imsx-]*:|\(\?<?[=!]|\(\?>|\(|\)|\||.", re.DOTALL)
_QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(?:(,)(\d*))?\}")
_UNSUPPORTED = re.compile(r"\\[1-9kgKRX]|\(\?[^:imsx=!<>-]|\(\?<[^=!]|\(\*")


def check_patterns(patterns: Sequence[str]) -> str | None:
    """Why one of the patterns cannot be used; None if all can."""
    unknown = [pattern for pattern in patterns if pattern not in KNOWN]
    for pattern in unknown:
        if len(pattern) > _MAX_PATTERN or _UNSUPPORTED.search(pattern) or _can_explode(pattern):
            return f"the pattern {_short(pattern)} can take very long"
    return _try_patterns(unknown) if unknown else None


def _short(pattern: str) -> str:
    shown = ascii(pattern[:60])
    return shown if len(pattern) <= 60 else f"{shown}..."


def _can_explode(pattern: str) -> bool:
    """Whether a repeated group contains a choice or a repetition, or too many repetitions follow each other."""
    groups: list[bool] = [False]  # whether each open group contains a choice or a repetition
    at = repetitions = 0
    while at < len(pattern):
        atom = _ATOM.match(pattern, at)
        assert atom is not None
        at, varies = atom.end(), False
        if atom[0].startswith("("):
            groups.append(False)
            continue
        if atom[0] == ")":
            if len(groups) == 1:  # it was not opened
                return True
            varies = groups.pop()
        elif atom[0] == "[":
            at = _end_of_class(pattern, at)
        elif atom[0] == "|":
            groups[-1] = True
            repetitions = repetitions if len(groups) > 1 else 0
        quantifier = _QUANTIFIER.match(pattern, at)
        if quantifier is not None:
            at = quantifier.end()
            at += pattern[at : at + 1] in ("?", "+")  # lazy or possessive
            low, comma, high = quantifier.groups()
            if max(len(low or ""), len(high or "")) > _MAX_DIGITS or (varies and quantifier[0] != "?"):
                return True
            if comma or low is None:
                varies, repetitions = True, repetitions + 1
        groups[-1] |= varies
        if repetitions > _MAX_REPETITIONS:
            return True
    return len(groups) != 1


def _end_of_class(pattern: str, at: int) -> int:
    """The position after a character class whose content starts at `at`; classes may be nested."""
    depth, first = 1, True
    while at < len(pattern) and depth:
        char = pattern[at]
        if char == "\\":
            at += 1
        elif char == "[":
            depth += 1
        elif char == "]" and not first:
            depth -= 1
        first = char in "[^" and (first or char == "[")
        at += 1
    return at


def _try_patterns(patterns: Sequence[str]) -> str | None:
    """Why one of the patterns cannot be used, as found in a separate process."""
    command = [sys.executable, "-c", f"from {__name__} import try_all; try_all()"]
    try:
        done = subprocess.run(  # noqa: S603 (our own code)
            command, input=json.dumps(list(patterns)).encode(), capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the pattern {_short(patterns[0])} takes too long"
    return None if done.returncode == 0 else f"the pattern {_short(patterns[0])} cannot be used"


def try_all() -> None:
    """Split difficult texts with the patterns that standard input lists; an error or a panic ends the process."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    _limit_memory()
    for pattern in json.load(sys.stdin):
        split = Split(Regex(pattern), "isolated")
        for text in difficult_texts(pattern):
            split.pre_tokenize_str(text)


def _limit_memory() -> None:
    """Let this process reserve only so much more memory, where the system can limit it."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + _MAX_MEMORY
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    except (ImportError, OSError, ValueError):  # Windows and macOS
        return


def difficult_texts(pattern: str) -> list[str]:
    """Long runs of characters that a pattern mentions or may mean, each followed by one that ends the match."""
    plain = re.sub(r"\\[pP]\{\^?\w+\}|\\x\{[0-9A-Fa-f]+\}|\\[a-zA-Z]", "", pattern)
    chars = dict.fromkeys([*" a\n0!A'é中", *[char for char in plain if char not in r"\[](){}*+?|^$"]])
    mixed = "".join(chars)
    texts = [char * _REPEATS + end for char in list(chars)[:40] for end in ("", "!", "\n", "a", f"!{mixed}")]
    return [*texts, mixed * (_REPEATS // len(mixed) + 1), "ab" * _REPEATS, "a " * _REPEATS, " \n" * _REPEATS]
