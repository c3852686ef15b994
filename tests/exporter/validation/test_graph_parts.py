"""Graphs that run part by part, without their weights in memory."""

from __future__ import annotations

from pathlib import Path

import families
import pytest

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.bundle.onnx_writer import OnnxWriter
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.texts import Window
from llm_edge.exporter.validation.compare import relative_difference, score
from llm_edge.exporter.validation.graph_parts import PartwiseGraph
from llm_edge.exporter.validation.parity import model_shape
from llm_edge.exporter.validation.reference import record_reference

TOKENS = [(7 * i + i * i) % 300 + 3 for i in range(120)]


@pytest.mark.parametrize(
    ("kind", "style"),
    [("llama", GraphStyle.FUSED), ("gemma3_text", GraphStyle.FUSED), ("gpt2", GraphStyle.PORTABLE)],
    ids=str,
)
def test_a_graph_in_parts_agrees_with_the_reference(kind: str, style: GraphStyle, tmp_path: Path) -> None:
    case = next(name for name, (found, _) in families.CASES.items() if found == kind)
    model = read_folder(families.save(families.model(case), tmp_path / "model"))
    windows = [Window(tuple(TOKENS)), Window(tuple(TOKENS[::-1]))]
    expected = record_reference(model.config, model.weights, windows, tmp_path / "logits")
    unquantized = OnnxWriter(style, model.config.hidden_size).unquantized(model)
    assert len(PartwiseGraph(unquantized.clone(), model_shape(model.config))) == 1
    graph = PartwiseGraph(unquantized, model_shape(model.config), part_bytes=1)  # every weight is in another part
    assert len(graph) >= 10
    parity, quality = score(expected, graph)
    assert parity.within_bounds
    assert 0 <= quality.kl_mean < 1e-7
    assert relative_difference(graph.hidden_states(expected.prompt), expected.hidden_states).max < 1e-5
