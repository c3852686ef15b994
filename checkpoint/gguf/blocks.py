"""Quantized blocks of GGUF tensors as integers, scales and offsets, without another rounding.

The layouts are the `block_*` structs of ggml-common.h, the formulas those of ggml's `dequantize_row_*`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from llm_edge.model.block_weights import BlockKind, SourceBlocks

Array = npt.NDArray[Any]
Numbers = tuple[Array, Array, Array | None]
"""Of n stored blocks: levels with zero at 0, int16 [n, weights]; float32 scales and offsets or None, [n, blocks]."""

_CHUNK = 1 << 16  # weights at a time, to stay in the processor's cache
_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)
"""The values of IQ4_NL and IQ4_XS by code, `kvalues_iq4nl` of ggml-common.h."""


@dataclass(frozen=True, slots=True)
class StoredType:
    """A quantized type.

    Attributes:
        kind: layout in which its numbers can be kept.
        layout: a stored block, which may consist of several blocks with a scale each.
        read: returns the numbers of stored blocks.
    """

    kind: BlockKind
    layout: np.dtype[Any]
    read: Callable[[Array], Numbers]


def _shifted(packed: Array, *shifts: int) -> Array:
    """The bits of packed numbers [..., w] at each shift, the first shift's numbers first: [..., shifts * w]."""
    parts: Array = packed[..., None, :] >> np.array(shifts, packed.dtype)[:, None]
    return parts.reshape(*packed.shape[:-1], -1)


def _groups(array: Array, width: int) -> Array:
    """Rows of bytes [n, m * width] in groups of `width`."""
    return array.reshape(len(array), -1, width)


def _flat(array: Array) -> Array:
    return array.reshape(len(array), -1)


def _scale(block: Array, field: str = "d") -> Array:
    scale: Array = block[field].astype(np.float32)[:, None]
    return scale


def _q4_0(block: Array) -> Numbers:
    return (_shifted(block["q"], 0, 4) & 15).astype(np.int16) - 8, _scale(block), None


def _q4_1(block: Array) -> Numbers:
    return (_shifted(block["q"], 0, 4) & 15).astype(np.int16), _scale(block), _scale(block, "m")


def _five_bits(block: Array) -> Array:
    high = np.unpackbits(block["h"], axis=1, bitorder="little")
    return (_shifted(block["q"], 0, 4) & 15).astype(np.int16) | high.astype(np.int16) << 4


def _q5_0(block: Array) -> Numbers:
    return _five_bits(block) - 16, _scale(block), None


def _q5_1(block: Array) -> Numbers:
    return _five_bits(block), _scale(block), _scale(block, "m")


def _q8_0(block: Array) -> Numbers:
    return block["q"].astype(np.int16), _scale(block), None


def _q2_k(block: Array) -> Numbers:
    levels = _flat(_shifted(_groups(block["q"], 32), 0, 2, 4, 6) & 3)
    scales, minima = block["s"] & 15, block["s"] >> 4
    return levels.astype(np.int16), _scale(block) * scales, -(_scale(block, "m") * minima)


def _q3_k(block: Array) -> Numbers:
    levels = _flat(_shifted(_groups(block["q"], 32), 0, 2, 4, 6) & 3).astype(np.int16)
    high = _flat(_shifted(block["h"][:, None], *range(8)) & 1).astype(np.int16)
    low, top = block["s"][:, :8], block["s"][:, 8:]
    scales = (_shifted(low, 0, 4) & 15 | (_shifted(top, 0, 2, 4, 6) & 3) << 4).astype(np.int16) - 32
    return levels - ((high ^ 1) << 2), _scale(block) * scales, None


