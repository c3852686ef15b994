"""Tests that the passes recognise what transformers' modeling code computes."""

from __future__ import annotations

from collections import Counter

import pytest
from general_models import LAYERS, make_config

from llm_edge.exporter.general.architecture import architecture_of
from llm_edge.exporter.general.trace import trace_general


def operators(kind: str) -> Counter[str]:
    """The number of nodes by operator, without constants."""
    architecture = architecture_of(make_config(kind).to_dict(), "config.json")
    with architecture.fake_mode:
        model = trace_general(architecture.decoder)
    return Counter(node.op_type for node in model.graph if node.op_type != "Constant")


@pytest.mark.parametrize(
    ("kind", "norms", "per_layer"),
    [
        ("llama", 2, 17),
        ("qwen3_moe", 4, 28),  # norms of queries and keys
        ("gpt_oss", 2, 25),  # products of halves; biases
        ("cohere", 1, 19),  # pairs of neighbours
        ("glm4", 4, 23),  # heads that are rotated in part
        ("gpt_neox", 0, 26),  # queries, keys and values in one projection
    ],
)
def test_norms_and_rotations_become_one_node_each(kind: str, norms: int, per_layer: int) -> None:
    found = operators(kind)
    assert found["RotaryEmbedding"] == 2 * LAYERS
    assert found["RMSNormalization"] + found["SkipSimplifiedLayerNormalization"] == norms * LAYERS + bool(norms)
    assert found["Cos"] == found["Sin"] == 1
    assert found.total() <= per_layer * LAYERS + 30  # masks, positions, angles, embedding and head
