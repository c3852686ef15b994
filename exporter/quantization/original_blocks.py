"""Reads weights that a quantized source stores in blocks, in the layout of the exported graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llm_edge.exporter.quantization.blocks import QuantizedBlocks
from llm_edge.model.weights import Weights
from llm_edge.runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class BlocksWithOffsets:
    """A weight [N, K] in blocks of 32, and the offset of each block, float32 [K / 32, N], or None."""

    blocks: QuantizedBlocks
    offsets: npt.NDArray[np.float32] | None


def read_original(weights: Mapping[str, Tensor], name: str) -> BlocksWithOffsets:
    """Read a weight that the source stores in blocks.

    Raises:
        CheckpointError: a scale or an offset is NaN or infinity.
    """
    assert isinstance(weights, Weights)
    kind, source = weights.block_kind(name), weights.blocks(name)
    assert kind is not None
    for values in (source.scales, source.offsets):
        if values is not None and not values.isfinite().all():
            raise CheckpointError(f"{name}: a scale is NaN or infinity: the checkpoint is damaged")
    levels = source.levels.numpy()
    if kind.bits == 4:
        levels = levels[:, ::2] | levels[:, 1::2] << 4
    blocks = QuantizedBlocks(levels.reshape(*source.scales.shape, -1), source.scales.numpy(), None, kind.bits)
    return BlocksWithOffsets(blocks, None if source.offsets is None else source.offsets.numpy().T)
