"""Where answers sit: near each other, whatever earlier answers left and where they left it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from llm_edge.runtime.scheduling.slots import MAX_GAP, SlotManager, spans


class FakeBatch:
    """Rows that hold their own tokens in place of keys and values."""

    token_bytes = 10

    def __init__(self, rows: int) -> None:
        self.slots = rows
        self.lengths = [0] * rows
        self.held: list[list[int]] = [[] for _ in range(rows)]
        self.copied = 0

    def copy(self, source: int, target: int, length: int) -> None:
        self.held[target] = self.held[source][:length]
        self.lengths[target] = length
        self.copied += length

    def release(self, row: int) -> None:
        self.held[row], self.lengths[row] = [], 0


def text(number: int, length: int = 100) -> list[int]:
    return [number * 1000 + place for place in range(length)]


def sit(rows: SlotManager, batch: FakeBatch, prompt: Sequence[int]) -> int:
    """Take a row for a prompt and compute what it lacks; what the row says it has must be there."""
    tokens = list(prompt)
    source, length = rows.longest_prefix(tokens)
    row = rows.assign(tokens, source, length)
    assert batch.lengths[row] == length
    assert batch.held[row][:length] == tokens[:length]
    batch.held[row], batch.lengths[row] = tokens, len(tokens)
    return row


@pytest.fixture
def batch() -> FakeBatch:
    return FakeBatch(32)


def made(batch: FakeBatch, budget: int = 10**9) -> SlotManager:
    return SlotManager(batch, budget)  # type: ignore[arg-type]


def test_one_conversation_stays_in_its_row(batch: FakeBatch) -> None:
    rows = made(batch)
    first = sit(rows, batch, text(1))
    rows.release(first)
    assert sit(rows, batch, [*text(1), 7, 8]) == first
    assert (batch.copied, rows.evictions) == (0, 0)


def test_answers_come_together_however_far_apart_their_beginnings_lie(batch: FakeBatch) -> None:
    rows = made(batch)
    for row in [sit(rows, batch, text(number)) for number in range(32)]:
        rows.release(row)
    places = [sit(rows, batch, [*text(number), 7]) for number in (0, 30, 15, 22)]
    assert len(spans(places)) == 1
    assert rows.longest_prefix(text(29))[1] >= 100  # what made room for them has moved, not gone
    assert rows.evictions <= 3


def test_a_beginning_that_many_share_is_copied_and_stays(batch: FakeBatch) -> None:
    rows = made(batch)
    system = text(1, 60)
    rows.release(sit(rows, batch, [*system, *text(2, 100)]))
    for number in range(3, 8):
        assert rows.longest_prefix([*system, *text(number)])[1] == 60
        sit(rows, batch, [*system, *text(number)])
    assert rows.longest_prefix([*system, *text(2, 100)])[1] == 160


def test_whatever_comes_and_goes_rows_hold_what_they_say_and_answers_are_near(batch: FakeBatch) -> None:
    rows, order = made(batch, budget=12_000), random.Random(1)
    conversations = {number: text(number, order.randrange(20, 200)) for number in range(40)}
    active: dict[int, int] = {}
    for _ in range(3000):
        if active and (len(active) == 8 or order.random() < 0.5):
            number = order.choice(list(active))
            rows.release(active.pop(number), keep=order.random() < 0.9)
            continue
        number = order.choice([each for each in conversations if each not in active])
        conversations[number] = [*conversations[number], order.randrange(10**6)][-250:]
        active[number] = sit(rows, batch, conversations[number])
        assert len(set(active.values())) == len(active)
        assert rows.cached_tokens * batch.token_bytes <= 12_000
    assert max(active.values()) - min(active.values()) < 8 * (MAX_GAP + 1)


def test_spans() -> None:
    assert spans([]) == []
    assert spans([9, 0, 1]) == [range(2), range(9, 10)]
    assert spans([0, MAX_GAP + 1]) == [range(MAX_GAP + 2)]
    assert spans([0, MAX_GAP + 2]) == [range(1), range(MAX_GAP + 2, MAX_GAP + 3)]
