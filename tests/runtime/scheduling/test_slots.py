"""`SlotManager`: sequences reuse cached prefixes and are assigned to slots close to each other."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest

from llm_edge.runtime.scheduling.slots import MAX_GAP, SlotManager, spans


class FakeBatch:
    """Slots that store tokens instead of keys and values."""

    token_bytes = 10

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.lengths = [0] * slots
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.copied = 0

    def held_bytes(self, slots: Iterable[int]) -> int:
        return sum(self.lengths[slot] for slot in slots) * self.token_bytes

    def available(self, slot: int, length: int) -> int:
        return min(length, self.lengths[slot])

    def rewind(self, slot: int, length: int) -> int:
        self.lengths[slot] = length
        return length

    def settle(self, slot: int) -> None:
        pass

    def copy(self, source: int, target: int, length: int) -> None:
        self.held[target] = self.held[source][:length]
        self.lengths[target] = length
        self.copied += length

    def release(self, slot: int) -> None:
        self.held[slot], self.lengths[slot] = [], 0


def text(number: int, length: int = 100) -> list[int]:
    return [number * 1000 + place for place in range(length)]


def assign(manager: SlotManager, batch: FakeBatch, prompt: Sequence[int]) -> int:
    """Assign a slot to a prompt and compute the missing tokens; the slot must hold the prefix that it claims."""
    tokens = list(prompt)
    source, length = manager.longest_prefix(tokens)
    slot = manager.assign(tokens, source, length)
    assert batch.lengths[slot] == length
    assert batch.held[slot][:length] == tokens[:length]
    batch.held[slot], batch.lengths[slot] = tokens, len(tokens)
    return slot


@pytest.fixture
def batch() -> FakeBatch:
    return FakeBatch(32)


def make_manager(batch: FakeBatch, budget: int = 10**9) -> SlotManager:
    return SlotManager(batch, budget)  # type: ignore[arg-type]


def test_a_conversation_stays_in_its_slot(batch: FakeBatch) -> None:
    manager = make_manager(batch)
    first = assign(manager, batch, text(1))
    manager.release(first)
    assert assign(manager, batch, [*text(1), 7, 8]) == first
    assert (batch.copied, manager.evictions) == (0, 0)


def test_active_sequences_are_adjacent_even_if_their_cached_prefixes_are_not(batch: FakeBatch) -> None:
    manager = make_manager(batch)
    for slot in [assign(manager, batch, text(number)) for number in range(32)]:
        manager.release(slot)
    places = [assign(manager, batch, [*text(number), 7]) for number in (0, 30, 15, 22)]
    assert len(spans(places)) == 1
    assert manager.longest_prefix(text(29))[1] >= 100  # displaced sequences were moved, not evicted
    assert manager.evictions <= 3


def test_a_shared_prefix_is_copied_and_stays_cached(batch: FakeBatch) -> None:
    manager = make_manager(batch)
    system = text(1, 60)
    manager.release(assign(manager, batch, [*system, *text(2, 100)]))
    for number in range(3, 8):
        assert manager.longest_prefix([*system, *text(number)])[1] == 60
        assign(manager, batch, [*system, *text(number)])
    assert manager.longest_prefix([*system, *text(2, 100)])[1] == 160


def test_random_traffic_keeps_slots_consistent_and_active_sequences_close(batch: FakeBatch) -> None:
    manager, order = make_manager(batch, budget=12_000), random.Random(1)
    conversations = {number: text(number, order.randrange(20, 200)) for number in range(40)}
    active: dict[int, int] = {}
    for _ in range(3000):
        if active and (len(active) == 8 or order.random() < 0.5):
            number = order.choice(list(active))
            manager.release(active.pop(number), keep=order.random() < 0.9)
            continue
        number = order.choice([each for each in conversations if each not in active])
        conversations[number] = [*conversations[number], order.randrange(10**6)][-250:]
        active[number] = assign(manager, batch, conversations[number])
        assert len(set(active.values())) == len(active)
        assert manager.cached_tokens * batch.token_bytes <= 12_000
    assert max(active.values()) - min(active.values()) < 8 * (MAX_GAP + 1)


def test_spans_merge_across_small_gaps() -> None:
    assert spans([]) == []
    assert spans([9, 0, 1]) == [range(2), range(9, 10)]
    assert spans([0, MAX_GAP + 1]) == [range(MAX_GAP + 2)]
    assert spans([0, MAX_GAP + 2]) == [range(1), range(MAX_GAP + 2, MAX_GAP + 3)]
