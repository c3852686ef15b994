"""`load_samples`: reads a data file completely and splits it into samples for training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_edge.finetune.data.encoding import ConversationEncoder
from llm_edge.finetune.data.options import DataOptions, LongConversations
from llm_edge.finetune.data.problems import Problem, RowError, summarize
from llm_edge.finetune.data.rows import read_rows
from llm_edge.finetune.data.sample import Dataset, Sample
from llm_edge.finetune.data.split import choose_evaluation
from llm_edge.finetune.status_line import StatusLine
from llm_edge.runtime.errors import InputError

_AS_TEXT = "The model has no delimiters of reasoning: reasoning is trained as text between <think> and </think>."


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row of a data file that could be read.

    Attributes:
        line: line of the file, from 1.
        key: `Conversation.key`.
        samples: of the conversation; empty if it is left out because it is too long.
        cut: answers were left out because they are too long.
        reasoning_as_text: see `Encoded`.
    """

    line: int
    key: bytes
    samples: tuple[Sample, ...]
    cut: bool
    reasoning_as_text: bool


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file that was read completely.

    Attributes:
        path: the file.
        rows: those that can be used.
        problems: those that cannot, in the order of the file.
    """

    path: Path
    rows: tuple[EncodedRow, ...]
    problems: tuple[Problem, ...]

    @property
    def copies(self) -> list[tuple[int, int]]:
        """Lines of rows that repeat an earlier one, with the line of the earlier one."""
        first: dict[bytes, int] = {}
        return [(row.line, first[row.key]) for row in self.rows if first.setdefault(row.key, row.line) != row.line]

    def check(self) -> None:
        """Raise InputError if there are problems or no conversations."""
        if self.problems:
            raise InputError(summarize(self.path, self.problems, len(self.rows) + len(self.problems)))
        if not self.rows:
            raise InputError(f"{self.path} has no rows: give one conversation per line")


def read_data(path: Path, encoder: ConversationEncoder, long: LongConversations) -> DataFile:
    """Read and encode every row of a file, and show progress on stderr.

    Raises:
        InputError: the file cannot be read.
    """
    rows: list[EncodedRow] = []
    problems: list[Problem] = []
    status = StatusLine()
    for row in read_rows(path):
        status.update(f"reading {path.name}: {len(rows) + len(problems):,} rows")
        if isinstance(row, Problem):
            problems.append(row)
            continue
        line, conversation = row
        try:
            encoded, key = encoder.encode(conversation, line), conversation.key()
        except RowError as error:
            problems.append(Problem(line, str(error)))
            continue
        except RecursionError:
            problems.append(Problem(line, "JSON nested too deeply"))
            continue
        samples = encoded.samples if encoded.complete or long is LongConversations.CUT else ()
        rows.append(EncodedRow(line, key, samples, bool(samples) and not encoded.complete, encoded.reasoning_as_text))
    status.clear()
    return DataFile(path, tuple(rows), tuple(problems))


def load_samples(data: Path, encoder: ConversationEncoder, options: DataOptions) -> Dataset:
    """Read a data file.

    Args:
        data: JSONL file, one conversation per line; see `formats.py`.
        encoder: of the model to be trained.
        options: see `DataOptions`.

    Raises:
        InputError: the file cannot be read, rows cannot be used (the message names the lines), or nothing is left.
    """
    file = read_data(data, encoder, options.long)
    file.check()
    other = None
    if options.evaluation_data is not None:
        other = read_data(options.evaluation_data, encoder, options.long)
        other.check()
        kept = frozenset(row.key for row in other.rows)
    else:
        usable = (row.key for row in file.rows if row.samples)
        kept = choose_evaluation(usable, options.evaluation, options.split_seed)
    train = [row for row in file.rows if row.key not in kept]
    evaluation: dict[bytes, EncodedRow] = {}
    for row in (other or file).rows:
        if row.key in kept:
            evaluation.setdefault(row.key, row)
    dataset = Dataset(
        train=tuple(sample for row in train for sample in row.samples),
        evaluation=tuple(sample for row in evaluation.values() for sample in row.samples),
        conversations=len(file.rows),
        duplicates=len(file.copies),
        cut=sum(row.cut for row in file.rows),
        skipped=sum(not row.samples for row in file.rows),
        notes=_notes(file, other, kept),
    )
    if not dataset.train:
        shared = sum(row.key in kept for row in file.rows)
        raise InputError(
            f"{data}: no conversation is left to train on ({dataset.skipped:,} of {dataset.conversations:,} have more "
            f"than {encoder.max_length:,} tokens, {shared:,} are for evaluation): raise --max-length, or add "
            "conversations"
        )
    return dataset


def _notes(file: DataFile, other: DataFile | None, kept: frozenset[bytes]) -> tuple[str, ...]:
    notes = []
    if any(row.reasoning_as_text for row in file.rows):
        notes.append(_AS_TEXT)
    if other is not None and (shared := sum(row.key in kept for row in file.rows)):
        notes.append(f"{shared:,} rows of {file.path} are not trained, because {other.path} has them too.")
    return tuple(notes)
