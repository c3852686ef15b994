"""compressed-tensors: packed integers, integers and floats in the layouts of vLLM's llm-compressor.

Layouts and formulas are those of the compressed-tensors package (`compressors/`, `quantization/lifecycle/forward.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_edge.checkpoint.huggingface.weight_files import WeightFiles
from llm_edge.checkpoint.quantized.fp8 import block_size, float8_weights
from llm_edge.checkpoint.quantized.groups import GroupedWeight, Groups
from llm_edge.checkpoint.quantized.numbers import exponents, float4, scale_tiles, tile_shape, unpack
from llm_edge.checkpoint.quantized.stored import FLOATS, QuantizedWeight, Shape, StoredWeight
from llm_edge.checkpoint.tensors.tensor_data import is_shape
from llm_edge.model.config_reader import ConfigReader

_FORMATS = (
    *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
)
_PACKED_BITS = (2, 4, 8)  # with other sizes, the layout depends on the version of the package


def read_compressed_tensors(config: ConfigReader, files: WeightFiles) -> Iterator[QuantizedWeight]:
    """Yield the weights of a compressed-tensors checkpoint.

    pack-quantized: weight_packed int32 [N, K * bits / 32], weight_scale [N, G], weight_shape int64 [2],
    weight_zero_point int32 [N * bits / 32, G] if not symmetric, weight_g_idx int32 [K] if groups are not adjacent.
    int-quantized and naive-quantized: weight int8 [N, K], weight_scale, weight_zero_point int8 of the same shape.
    float-quantized: weight float8 [N, K], weight_scale, one per matrix, row or block.
    nvfp4-pack-quantized and mxfp4-pack-quantized: weight_packed uint8 [N, K / 2], weight_scale float8 [N, K / 16] or
    uint8 [N, K / 32], weight_global_scale float32 [1], by which the scales of nvfp4 are divided.
    """
    _check(config)
    bits, block = _packed_bits(config), _block(config)
    yield from float8_weights(files, block)
    for name, info in list(files.tensors.items()):
        if name.endswith(".weight_packed"):
            stored = StoredWeight(files, name.removesuffix("_packed"))
            yield _packed(stored, bits) if info.dtype is torch.int32 else _float4(stored)
        elif name.endswith(".weight") and info.dtype is torch.int8:
            yield _integers(StoredWeight(files, name), block)
        elif name.endswith(".weight") and f"{name}_scale" in files.tensors and info.dtype in FLOATS:
            StoredWeight(files, name).fail("", "has a scale but is not quantized: save the model compressed")


def _check(config: ConfigReader) -> None:
    """Reject formats that are not supported."""
    found = [config, *_groups(config)]
    for each in found:
        name = each.text("format", "dense")
        if name not in _FORMATS:
            each.fail(f"format {name!r} is not supported; supported: {', '.join(map(repr, _FORMATS))}")
    sparsity = config.section("sparsity_config")
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        sparsity.fail("sparse weights are not supported: give the model before compression")
    transforms = config.section("transform_config")
    if transforms is not None and transforms.value("config_groups"):
        transforms.fail("transformed weights are not supported: give the model before compression")


def _groups(config: ConfigReader) -> list[ConfigReader]:
    """Return the sections of `config_groups`."""
    groups = config.section("config_groups")
    if groups is None:
        return []
    found = (groups.section(name) for name in (config.value("config_groups") or {}))
    return [group for group in found if group is not None]


def _packed_bits(config: ConfigReader) -> list[int]:
    """Return the numbers of bits that packed integers may have."""
    weights = [group.section("weights") for group in _groups(config)]
    return sorted({each.integer("num_bits", 8) for each in weights if each is not None})


def _block(config: ConfigReader) -> tuple[int, int] | None:
    """Return rows and columns of a block that has a scale."""
    weights = [group.section("weights") for group in _groups(config)]
    found = [block_size(each, "block_structure") for each in weights if each is not None]
    return next((block for block in found if block is not None), None)


def _packed(stored: StoredWeight, candidates: list[int]) -> QuantizedWeight:
    """Packed integers. Their bits follow from the widths, because modules may have different ones."""
    rows, words = stored.matrix("_packed", (torch.int32,))
    width = _shape_of(stored, rows)
    bits = next((bits for bits in candidates if bits in _PACKED_BITS and words == -(-width * bits // 32)), None)
    if bits is None:
        stored.fail("_packed", f"has {words} columns for {width} inputs; supported are 2, 4 and 8 bits")
    scale_rows, count = stored.matrix("_scale", FLOATS)
    if scale_rows not in (1, rows) or width < count:
        stored.fail("_scale", f"has shape {(scale_rows, count)} for a weight of {(rows, width)}")
    asymmetric = "_zero_point" in stored
    if asymmetric:
        stored.info("_zero_point", (torch.int32,), (-(-scale_rows * bits // 32), count))
    group_of = None
    if "_g_idx" in stored:
        stored.info("_g_idx", (torch.int32, torch.int64), (width,))
        group_of = stored.load("_g_idx").long()
        group_of = None if -1 in group_of else group_of  # not set
    groups = Groups.of(width, count, group_of, -(-width // count))
    if groups is None or (group_of is None and width % count):
        stored.fail("_scale", f"has {count} groups of {width} inputs")
    return _Packed(stored, bits, rows, groups, asymmetric).quantized(stored.prefix, f"int{bits}")


def _shape_of(stored: StoredWeight, rows: int) -> int:
    """Return the inputs of a packed weight."""
    stored.info("_shape", (torch.int64, torch.int32), (2,))
    shape = stored.load("_shape").tolist()
    if not is_shape(shape) or shape[0] != rows or shape[1] < 1:
        stored.fail("_shape", f"is {shape} for {rows} packed rows")
    return int(shape[1])


@dataclass(frozen=True, slots=True)
class _Packed(GroupedWeight):
    """Levels and zero points are stored unsigned, with the middle of the range added."""

    asymmetric: bool

    def levels(self) -> Tensor:
        return unpack(self.stored.load("_packed"), self.bits, self.groups.width)

    def scales(self) -> Tensor:
        return self.stored.load("_scale").expand(self.rows, -1)

    def zeros(self) -> Tensor | None:
        if not self.asymmetric:
            return None
        rows, _ = self.stored.info("_scale").shape
        return unpack(self.stored.load("_zero_point").T, self.bits, rows).T.expand(self.rows, -1)


def _integers(stored: StoredWeight, block: tuple[int, int] | None) -> QuantizedWeight:
    shape, scale = stored.matrix("", (torch.int8,)), stored.info("_scale", FLOATS).shape
    has_zero = "_zero_point" in stored
    if has_zero:
        stored.info("_zero_point", (torch.int8,), scale)
    tile = _tile(stored, shape, scale, block)

    def load() -> Tensor:
        zeros = stored.load("_zero_point") if has_zero else None
        return scale_tiles(stored.load(""), stored.load("_scale"), tile, zeros)

    return QuantizedWeight(stored.prefix, shape, stored.parts, "int8", load)


def _float4(stored: StoredWeight) -> QuantizedWeight:
    rows, packed = stored.matrix("_packed", (torch.uint8,))
    shape, scale = (rows, 2 * packed), stored.info("_scale", (torch.float8_e4m3fn, torch.uint8)).shape
    has_global = "_global_scale" in stored
    if has_global and math.prod(stored.info("_global_scale", (torch.float32,)).shape) != 1:
        stored.fail("_global_scale", "is not one number")
    tile = _tile(stored, shape, scale, None)

    def load() -> Tensor:
        scales = exponents(stored.load("_scale"))
        if has_global:
            scales = scales / stored.load("_global_scale").view(())
        return scale_tiles(float4(stored.load("_packed"), torch.float32), scales, tile)

    return QuantizedWeight(stored.prefix, shape, stored.parts, "NVFP4" if has_global else "MXFP4", load)


def _tile(stored: StoredWeight, shape: tuple[int, int], scale: Shape, block: tuple[int, int] | None) -> tuple[int, int]:
    tile = tile_shape(shape, scale, block)
    if tile is None:
        stored.fail("_scale", f"has shape {scale} for a weight of {shape}")
    return tile
