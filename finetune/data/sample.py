"""`Sample` and `Dataset`: what training reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of a conversation, or of its beginning, with the answers to be learned.

    Attributes:
        ids: token ids, each answer with its end token.
        trained: for each id, whether it is a target of the loss; as long as `ids`, its first value is False.
        line: line of the data file, from 1.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    line: int

    @property
    def targets(self) -> int:
        """Number of ids that are targets of the loss; at least one."""
        return sum(self.trained)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the last answer that is trained, as the runtime would feed them."""
        return self.ids[: self._start()]

    @property
    def answer(self) -> tuple[int, ...]:
        """The ids of the last answer that is trained, with its end token."""
        return self.ids[self._start() :]

    def _start(self) -> int:
        """Position of the first id of the last run of trained ids; a sample ends with a trained id."""
        start = len(self.ids)
        while start > 0 and self.trained[start - 1]:
            start -= 1
        return start


@dataclass(frozen=True, slots=True)
class Dataset:
    """The samples of a data file. No conversation is in both parts.

    Attributes:
        train: samples to train on, in the order of the file.
        evaluation: samples of the conversations kept for evaluation, each conversation once; may be empty.
        conversations: number of rows in the file.
        duplicates: number of rows that repeat an earlier one.
        cut: number of conversations that lost turns because they were too long.
        skipped: number of conversations left out because they were too long.
        notes: what a user should know about the data, one sentence each.
    """

    train: tuple[Sample, ...]
    evaluation: tuple[Sample, ...]
    conversations: int
    duplicates: int
    cut: int
    skipped: int
    notes: tuple[str, ...] = ()
