"""FP8: weights in float8 with one scale, one per row, or one per block, by which they are multiplied."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llm_edge.checkpoint.huggingface.weight_files import WeightFiles
from llm_edge.checkpoint.quantized.numbers import exponents, scale_tiles, tile_shape
from llm_edge.checkpoint.quantized.stored import FLOAT8, FLOATS, QuantizedWeight, StoredWeight
from llm_edge.model.config_reader import ConfigReader

_SCALES = ("_scale_inv", "_scale")
_SCALE_TYPES = (*FLOATS, torch.float8_e8m0fnu, torch.uint8)


def read_fp8(config: ConfigReader, files: WeightFiles) -> Iterator[QuantizedWeight]:
    """Yield the weights of an FP8 checkpoint: DeepSeek's blocks, Ministral 3's single scales, FBGEMM's rows.

    weight float8 [N, K] or [E, N, K]; weight_scale_inv or weight_scale, which multiplies it despite the first name.
    What `modules_to_not_convert` lists is stored in another type.
    """
    yield from float8_weights(files, block_size(config))


def block_size(config: ConfigReader, key: str = "weight_block_size") -> tuple[int, int] | None:
    """Return rows and columns of a block that has a scale, or None if the config does not set them."""
    size = config.value(key)
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(x) is int and 1 <= x < 1 << 31 for x in size):
        config.fail(f"{key} is not a list of two positive numbers")
    return size[0], size[1]


def float8_weights(files: WeightFiles, block: tuple[int, int] | None) -> Iterator[QuantizedWeight]:
    """Yield all tensors of type float8 with their scales, which may be float8 too."""
    for name in [name for name, info in files.tensors.items() if info.dtype in FLOAT8 and not name.endswith(_SCALES)]:
        stored = StoredWeight(files, name)
        yield scaled_weight(stored, next((part for part in _SCALES if part in stored), _SCALES[0]), block)


def scaled_weight(stored: StoredWeight, scale_part: str, block: tuple[int, int] | None) -> QuantizedWeight:
    """Return a weight in float8; the prefix of `stored` is its whole name."""
    shape, scale_shape = stored.info("", FLOAT8).shape, stored.info(scale_part, _SCALE_TYPES).shape
    experts = shape[0] if len(shape) == 3 else 1
    own = scale_shape[1:] if len(shape) == 3 and scale_shape[:1] == (experts,) else scale_shape
    tile = tile_shape((shape[-2], shape[-1]), own, block) if len(shape) in (2, 3) else None
    if tile is None:
        stored.fail(scale_part, f"has shape {scale_shape} for a weight of {shape}")
    found = tile

    def load() -> Tensor:
        weight = stored.load("").view(experts, *shape[-2:])
        scales = exponents(stored.load(scale_part))
        per_expert = scales if own is not scale_shape else scales.expand(experts, *scale_shape)
        scaled = [scale_tiles(each, scale, found) for each, scale in zip(weight, per_expert, strict=True)]
        return scaled[0].view(shape) if experts == 1 else torch.stack(scaled)

    return QuantizedWeight(stored.prefix, shape, stored.parts, "FP8", load)
