"""Slot memory: `HostSlots` and `DeviceSlots` behave identically."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sessions import open_file

from llm_edge.runtime import Bundle
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import MachineError
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.scheduling import batch as batch_module
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.slot_memory import DeviceSlots, HostSlots, SlotMemory

SLOTS, CAPACITY = 3, 16
LENGTHS = (3, 70, 17, 40)


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Session:
    bundle = Bundle.open(tiny_bundle)
    info = bundle.precision("fp32")
    return open_file(bundle.file(info.model), bundle.shape, info.share_buffer, "cpu", 2)


def make_memory(kind: str, session: Session, capacity: int = CAPACITY) -> SlotMemory:
    return (HostSlots if kind == "host" else DeviceSlots)(session.graph, SLOTS, capacity)


def values(length: int, seed: int) -> list[Any]:
    numbers = np.random.default_rng(seed)
    return [numbers.standard_normal((2, length, 32)).astype(np.float32) for _ in range(4)]


def same(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["host", "device"])
def test_values_can_be_written_read_copied_and_taken_over(session: Session, kind: str) -> None:
    memory, length = make_memory(kind, session), 5
    for slot in range(3):
        memory.write(slot, values(length + slot, slot))
    assert all(same(memory.read(slot, length + slot), values(length + slot, slot)) for slot in range(3))
    memory.copy(2, 0, 4)
    assert same(memory.read(0, 4), [each[:, :4] for each in values(7, 2)])
    assert same(memory.read(1, 6), values(6, 1))
    larger = make_memory(kind, session, 40)
    larger.take_over(memory, [4, 6, 0])
    assert same(larger.read(0, 4), [each[:, :4] for each in values(7, 2)])
    assert same(larger.read(1, 6), values(6, 1))
    larger.write(1, values(40, 9))
    assert same(larger.read(1, 40), values(40, 9))
    assert same(larger.read(0, 4), [each[:, :4] for each in values(7, 2)])  # neighbouring slots are unchanged
    memory.release(1)


@pytest.mark.parametrize("kind", ["host", "device"])
def test_slots_are_contiguous_in_memory(session: Session, kind: str) -> None:
    memory = make_memory(kind, session)
    starts = [memory.addresses(slot) for slot in range(3)]
    assert len(starts[0]) == len(set(starts[0])) == 4
    size = 2 * 16 * 32 * 4
    assert [[later - first for first, later in zip(starts[0], each, strict=True)] for each in starts] == [
        [slot * size] * 4 for slot in range(3)
    ]


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make batches keep their slots in device memory, as on a GPU."""
    monkeypatch.setattr(batch_module, "_RESERVED_BYTES", 0)
    monkeypatch.setattr(batch_module, "_MIN_CAPACITY", 32)
    monkeypatch.setattr(batch_module, "HostSlots", DeviceSlots)


def test_a_batch_computes_the_same_logits_in_device_memory(session: Session, on_device: None) -> None:
    order = random.Random(0)
    texts = [[order.randrange(331) for _ in range(length)] for length in LENGTHS]
    wanted = []
    for text in texts:
        session.clear_cache()
        session.step(text)
        wanted.append([session.step([token])[0].copy() for token in (5, 6, 7)])
    batch = Batch(session.graph, len(LENGTHS))
    assert batch.capacity == 32
    for slot, text in enumerate(texts):
        batch.extend(slot, text)
    assert batch.capacity == 128
    found = [batch.decode(0, [token] * 4, [True] * 4).copy() for token in (5, 6, 7)]
    for slot, expected in enumerate(wanted):
        assert same([step[slot] for step in found], expected)
    batch.copy(1, 2, 40)
    batch.write(3, batch.read(1, 40), 40)
    one, other = batch.decode(2, [9, 9], [True, True])
    np.testing.assert_array_equal(one, other)


def test_an_engine_gives_the_same_answers_in_device_memory(tiny_bundle: Path, on_device: None, tmp_path: Path) -> None:
    prompts = ["The quick brown fox", "lazy dog. " * 12, "0123456789 " * 9, "The quick brown fox jumps"]
    params = SamplingParams(temperature=1.0, max_tokens=40, seed=1)

    def answers(engine: Engine) -> list[str]:
        return [answer.result().text for answer in [engine.generate(prompt, params) for prompt in prompts * 2]]

    with Engine.load(tiny_bundle, "fp32", threads=1, active=3, kept=2) as engine:
        assert isinstance(engine._batch._memory, DeviceSlots)
        found = answers(engine)
        assert engine.counters().cached_tokens > 0
        engine.save_cache(tmp_path / "cache", prompts[1])
    with Engine.load(tiny_bundle, "fp32", threads=1) as engine:
        assert engine.load_cache(tmp_path / "cache") > 0
        assert engine.generate(prompts[1], params).result().text == found[1]
    assert found[:4] == found[4:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "HostSlots", HostSlots)
        with Engine.load(tiny_bundle, "fp32", threads=1, active=3, kept=2) as engine:
            assert isinstance(engine._batch._memory, HostSlots)
            assert answers(engine) == found


def test_running_out_of_device_memory_is_a_machine_error(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setattr("onnxruntime.OrtValue.ortvalue_from_numpy", fail)
    with pytest.raises(MachineError, match=r"^not enough memory for 3 sequences of 16 tokens: reduce active or kept$"):
        make_memory("device", session)
