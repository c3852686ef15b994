"""`Batch` over models with states: whatever is done to slots, the logits of a sequence are those that it has alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endless import Endless
from sessions import open_precision

from llm_edge.runtime.backend import states as states_module
from llm_edge.runtime.backend.limits import MAX_STEP_TOKENS
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.errors import MachineError, StepTerminatedError
from llm_edge.runtime.scheduling import batch as batch_module
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.slot_memory import DeviceSlots

CLOSE = 1e-4
LENGTHS = (3, 300, 17, 64, 129, 2, 40, 255)


@pytest.fixture(scope="module")
def session(state_bundle: Path) -> Session:
    return open_precision(state_bundle, "fp32")


@pytest.fixture(params=["host", "device"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where slots and states are; `device` as on a GPU."""
    if request.param == "device":
        monkeypatch.setattr(batch_module, "HostSlots", DeviceSlots)
        monkeypatch.setattr(states_module, "_on_host", lambda _: False)
    return str(request.param)


def text(length: int, seed: int) -> list[int]:
    order = random.Random(seed)
    return [order.randrange(331) for _ in range(length)]


def alone(session: Session, tokens: Sequence[int]) -> Any:
    """The logits after some tokens, computed in as few steps as possible."""
    session.clear_cache()
    for start in range(0, len(tokens), MAX_STEP_TOKENS):
        logits = session.step(tokens[start : start + MAX_STEP_TOKENS])
    return logits[0].copy()


def test_sequences_in_a_batch_match_single_ones(session: Session, memory: str) -> None:
    batch = Batch(session.graph, len(LENGTHS))
    tokens = [text(length, slot) for slot, length in enumerate(LENGTHS)]
    for slot, prompt in enumerate(tokens):
        batch.extend(slot, prompt)
    for width in (1, 2, 3, 8):
        for first in range(0, len(LENGTHS), width):
            slots = range(first, min(first + width, len(LENGTHS)))
            logits = batch.decode(first, [7 + slot for slot in slots], [True] * len(slots))
            for slot, found in zip(slots, logits, strict=True):
                tokens[slot].append(7 + slot)
                np.testing.assert_allclose(found, alone(session, tokens[slot]), atol=CLOSE, rtol=0)
    assert batch.lengths == [len(each) for each in tokens]


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_operations_keeps_the_states(session: Session, memory: str, seed: int) -> None:
    order, slots = random.Random(seed), 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "_RESERVED_BYTES", 1)
        patch.setattr(batch_module, "_MIN_CAPACITY", 16)  # so that slots grow meanwhile
        batch = Batch(session.graph, slots)
    tokens: list[list[int]] = [[] for _ in range(slots)]
    rewound = 0

    def extend(slot: int) -> None:
        new = text(order.randrange(1, 12), order.randrange(1000))
        tokens[slot] += new
        np.testing.assert_allclose(batch.extend(slot, new)[0], alone(session, tokens[slot]), atol=CLOSE, rtol=0)

    for _ in range(250):
        slot, other = order.randrange(slots), order.randrange(slots)
        action = order.choices(
            ["decode", "extend", "rewind", "keep", "copy", "write", "settle", "release"], [9, 5] + [1] * 6
        )[0]
        if action == "decode":
            first = order.randrange(slots)
            span = range(first, order.randrange(first + 1, slots + 1))
            active = [bool(tokens[each]) and order.random() < 0.7 for each in span]
            if not any(active):
                continue
            logits = batch.decode(first, [each + 40 for each in span], active)
            for each, advances, found in zip(span, active, logits, strict=True):
                if advances:
                    tokens[each].append(each + 40)
                    np.testing.assert_allclose(found, alone(session, tokens[each]), atol=CLOSE, rtol=0)
        elif action == "extend":
            extend(slot)
        elif action == "rewind":
            wanted = order.randrange(len(tokens[slot]) + 1)
            available = batch.available(slot, wanted)
            assert batch.rewind(slot, wanted) == available <= wanted
            rewound += 0 < available < len(tokens[slot])
            del tokens[slot][available:]
            extend(slot)
        elif action == "keep":
            batch.keep_states(slot)
        elif action in ("copy", "write") and slot != other:
            length = batch.available(slot, order.randrange(len(tokens[slot]) + 1))
            if action == "copy" or not length:
                batch.copy(slot, other, length)
            else:
                batch.write(other, batch.read(slot, length), length)
            tokens[other] = tokens[slot][:length]
            extend(other)
        elif action == "settle":
            batch.settle(slot)
        elif action == "release":
            batch.release(slot)
            tokens[slot] = []
        assert batch.lengths == [len(each) for each in tokens]
    assert rewound > 0
    assert batch.capacity > 16
    for slot in range(slots):
        batch.release(slot)
    assert batch.held_bytes(range(slots)) == 0


