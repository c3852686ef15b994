"""Tests that graphs compute the rotary angles of the positions in use as the tables hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
import torch

from llm_edge.exporter.export import export
from llm_edge.exporter.graph.attention import DOMAIN
from llm_edge.exporter.graph.passes.rotary_angles import compute_rotary_angles
from llm_edge.exporter.options import ExportOptions, GraphChoice
from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from llm_edge.runtime.backend.graph_check import check_graph

FAR = 131_072
_LONGROPE = LongRopeScaling((1.0, 1.1, 1.2, 1.3, 1.5, 2.0), (3.0, 4.0, 5.0, 6.0, 7.5, 9.0), 64, 1.19)
ROPES = {
    "plain": Rope(10_000.0, 64),
    "linear": Rope(1e6, 32, LinearScaling(4.0)),
    "llama3": Rope(500_000.0, 64, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    "yarn, with an amplitude": Rope(10_000.0, 24, YarnScaling(4.0, 4096, 32.0, 1.0, 1.14, truncate=True)),
    "longrope": Rope(10_000.0, 12, _LONGROPE),
}


def config_with(rope: Rope) -> ModelConfig:
    return ModelConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=64,
        layers=(LayerConfig(rope),),
        norm_eps=1e-6,
        tie_word_embeddings=True,
    )


def compute(
    rope: Rope,
    positions: npt.NDArray[np.int64],
    query_heads: int = 0,
    key_heads: int = 1,
    value_heads: int = 0,
    query_factor: float = 1.0,
) -> list[npt.NDArray[np.float32]]:
    """Run a graph that holds nothing but the angles of `positions` [B, S]."""
    given = ir.Value(name="positions", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["B", "S"]))
    tables = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([FAR, rope.dim // 2]))
        for name in ("cos_0", "sin_0")
    ]
    node = ir.node(
        "RotaryAngles",
        [*tables, given],
        {
            "query_heads": query_heads,
            "key_heads": key_heads,
            "value_heads": value_heads,
            "query_factor": query_factor,
        },
        domain=DOMAIN,
        num_outputs=2,
        name="/angles",
    )
    for value, name in zip(node.outputs, ("cosines", "sines"), strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([given], list(node.outputs), nodes=[node], initializers=tables, opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=10)
    compute_rotary_angles(model, config_with(rope))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"positions": positions})


def table_rows(rope: Rope, positions: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float32]]:
    first = 0 if not rope.long_from or positions.max() < rope.long_from else FAR
    rows = torch.from_numpy(positions) + first
    return [table[rows].numpy() for table in rope.tables(FAR)]


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("positions", [[[0, 1, 2], [60, 61, 62]], [[100, 101]], [[FAR - 2], [7]]])
def test_angles_are_those_of_the_tables(name: str, positions: list[list[int]]) -> None:
    rope, at = ROPES[name], np.array(positions)
    for found, wanted in zip(compute(rope, at), table_rows(rope, at), strict=True):
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 2.5e-7


def test_values_in_a_packed_projection_are_not_rotated() -> None:
    rope, at = ROPES["yarn, with an amplitude"], np.array([[5, 6], [2, 3]])
    for found, wanted, unrotated in zip(compute(rope, at, 1, 2, 2), table_rows(rope, at), (1, 0), strict=True):
        heads = found.reshape(2, 2, 5, -1)
        assert np.abs(heads[:, :, :3] - wanted[:, :, None]).max() <= 2.5e-7
        assert (heads[:, :, 3:] == unrotated).all()


def test_only_queries_are_multiplied_by_the_factor_of_attention() -> None:
    rope, at = ROPES["yarn, with an amplitude"], np.array([[5, 6]])
    packed = compute(rope, at, 2, 1, 1, query_factor=0.5)
    alone = compute(rope, at, 1, 0, query_factor=0.5)
    for found, query, wanted in zip(packed, alone, table_rows(rope, at), strict=True):
        heads = found.reshape(1, 2, 4, -1)
        assert np.abs(heads[:, :, :2] - 0.5 * wanted[:, :, None]).max() <= 2.5e-7
        assert np.abs(heads[:, :, 2] - wanted).max() <= 2.5e-7
        assert np.abs(query - 0.5 * wanted).max() <= 2.5e-7


@pytest.mark.parametrize("name", ROPES)
def test_the_angles_of_a_token_do_not_depend_on_the_tokens_beside_it(name: str) -> None:
    """Otherwise an answer would depend on how its prompt was split."""
    positions = np.arange(65, 85)[None]
    together = compute(ROPES[name], positions)
    for index in range(positions.size):
        for alone, all_of_them in zip(compute(ROPES[name], positions[:, index : index + 1]), together, strict=True):
            assert (alone[0, 0] == all_of_them[0, index]).all()


@pytest.mark.parametrize("style", [GraphChoice.FUSED, GraphChoice.PORTABLE])
def test_the_size_of_a_graph_does_not_depend_on_the_context(tmp_path: Path, style: GraphChoice) -> None:
    sizes = []
    for length in (256, 65_536):
        source = tiny.save_checkpoint(tmp_path / f"{length}", max_position_embeddings=length)
        bundle = tmp_path / f"bundle-{length}"
        export(str(source), ExportOptions(bundle, precision="fp32", graph=style, validate=False))
        check_graph(bundle / "onnx" / "model.onnx")
        sizes.append(sum(path.stat().st_size for path in (bundle / "onnx").iterdir()))
    assert sizes[0] == sizes[1]
