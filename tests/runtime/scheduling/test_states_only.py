"""Graphs that keep states and nothing per token, and read no attention mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.open import open_graph
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.model_shape import CacheTensor, ModelShape
from llm_edge.runtime.scheduling import cache_file
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.slots import SlotManager

VOCABULARY = 12
SHAPE = ModelShape(VOCABULARY, 1, 64, (CacheTensor("0.state.0", (VOCABULARY,), grows=False),))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Logits are how often each token has occurred; the state is the number at the last token."""
    path = tmp_path_factory.mktemp("graph") / "counting.onnx"
    integers, floats = TensorProto.INT64, TensorProto.FLOAT
    one, axis = helper.make_tensor("one", integers, [1], [1]), helper.make_tensor("axis", integers, [], [1])
    kept = helper.make_tensor("num_logits_to_keep", integers, [], [0])
    far, end = helper.make_tensor("far", integers, [1], [2**31]), helper.make_tensor("start_axis", integers, [1], [0])
    nodes = [
        helper.make_node("Gather", ["rows", "input_ids"], ["new"]),
        helper.make_node("CumSum", ["new", "axis"], ["sums"]),
        helper.make_node("Unsqueeze", ["past_key_values.0.state.0", "one"], ["before"]),
        helper.make_node("Add", ["sums", "before"], ["all"]),
        helper.make_node("ReduceSum", ["new", "one"], ["added"], keepdims=0),
        helper.make_node("Add", ["added", "past_key_values.0.state.0"], ["present.0.state.0"]),
        helper.make_node("Neg", ["num_logits_to_keep"], ["negative"]),
        helper.make_node("Unsqueeze", ["negative", "start_axis"], ["start"]),
        helper.make_node("Slice", ["all", "start", "far", "one"], ["logits"]),
    ]
    state = helper.make_tensor_value_info("past_key_values.0.state.0", floats, ["batch", VOCABULARY])
    graph = helper.make_graph(
        nodes,
        "counting",
        [
            helper.make_tensor_value_info("input_ids", integers, ["batch", "tokens"]),
            state,
            helper.make_tensor_value_info("num_logits_to_keep", integers, []),
        ],
        [
            helper.make_tensor_value_info("logits", floats, ["batch", "kept", VOCABULARY]),
            helper.make_tensor_value_info("present.0.state.0", floats, ["batch", VOCABULARY]),
        ],
        [one, axis, kept, far, end, numpy_helper.from_array(np.eye(VOCABULARY, dtype=np.float32), "rows")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return Session(open_graph(GraphFile(path, SHAPE), ExecutionOptions("cpu", 1)))


def counts(tokens: list[int]) -> list[float]:
    return np.bincount(tokens, minlength=VOCABULARY).tolist()


def test_a_session_counts(session: Session) -> None:
    session.clear_cache()
    assert session.step([3, 3, 5])[0].tolist() == counts([3, 3, 5])
    session.keep_states()
    assert session.step([5])[0].tolist() == counts([3, 3, 5, 5])
    assert session.step([7, 7], 0).tolist() == [counts([3, 3, 5, 5, 7]), counts([3, 3, 5, 5, 7, 7])]
    assert session.rewind(5) == 4
    assert session.step([1])[0].tolist() == counts([3, 3, 5, 5, 1])
    assert session.rewind(3) == 3
    assert session.step([1])[0].tolist() == counts([3, 3, 5, 1])


def test_a_batch_counts_and_its_slots_are_managed(session: Session, tmp_path: Path) -> None:
    batch = Batch(session.graph, 4)
    size = 4 * VOCABULARY
    assert (batch.token_bytes, batch.capacity) == (0, 64)
    manager = SlotManager(batch, 2 * size)
    tokens: dict[int, list[int]] = {}
    for first in range(3):
        prompt = [first, 5]
        slot = manager.assign(prompt, *manager.longest_prefix(prompt))
        assert batch.extend(slot, prompt)[0].tolist() == counts(prompt)
        tokens[slot] = prompt
    for _ in range(3):
        logits = batch.decode(0, [6, 7, 8, 9], [slot in tokens for slot in range(4)])
        for slot, each in tokens.items():
            each.append(6 + slot)
            assert logits[slot].tolist() == counts(each)
    *_, last = tokens
    for slot in tokens:
        manager.release(slot)
        assert manager.cached_bytes <= 2 * size
    assert manager.evictions == 1
    assert manager.longest_prefix([*tokens[last], 3]) == (last, 5)
    cache_file.save(tmp_path / "cache", "x" * 64, tokens[last], batch.read(last, 5))
    loaded, values = cache_file.load(tmp_path / "cache", "x" * 64, SHAPE, batch.dtypes)
    batch.release(last)
    batch.write(manager.reserve(loaded), values, len(loaded))
    slot, length = manager.longest_prefix([*loaded, 3])
    assert length == 5
    assert batch.extend(manager.assign(loaded, slot, length), [3])[0].tolist() == counts([*loaded, 3])