def test_idle_slots_between_active_ones_keep_their_states(session: Session, memory: str) -> None:
    batch = Batch(session.graph, 3)
    tokens = [text(20 + slot, slot) for slot in range(3)]
    for slot in range(3):
        batch.extend(slot, tokens[slot])
    batch.decode(0, [5, 6, 7], [True] * 3)
    for _ in range(3):
        batch.decode(0, [5, 6, 7], [True, False, True])
    np.testing.assert_allclose(batch.extend(1, [9, 8])[0], alone(session, [*tokens[1], 6, 9, 8]), atol=CLOSE, rtol=0)
    logits = batch.decode(0, [5, 6, 7], [True] * 3)
    for slot, after in enumerate(([5] * 5, [6, 9, 8, 6], [7] * 5)):
        np.testing.assert_allclose(logits[slot], alone(session, [*tokens[slot], *after]), atol=CLOSE, rtol=0)


def test_rejected_tokens_are_dropped_by_returning_to_the_step_before(session: Session) -> None:
    batch, prompt = Batch(session.graph, 2), text(30, 1)
    for keep in (False, True):
        batch.extend(1, prompt)
        if keep:
            batch.keep_states(1)
        batch.extend(1, [5, 6, 7, 8], 0)
        assert batch.rewind(1, 32) == 30
        np.testing.assert_allclose(
            batch.extend(1, [5, 6, 9])[0], alone(session, [*prompt, 5, 6, 9]), atol=CLOSE, rtol=0
        )
        batch.extend(1, [4, 4])
        assert batch.available(1, 34) == 33
        assert batch.available(1, 32) == (30 if keep else 0)
        batch.release(1)


def test_a_terminated_step_leaves_the_states_before_it(session: Session, memory: str) -> None:
    batch = Batch(session.graph, 2)
    prompts = [text(40, 0), text(20, 1)]
    for slot, prompt in enumerate(prompts):
        batch.extend(slot, prompt)
    batch.decode(0, [5, 6], [True, True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.graph, "inference", Endless(session.graph.inference))
        batch.cancel_steps_if(lambda: True)
        for step in (lambda: batch.decode(0, [7, 8], [True, True]), lambda: batch.extend(0, [7, 8])):
            with pytest.raises(StepTerminatedError):
                step()
    batch.cancel_steps_if(lambda: False)
    assert batch.lengths == [41, 21]
    logits = batch.decode(0, [7, 8], [True, True]).copy()
    for slot, after in enumerate(([5, 7], [6, 8])):
        np.testing.assert_allclose(logits[slot], alone(session, [*prompts[slot], *after]), atol=CLOSE, rtol=0)


def test_a_full_idle_slot_returns_to_the_latest_states_before_its_end(session: Session) -> None:
    batch, prompt = Batch(session.graph, 2), text(1024, 3)
    batch.extend(0, prompt[:512])
    batch.keep_states(0)
    batch.extend(0, prompt[512:])
    batch.extend(1, text(20, 1))
    logits = batch.decode(0, [7, 8], [False, True])
    np.testing.assert_allclose(logits[1], alone(session, [*text(20, 1), 8]), atol=CLOSE, rtol=0)
    assert batch.lengths == [512, 21]
    np.testing.assert_allclose(batch.extend(0, [5])[0], alone(session, [*prompt[:512], 5]), atol=CLOSE, rtol=0)


def test_a_session_returns_to_kept_states_and_to_those_before_its_last_step(session: Session) -> None:
    session.clear_cache()
    prompt = text(40, 5)
    for start in (0, 16, 32):
        session.step(prompt[start : start + 16])
        session.keep_states()
    session.step([5])
    session.step([6, 7, 8])
    assert session.rewind(43) == 41
    after = [*prompt, 5]
    np.testing.assert_allclose(session.step([9])[0], alone(open_like(session), [*after, 9]), atol=CLOSE, rtol=0)
    assert session.rewind(41) == 41
    assert session.rewind(40) == 40
    assert session.rewind(39) == 16  # the shortest and the latest are kept
    np.testing.assert_allclose(session.step([3])[0], alone(open_like(session), [*prompt[:16], 3]), atol=CLOSE, rtol=0)
    assert session.rewind(15) == 0
    np.testing.assert_allclose(session.step(prompt)[0], alone(open_like(session), prompt), atol=CLOSE, rtol=0)


def open_like(session: Session) -> Session:
    return Session(session.graph)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and other systems need not return memory")
def test_released_slots_return_the_memory_of_their_states(session: Session) -> None:
    def resident() -> int:
        with Path("/proc/self/smaps_rollup").open() as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("Rss:"))

    size = 4 * session.shape.state_numbers
    slots = 64 * (1 << 20) // (64 * size) + 8
    batch = Batch(session.graph, slots)
    for first in range(0, slots, 64):
        batch.decode(first, [5] * min(64, slots - first), [True] * min(64, slots - first))
    assert batch.held_bytes(range(slots)) >= slots * size
    taken = resident()
    for slot in range(slots):
        batch.release(slot)
    assert batch.held_bytes(range(slots)) == 0
    assert taken - resident() > slots * size / 2


def test_running_out_of_memory_is_a_machine_error(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(session.graph, 2)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no memory")

    monkeypatch.setattr(states_module, "mapped_zeros", fail)
    with pytest.raises(MachineError, match=r"^not enough memory for the states of a sequence$"):
        batch.extend(0, [5, 6])
    monkeypatch.undo()
    np.testing.assert_allclose(batch.extend(0, [5, 6])[0], alone(session, [5, 6]), atol=CLOSE, rtol=0)
