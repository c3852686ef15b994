"""Quantized blocks of GGUF tensors hold the numbers that gguf computes from them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llm_edge.checkpoint.gguf.blocks import TYPES, read_blocks
from llm_edge.model.block_weights import BLOCK_TYPES, BlockKind, SourceBlocks

ROWS = 6


def random_blocks(kind: GGMLQuantizationType, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Rows of five random blocks with finite scales."""
    rng = np.random.default_rng(seed)
    layout = TYPES[kind].layout
    stored = rng.integers(0, 256, (ROWS, 5 * layout.itemsize), dtype=np.uint8)
    blocks = stored.view(layout)
    for field in {"d", "m"} & {*layout.names}:
        blocks[field] = rng.normal(size=blocks.shape)
    return stored


def numbers(blocks: SourceBlocks, kind: BlockKind) -> npt.NDArray[np.float64]:
    levels = blocks.levels.numpy()
    assert levels.max() < 1 << kind.bits
    values: npt.NDArray[np.float64] = levels - float(1 << kind.bits - 1)
    values *= np.repeat(blocks.scales.numpy().astype(np.float64), kind.size, axis=1)
    if blocks.offsets is not None:
        values += np.repeat(blocks.offsets.numpy().astype(np.float64), kind.size, axis=1)
    return values


def assert_equal(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Equal but for the rounding of sums to float32."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-23 * np.abs(expected).max())


def test_the_types_have_gguf_names_and_sizes() -> None:
    assert {kind.name for kind in TYPES} == {*BLOCK_TYPES}
    for kind, stored in TYPES.items():
        assert GGML_QUANT_SIZES[kind][1] == stored.layout.itemsize
        assert GGML_QUANT_SIZES[kind][0] % stored.kind.size == 0


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_blocks_hold_the_numbers_of_the_tensor(kind: GGMLQuantizationType) -> None:
    stored = random_blocks(kind)
    blocks = read_blocks(stored.reshape(-1), kind, ROWS)
    assert_equal(numbers(blocks, TYPES[kind].kind), dequantize(stored, kind))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_damaged_scales_are_read_without_a_warning(kind: GGMLQuantizationType) -> None:
    stored = random_blocks(kind)
    stored.view(TYPES[kind].layout)["d"] = np.inf
    assert not read_blocks(stored.reshape(-1), kind, ROWS).scales.isfinite().all()


@pytest.mark.parametrize("kinds", [*itertools.combinations(["Q3_K", "Q4_0", "Q4_K", "Q6_K", "Q8_0"], 2)], ids="+".join)
def test_types_have_a_common_layout(kinds: tuple[str, str]) -> None:
    types = [GGMLQuantizationType[name] for name in kinds]
    common = BlockKind.common(TYPES[kind].kind for kind in types)
    for kind in types:
        stored = random_blocks(kind)
        blocks = read_blocks(stored.reshape(-1), kind, ROWS).converted(TYPES[kind].kind, common)
        assert (blocks.offsets is not None) == common.offsets
        assert_equal(numbers(blocks, common), dequantize(stored, kind))