def _scales_and_minima(packed: Array) -> tuple[Array, Array]:
    """Eight scales and minima of 6 bits each, packed in 12 bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, rest & 15 | first >> 2 & 48], axis=1)
    return scales, np.concatenate([second & 63, rest >> 4 | second >> 2 & 48], axis=1)


def _q4_k(block: Array) -> Numbers:
    levels = _flat(_shifted(_groups(block["q"], 32), 0, 4) & 15).astype(np.int16)
    scales, minima = _scales_and_minima(block["s"])
    return levels, _scale(block) * scales, -(_scale(block, "m") * minima)


def _q5_k(block: Array) -> Numbers:
    levels, scales, offsets = _q4_k(block)
    high = _flat(_shifted(block["h"][:, None], *range(8)) & 1).astype(np.int16)
    return levels | high << 4, scales, offsets


def _q6_k(block: Array) -> Numbers:
    low = _flat(_shifted(_groups(block["q"], 64), 0, 4) & 15).astype(np.int16)
    high = _flat(_shifted(_groups(block["h"], 32), 0, 2, 4, 6) & 3).astype(np.int16)
    return (low | high << 4) - 32, _scale(block) * block["s"], None


def _iq4_nl(block: Array) -> Numbers:
    return _IQ4_VALUES[_shifted(block["q"], 0, 4) & 15], _scale(block), None


def _iq4_xs(block: Array) -> Numbers:
    low = _shifted(block["s"][..., None], 0, 4) & 15
    high = block["t"].astype(np.uint16)[:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (low.reshape(len(block), 8) | high << 4).astype(np.int16) - 32
    return _IQ4_VALUES[_flat(_shifted(_groups(block["q"], 16), 0, 4) & 15)], _scale(block) * scales, None


def _dtype(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype[Any]:
    return np.dtype([(name, kind, *count) for name, kind, *count in fields])


def _bytes(name: str, count: int) -> tuple[str, str, int]:
    return name, "u1", count


_D, _M = ("d", "<f2"), ("m", "<f2")
TYPES: Mapping[GGMLQuantizationType, StoredType] = {
    getattr(GGMLQuantizationType, name): StoredType(BlockKind(bits, size, offsets), _dtype(*fields), read)
    for name, bits, size, offsets, read, fields in (
        ("Q2_K", 4, 16, True, _q2_k, (_bytes("s", 16), _bytes("q", 64), _D, _M)),
        ("Q3_K", 4, 16, False, _q3_k, (_bytes("h", 32), _bytes("q", 64), _bytes("s", 12), _D)),
        ("Q4_0", 4, 32, False, _q4_0, (_D, _bytes("q", 16))),
        ("Q4_1", 4, 32, True, _q4_1, (_D, _M, _bytes("q", 16))),
        ("Q4_K", 4, 32, True, _q4_k, (_D, _M, _bytes("s", 12), _bytes("q", 128))),
        ("Q5_0", 8, 32, False, _q5_0, (_D, _bytes("h", 4), _bytes("q", 16))),
        ("Q5_1", 8, 32, True, _q5_1, (_D, _M, _bytes("h", 4), _bytes("q", 16))),
        ("Q5_K", 8, 32, True, _q5_k, (_D, _M, _bytes("s", 12), _bytes("h", 32), _bytes("q", 128))),
        ("Q6_K", 8, 16, False, _q6_k, (_bytes("q", 128), _bytes("h", 64), ("s", "i1", 16), _D)),
        ("Q8_0", 8, 32, False, _q8_0, (_D, ("q", "i1", 32))),
        ("IQ4_NL", 8, 32, False, _iq4_nl, (_D, _bytes("q", 16))),
        ("IQ4_XS", 8, 32, False, _iq4_xs, (_D, ("t", "<u2"), _bytes("s", 4), _bytes("q", 128))),
    )
}
"""Types whose numbers ONNX operators can use as they are. Numbers of 5 and 6 bits are kept in 8 bits."""


def read_blocks(stored: Array, kind: GGMLQuantizationType, rows: int) -> SourceBlocks:
    """Return the blocks of a tensor with `rows` rows from its stored bytes."""
    found, read = TYPES[kind].kind, TYPES[kind].read
    source = stored.view(TYPES[kind].layout)
    per_block = GGML_QUANT_SIZES[kind][0]
    levels = np.empty((len(source), per_block), np.uint8)
    scales = np.empty((len(source), per_block // found.size), np.float32)
    offsets = np.empty_like(scales) if found.offsets else None
    step = max(_CHUNK // per_block, 1)
    for start in range(0, len(source), step):
        chunk = slice(start, start + step)
        with np.errstate(all="ignore"):  # a scale may be NaN or infinite
            numbers, scales[chunk], base = read(source[chunk])
            zero = 1 << (found.bits - 1)
            if offsets is not None and found.bits == 4:  # numbers from 0 to 15
                zero, base = 0, base + 8 * scales[chunk]
        levels[chunk] = numbers + np.int16(zero)
        if offsets is not None:
            offsets[chunk] = base
    return SourceBlocks(
        torch.from_numpy(levels).view(rows, -1),
        torch.from_numpy(scales).view(rows, -1),
        None if offsets is None else torch.from_numpy(offsets).view(rows, -1),
    )
