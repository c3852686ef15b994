"""`Batch`: the logits of a sequence are bitwise the same whether it is computed alone or batched with others."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endless import Endless
from mutate import memory_limit
from sessions import open_file

from llm_edge.runtime import Bundle
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.errors import ContextLengthError, MachineError, ParameterError, StepTerminatedError
from llm_edge.runtime.scheduling import batch as batch_module
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.prefixes import CHUNK_ALIGNMENT

LENGTHS = (3, 300, 17, 64, 129, 2, 40, 255)


def open_session(bundle_path: Path, precision: str) -> Session:
    bundle = Bundle.open(bundle_path)
    info = bundle.precision(precision)
    return open_file(bundle.file(info.model), bundle.shape, info.share_buffer, "cpu", 2)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def session(tiny_bundle: Path, request: pytest.FixtureRequest) -> Session:
    return open_session(tiny_bundle, request.param)


def text(length: int, seed: int) -> list[int]:
    order = random.Random(seed)
    return [order.randrange(331) for _ in range(length)]


def logits_alone(session: Session, prompt: Sequence[int], continuation: Sequence[int]) -> list[Any]:
    """The logits after a prompt and after each further token, computed in the session's own cache."""
    session.clear_cache()
    logits = [session.step(prompt)[0].copy()]
    return logits + [session.step([token])[0].copy() for token in continuation]


def fill(batch: Batch, lengths: Sequence[int]) -> list[Any]:
    return [batch.extend(slot, text(length, slot))[0].copy() for slot, length in enumerate(lengths)]


def test_sequences_of_different_lengths_match_single_sequence_logits_bitwise(session: Session) -> None:
    wanted = [logits_alone(session, text(length, slot), text(5, 100 + slot)) for slot, length in enumerate(LENGTHS)]
    for width in (1, 2, 3, 8):
        batch = Batch(session.graph, len(LENGTHS))
        found = [[logits] for logits in fill(batch, LENGTHS)]
        for step in range(5):
            for first in range(0, len(LENGTHS), width):
                slots = range(first, min(first + width, len(LENGTHS)))
                tokens = [text(5, 100 + slot)[step] for slot in slots]
                logits = batch.decode(first, tokens, [True] * len(slots))
                assert logits.shape == (len(slots), 331)
                for slot, each in zip(slots, logits, strict=True):
                    found[slot].append(each.copy())
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
        assert batch.lengths == [length + 5 for length in LENGTHS]


def test_idle_slots_are_unchanged(session: Session) -> None:
    batch = Batch(session.graph, len(LENGTHS))
    fill(batch, LENGTHS)
    before = [batch.read(slot, length) for slot, length in enumerate(LENGTHS)]
    selected = [slot % 2 == 0 for slot in range(8)]
    for _ in range(3):
        batch.decode(0, [7] * 8, selected)
        batch.extend(4, [9, 8, 7, 6], 0)
    for slot, values in enumerate(before):
        for one, other in zip(values, batch.read(slot, LENGTHS[slot]), strict=True):
            np.testing.assert_array_equal(one, other)
        assert selected[slot] or batch.lengths[slot] == LENGTHS[slot]
    wanted = logits_alone(session, text(LENGTHS[1], 1), [5])[1]
    np.testing.assert_array_equal(batch.decode(1, [5], [True])[0], wanted)


def test_a_full_idle_slot_does_not_block_other_slots(session: Session) -> None:
    batch = Batch(session.graph, 2)
    for start in range(0, 1024, 256):
        batch.extend(0, text(1024, 0)[start : start + 256])
    batch.extend(1, text(20, 1))
    before = batch.read(0, 1023)
    logits = batch.decode(0, [7, 8], [False, True])
    np.testing.assert_array_equal(logits[1], logits_alone(session, text(20, 1), [8])[1])
    for one, other in zip(before, batch.read(0, 1023), strict=True):
        np.testing.assert_array_equal(one, other)
    assert batch.lengths == [1023, 21]
    batch.decode(0, [7], [True])
    with pytest.raises(ContextLengthError, match="1025"):
        batch.decode(0, [7], [True])
    with pytest.raises(ContextLengthError):
        batch.extend(0, [7, 8])


