"""bitsandbytes: NF4 and FP4 with absolute maxima per block, and LLM.int8."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_edge.checkpoint.huggingface.weight_files import WeightFiles
from llm_edge.checkpoint.quantized.numbers import scale_tiles
from llm_edge.checkpoint.quantized.stored import FLOATS, QuantizedWeight, StoredWeight
from llm_edge.checkpoint.tensors.tensor_data import is_shape
from llm_edge.model.config_reader import ConfigReader

_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE = 1 << 16  # bytes of JSON
_F32 = (torch.float32,)


def read_bitsandbytes(_config: ConfigReader, files: WeightFiles) -> Iterator[QuantizedWeight]:
    """Yield the weights of a bitsandbytes checkpoint.

    4 bits: weight uint8 [N * K / 2, 1], two codes in a byte, the high half first; weight.quant_map float32 [16], the
    values of the codes; weight.absmax [blocks], float32 or uint8 codes of weight.nested_quant_map float32 [256] with
    maxima in weight.nested_absmax; weight.quant_state.bitsandbytes__nf4 or fp4, JSON in uint8.
    8 bits: weight int8 [N, K]; SCB float32 [N], the absolute maximum of each row.
    """
    for name in list(files.tensors):
        weight, found, kind = name.partition(_STATE)
        if found and kind in ("nf4", "fp4"):
            yield _four_bits(StoredWeight(files, weight), kind)
        elif name.endswith(".SCB"):
            yield _eight_bits(StoredWeight(files, name.removesuffix("SCB")))


def _eight_bits(stored: StoredWeight) -> QuantizedWeight:
    shape = stored.matrix("weight", (torch.int8,))
    stored.info("SCB", FLOATS, shape[:1])
    row_order = "weight_format" not in stored or (
        math.prod(stored.info("weight_format", (torch.uint8,)).shape) == 1 and int(stored.load("weight_format")) == 0
    )
    if not row_order:
        stored.fail("weight_format", "is not 0, the order of rows: save the model with bitsandbytes 0.45 or newer")

    def load() -> Tensor:
        return scale_tiles(stored.load("weight"), stored.load("SCB").float() / 127, (1, shape[1]))

    return QuantizedWeight(f"{stored.prefix}weight", shape, stored.parts, "LLM.int8", load)


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON beside a weight of 4 bits says; `nested` is the block size of nested maxima."""

    shape: tuple[int, int]
    size: int
    nested: int | None
    offset: float

    @classmethod
    def read(cls, stored: StoredWeight, part: str) -> _State:
        """Return the state in a part, with a shape that has as many numbers as the weight's bytes."""
        raw = _json(stored, part)
        numbers = 2 * stored.info("", (torch.uint8, torch.int8, *FLOATS)).nbytes  # stored as `bnb_4bit_quant_storage`
        shape, size = raw.get("shape"), raw.get("blocksize")
        if not isinstance(shape, list) or not is_shape(shape) or len(shape) != 2 or math.prod(shape) != numbers:
            stored.fail(part, f"has a shape that is not that of {numbers} numbers")
        if 0 in shape or not _is_size(size):
            stored.fail(part, "has no numbers or no valid blocksize")
        nested, offset = raw.get("nested_blocksize"), raw.get("nested_offset", 0.0)
        if nested is not None and not _is_size(nested):
            stored.fail(part, "has an invalid nested_blocksize")
        if type(offset) not in (int, float) or not abs(offset) < 1e30:
            stored.fail(part, "has an invalid nested_offset")
        return cls((shape[0], shape[1]), int(size or 1), nested, float(offset))


def _four_bits(stored: StoredWeight, kind: str) -> QuantizedWeight:
    state = _State.read(stored, f"{_STATE}{kind}")
    shape, size, nested = state.shape, state.size, state.nested
    blocks = -(-math.prod(shape) // size)
    stored.info(".quant_map", _F32, (16,))
    stored.info(".absmax", _F32 if nested is None else (torch.uint8,), (blocks,))
    if nested is not None:
        stored.info(".nested_quant_map", _F32, (256,))
        stored.info(".nested_absmax", _F32, (-(-blocks // nested),))

    def load() -> Tensor:
        absmax = stored.load(".absmax")
        if nested is not None:
            outer = stored.load(".nested_absmax")[torch.arange(blocks) // nested]
            absmax = stored.load(".nested_quant_map")[absmax.int()] * outer + state.offset
        packed = stored.load("").contiguous().view(torch.uint8).flatten()
        values, codes = stored.load(".quant_map"), torch.arange(256)
        pairs = torch.stack([values[codes >> 4], values[codes & 15]], dim=1)  # by byte
        weight = pairs[packed.int()].flatten()
        whole = weight.numel() // size * size
        weight[:whole].view(-1, size).mul_(absmax[: whole // size, None])
        weight[whole:] *= absmax[-1]
        return weight.view(shape)

    return QuantizedWeight(stored.prefix, shape, stored.parts, kind.upper(), load)


def _json(stored: StoredWeight, part: str) -> Mapping[str, Any]:
    """Return the JSON object in a part."""
    info = stored.info(part, (torch.uint8,))
    if info.nbytes > _MAX_STATE:
        stored.fail(part, f"has {info.nbytes} bytes; the limit is {_MAX_STATE}")
    try:
        state = json.loads(stored.load(part).numpy().tobytes().decode("utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deeply
        state = None
    if not isinstance(state, dict):
        stored.fail(part, "is not a JSON object")
    return state


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value < 1 << 31
