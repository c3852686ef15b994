"""`print_report` and `print_row`: what `llm-finetune check` shows of a data file."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

from rich.console import Console
from rich.text import Text

from llm_edge.finetune.data.load import DataFile, EncodedRow
from llm_edge.finetune.data.problems import counted, ranges
from llm_edge.finetune.data.sample import Sample
from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.text.tokenizer import Tokenizer

_BAR = 40  # characters of the longest bar
_MAX_GROUPS = 100  # repeated rows that are listed


def print_report(file: DataFile, max_length: int, console: Console) -> None:
    """Print problems and duplicates by line, and a histogram of the lengths in tokens."""
    rows, copies = file.rows, file.copies
    total = len(rows) + len(file.problems)
    _print(console, f"{file.path}: {counted(total, 'row')}")
    _print(console, f"{counted(len(file.problems), 'problem')}{':' if file.problems else ''}")
    for problem in file.problems:
        _print(console, f"  line {problem.line}: {problem.reason}")
    _print(console, f"{counted(len(copies), 'duplicate')}{':' if copies else ''}")
    groups: dict[int, list[int]] = {}
    for line, first in copies:
        groups.setdefault(first, []).append(line)
    for first, lines in itertools.islice(groups.items(), _MAX_GROUPS):
        _print(console, f"  line {first} again: {'line' if len(lines) == 1 else 'lines'} {ranges(lines)}")
    if len(groups) > _MAX_GROUPS:
        _print(console, f"  and {counted(len(groups) - _MAX_GROUPS, 'further row')} with duplicates")
    if cut := sum(row.cut for row in rows):
        _print(console, f"{cut:,} cut after the last answer within {max_length:,} tokens")
    if skipped := sum(not row.samples for row in rows):
        _print(console, f"{skipped:,} skipped, because they have more than {max_length:,} tokens")
    if any(row.samples for row in rows):
        _print_lengths(rows, console)


def print_row(file: DataFile, line: int, tokenizer: Tokenizer, console: Console) -> None:
    """Print the samples of a row: in a terminal trained tokens are green, elsewhere each part has a heading.

    Raises:
        ParameterError: the file has no row there.
    """
    row = next((row for row in file.rows if row.line == line), None)
    if row is None:
        reason = next((problem.reason for problem in file.problems if problem.line == line), "no row there")
        raise ParameterError(f"{file.path}: line {line}: {reason}")
    if not row.samples:
        _print(console, f"line {line}: skipped, because it is too long")
    for number, sample in enumerate(row.samples, 1):
        heading = f"line {line}, sample {number} of {len(row.samples)}: "
        _print(console, f"{heading}{counted(len(sample.ids), 'token')}, {sample.targets:,} of them trained")
        for text, trained in _runs(sample, tokenizer):
            if console.color_system is not None:
                console.print(Text(text, style="green" if trained else "dim"), end="", soft_wrap=True)
            else:
                _print(console, f"--- {'trained' if trained else 'not trained'}\n{text}")
        if console.color_system is not None:
            console.print()


def _runs(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of consecutive tokens that are trained or not, special tokens included."""
    groups = itertools.groupby(zip(sample.ids, sample.trained, strict=True), key=lambda pair: pair[1])
    return [
        (_visible(tokenizer.decode([token for token, _ in pairs], skip_special=False)), trained)
        for trained, pairs in groups
    ]


def _print_lengths(rows: tuple[EncodedRow, ...], console: Console) -> None:
    lengths = [max(len(sample.ids) for sample in row.samples) for row in rows if row.samples]
    samples = [sample for row in rows for sample in row.samples]
    tokens, targets = sum(len(sample.ids) for sample in samples), sum(sample.targets for sample in samples)
    _print(console, f"{counted(len(samples), 'sample')}, {tokens:,} tokens, {targets:,} of them trained")
    _print(console, f"Tokens of a conversation (median {statistics.median_low(lengths):,}, maximum {max(lengths):,}):")
    counts = Counter((length - 1).bit_length() for length in lengths)
    for bits in range(min(counts), max(counts) + 1):
        low, high = (1 << bits) // 2 + 1, 1 << bits
        bar = "█" * -(-_BAR * counts[bits] // max(counts.values()))
        _print(console, f"  {low:>6,} to {high:>6,}  {counts[bits]:>7,}  {bar}".rstrip())


def _visible(text: str) -> str:
    """Text of a data file, with control characters escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _print(console: Console, text: str) -> None:
    console.print(Text(_visible(text)), soft_wrap=True)