def test_growing_preserves_cached_values(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [logits_alone(session, text(length, slot), [5, 6]) for slot, length in enumerate(LENGTHS)]
    monkeypatch.setattr(batch_module, "_RESERVED_BYTES", 1)
    monkeypatch.setattr(batch_module, "_MIN_CAPACITY", 16)
    batch = Batch(session.graph, len(LENGTHS))
    capacities = [batch.capacity]
    found = []
    for slot in (0, 5, 2, 6, 3, 4, 7, 1):  # shortest first
        found.append((slot, [batch.extend(slot, text(LENGTHS[slot], slot))[0].copy()]))
        capacities.append(batch.capacity)
    assert capacities[0] == 16
    assert capacities[-1] == 512
    assert len(set(capacities)) > 4
    for token in (5, 6):
        logits = batch.decode(0, [token] * 8, [True] * 8)
        for slot, logits_list in found:
            logits_list.append(logits[slot].copy())
    for slot, logits_list in found:
        np.testing.assert_array_equal(logits_list, wanted[slot])
    while batch.lengths[1] < 1024:  # one token at a time, to the end of the context
        batch.decode(1, [5], [True])
    assert batch.capacity == 1024


@pytest.mark.parametrize("last", [2, 9, CHUNK_ALIGNMENT, CHUNK_ALIGNMENT + 1])
def test_prefill_chunking_does_not_change_the_logits(session: Session, last: int) -> None:
    prompt = text(192 + last, 3)
    wanted = logits_alone(session, prompt, [5])
    for cut in (CHUNK_ALIGNMENT, 2 * CHUNK_ALIGNMENT, 3 * CHUNK_ALIGNMENT, 6 * CHUNK_ALIGNMENT, 12 * CHUNK_ALIGNMENT):
        batch = Batch(session.graph, 2)
        for start in range(0, 192, cut):
            batch.extend(1, prompt[start : min(start + cut, 192)])
            batch.extend(0, text(21, start))
        np.testing.assert_array_equal(batch.extend(1, prompt[192:])[0], wanted[0])
        np.testing.assert_array_equal(batch.decode(1, [5], [True])[0], wanted[1])


def test_slots_can_be_copied_written_and_rewound(session: Session) -> None:
    prompt = text(96, 4)
    wanted = logits_alone(session, [*prompt, *text(32, 5)], [5])
    batch = Batch(session.graph, 3)
    batch.extend(2, [*prompt, *text(50, 6)])
    batch.copy(2, 0, 96)
    batch.write(1, batch.read(2, 96), 96)
    assert batch.rewind(2, 96) == 96
    assert batch.lengths == [96, 96, 96]
    for slot in range(3):
        np.testing.assert_array_equal(batch.extend(slot, text(32, 5))[0], wanted[0])
    for logits in batch.decode(0, [5] * 3, [True] * 3):
        np.testing.assert_array_equal(logits, wanted[1])


def test_extend_returns_as_many_logits_as_requested(session: Session) -> None:
    batch = Batch(session.graph, 2)
    batch.extend(1, text(32, 7))
    every = batch.extend(1, text(32, 8), 0).copy()
    assert every.shape == (32, 331)
    batch.rewind(1, 32)
    np.testing.assert_array_equal(batch.extend(1, text(32, 8), 3), every[-3:])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and other systems need not return memory")
def test_released_slots_return_their_memory(session: Session) -> None:
    def resident() -> int:
        with Path("/proc/self/smaps_rollup").open() as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("Rss:"))

    slots = 64
    batch = Batch(session.graph, slots)
    values = [np.ones((2, 1024, 32), session.graph.cache_dtype) for _ in range(4)]
    empty = resident()
    for slot in range(slots):
        batch.write(slot, values, 1024)
    taken = resident() - empty
    size = slots * 1024 * batch.token_bytes
    assert 0.9 * size < taken < 1.2 * size
    for slot in range(slots):
        batch.release(slot)
    assert resident() - empty < 0.1 * size
    assert batch.lengths == [0] * slots
    np.testing.assert_array_equal(batch.extend(3, text(40, 1))[0], logits_alone(session, text(40, 1), [])[0])


def test_releasing_a_slot_leaves_its_neighbours_unchanged(session: Session) -> None:
    batch = Batch(session.graph, 3)
    fill(batch, (200, 200, 200))
    before = [batch.read(slot, 200) for slot in (0, 2)]
    batch.release(1)
    for values, slot in zip(before, (0, 2), strict=True):
        for one, other in zip(values, batch.read(slot, 200), strict=True):
            np.testing.assert_array_equal(one, other)


def test_an_unwanted_step_is_terminated_and_can_be_repeated(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(session.graph, 2)
    fill(batch, (40, 20))
    with monkeypatch.context() as patch:
        patch.setattr(session.graph, "inference", Endless(session.graph.inference))
        batch.cancel_steps_if(lambda: True)
        with pytest.raises(StepTerminatedError, match=r"^a step over 2 x 1 tokens was cancelled$"):
            batch.decode(0, [5, 6], [True, True])
        with pytest.raises(StepTerminatedError):
            batch.extend(0, [5, 6])
    assert batch.lengths == [40, 20]
    batch.cancel_steps_if(lambda: False)
    wanted = logits_alone(session, text(40, 0), [5])[1]
    np.testing.assert_array_equal(batch.decode(0, [5, 6], [True, True])[0], wanted)


@pytest.mark.parametrize(("tokens", "keep"), [([], 1), ([5] * 513, 1), ([5, 6], 3), ([5], -1)])
def test_invalid_extend_arguments_are_rejected(session: Session, tokens: list[int], keep: int) -> None:
    batch = Batch(session.graph, 1)
    with pytest.raises(ParameterError):
        batch.extend(0, tokens, keep)
    assert batch.lengths == [0]


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory with Linux's setrlimit")
def test_allocating_more_slots_than_fit_in_memory_is_an_error(session: Session) -> None:
    message = r"^not enough memory for 1000 sequences of 1024 tokens: reduce active or kept$"
    with memory_limit(64 << 20), pytest.raises(MachineError, match=message):
        Batch(session.graph, 1000)
