"""`SlotManager`: assigns the slots of a batch to sequences, and keeps finished ones as a prefix cache.

A slot is assigned to one sequence at a time. What a finished sequence computed stays, so that a prompt with the same
prefix need not compute it again: in place if most of it can be reused, otherwise as a copy. The least recently used
goes first. With states a prefix can be reused at certain lengths only (`Batch.available`).

Active slots are kept close together, because a decode step covers adjacent slots: copying a prefix costs milliseconds
once, a separate step costs milliseconds for every token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.prefixes import common_prefix

MAX_GAP = 4  # idle slots that a decode step may span rather than run a second step
_REUSE_IN_PLACE = 0.5  # fraction of a slot's tokens that a prompt must share to take the slot over


class SlotManager:
    """The slots of a batch and the tokens in them.

    Args:
        batch: the slots.
        budget: maximum bytes of what idle slots hold.

    Attributes:
        evictions: how many times the tokens of an idle slot were dropped.
    """

    def __init__(self, batch: Batch, budget: int) -> None:
        self._batch = batch
        self._budget = budget
        self._tokens: list[Sequence[int]] = [[] for _ in range(batch.slots)]
        self._assigned: set[int] = set()
        self._last_used = [0] * batch.slots
        self._clock = 0
        self.evictions = 0

    @property
    def cached_tokens(self) -> int:
        """Number of tokens in idle slots."""
        return sum(self._batch.lengths[slot] for slot in self._idle())

    @property
    def cached_bytes(self) -> int:
        """Bytes of what idle slots hold."""
        return self._batch.held_bytes(self._idle())

    def longest_prefix(self, prompt: Sequence[int], limit: int | None = None) -> tuple[int, int]:
        """The slot with the longest prefix of a prompt that can be reused, and its length, at most `limit`."""
        found = []
        for slot in range(self._batch.slots):
            shared = common_prefix(self._cached(slot), prompt)
            shared = shared if limit is None else min(shared, limit)
            found.append((self._batch.available(slot, shared), slot))
        length, slot = max(found, key=lambda each: (each[0], -each[1]))
        return slot, length

    def shared_prefix(self, prompt: Sequence[int]) -> int:
        """The length of the longest prefix that a slot shares with a prompt, whether it can be reused or not."""
        return max(common_prefix(self._cached(slot), prompt) for slot in range(self._batch.slots))

    def assign(self, tokens: list[int], source: int, length: int) -> int:
        """Assign a slot that holds the first `length` tokens, which are cached in slot `source`.

        `tokens` is the sequence's own list, which grows.
        """
        batch = self._batch
        idle = self._idle()
        whole = source in idle and length > 0 and length >= _REUSE_IN_PLACE * batch.lengths[source]
        in_place = source in idle and (len(idle) == 1 or (whole and self._near(source)))
        slot = source if in_place else self._choose(source)
        if slot != source:
            self._make_empty(slot, source)
            if length:
                batch.copy(source, slot, length)
                self._touch(source)
            if whole:
                batch.release(source)
        batch.rewind(slot, length)
        self._assigned.add(slot)
        self._tokens[slot] = tokens
        self._touch(slot)
        return slot

    def release(self, slot: int, *, keep: bool = True) -> None:
        """Make a slot idle; what it holds stays cached if `keep` is true."""
        self._assigned.discard(slot)
        self._tokens[slot] = list(self._cached(slot))
        self._touch(slot)
        if keep:
            self._batch.settle(slot)
        else:
            self._batch.release(slot)
        self.enforce_budget()

    def recover(self, assigned: Iterable[int]) -> None:
        """After a failure: only these slots are assigned, and the others are empty; what they hold is uncertain."""
        self._assigned = set(assigned)
        for slot in self._idle():
            self._tokens[slot] = []
            self._batch.rewind(slot, 0)

    def reserve(self, tokens: Sequence[int]) -> int:
        """An idle slot for tokens whose cache the caller is about to write."""
        slot = min(self._idle(), key=lambda slot: (self._batch.lengths[slot] > 0, self._last_used[slot]))
        self._evict(slot)
        self._tokens[slot] = list(tokens)
        self._touch(slot)
        return slot

    def enforce_budget(self) -> None:
        """Evict the least recently used slots until the budget holds."""
        while self.cached_bytes > self._budget:
            self._evict(self._oldest(self._idle()))

    def _cached(self, slot: int) -> Sequence[int]:
        return self._tokens[slot][: self._batch.lengths[slot]]

    def _idle(self) -> list[int]:
        return [slot for slot in range(self._batch.slots) if slot not in self._assigned]

    def _distance(self, slot: int) -> int:
        """Number of slots between this one and the assigned ones."""
        if not self._assigned:
            return 0
        return max(min(self._assigned) - slot, slot - max(self._assigned), 0)

    def _near(self, slot: int) -> bool:
        return self._distance(slot) <= MAX_GAP

    def _choose(self, source: int) -> int:
        """An idle slot other than `source`: near the assigned ones, and empty if one of those is."""
        others = [slot for slot in self._idle() if slot != source]
        lengths = self._batch.lengths
        return min(
            others,
            key=lambda slot: (not self._near(slot), lengths[slot] > 0, self._distance(slot), self._last_used[slot]),
        )

    def _make_empty(self, slot: int, source: int) -> None:
        """Empty a slot: its cached tokens move to an empty one, for which the least recently used may be evicted."""
        if not self._batch.lengths[slot]:
            return
        others = [each for each in self._idle() if each != source]
        empty = [each for each in others if not self._batch.lengths[each]]
        target = empty[0] if empty else self._oldest(others)
        self._evict(target)
        if target != slot:
            self._batch.copy(slot, target, self._batch.lengths[slot])
            self._tokens[target], self._last_used[target] = self._tokens[slot], self._last_used[slot]
            self._batch.release(slot)

    def _oldest(self, slots: Sequence[int]) -> int:
        """The least recently used of those that hold tokens."""
        return min((slot for slot in slots if self._batch.lengths[slot]), key=self._last_used.__getitem__)

    def _evict(self, slot: int) -> None:
        self.evictions += bool(self._batch.lengths[slot])
        self._batch.release(slot)

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._last_used[slot] = self._clock


def spans(slots: Sequence[int]) -> list[range]:
    """Group slots into ranges with gaps of at most `MAX_GAP`."""
    found: list[range] = []
    for slot in sorted(slots):
        if found and slot - found[-1].stop <= MAX_GAP:
            found[-1] = range(found[-1].start, slot + 1)
        else:
            found.append(range(slot, slot + 1))
    return found
