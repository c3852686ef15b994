"""`Problem`: what is wrong with a row of a data file, and one message for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_LINES = 2000  # line numbers in a message


class RowError(Exception):
    """A row cannot be used; the message is the reason, the same for all rows with this fault."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used.

    Attributes:
        line: line of the file, from 1.
        reason: what is wrong, and what to do.
    """

    line: int
    reason: str


def summarize(path: Path, problems: Sequence[Problem], rows: int) -> str:
    """One message that names the lines with each fault, the first `MAX_LINES` of them."""
    lines: dict[str, list[int]] = {}
    for problem in problems[:MAX_LINES]:
        lines.setdefault(problem.reason, []).append(problem.line)
    parts = [
        f"{reason} ({'line' if len(numbers) == 1 else 'lines'} {ranges(numbers)})" for reason, numbers in lines.items()
    ]
    more = f"; and {len(problems) - MAX_LINES:,} more" if len(problems) > MAX_LINES else ""
    return f"{path}: {len(problems):,} of {rows:,} rows cannot be used: {'; '.join(parts)}{more}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, consecutive ones as a range: `1, 4-6`."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1] = spans[-1][0], number
        else:
            spans.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def counted(number: int, noun: str) -> str:
    """A number with its noun in the right form: `1 row`, `2 rows with duplicates`."""
    head, _, tail = noun.partition(" with ")
    plural = head if number == 1 else f"{head}s"
    return f"{number:,} {plural}{f' with {tail}' if tail else ''}"
