"""GPTQ and AWQ: integers of 2 to 8 bits with a scale and a zero point for each group of a row.

The layouts are those of AutoGPTQ and GPTQModel (`pack_block`, `convert_gptq_v1_to_v2_format_module`) and of AutoAWQ
(`WQLinear_GEMM`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_edge.checkpoint.huggingface.weight_files import WeightFiles
from llm_edge.checkpoint.quantized.groups import GroupedWeight, Groups
from llm_edge.checkpoint.quantized.numbers import unpack
from llm_edge.checkpoint.quantized.stored import FLOATS, QuantizedWeight, StoredWeight
from llm_edge.model.config_reader import ConfigReader

_WORDS = (torch.int32,)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # positions of columns 0 to 7 in a word, which holds 0 2 4 6 1 3 5 7


def read_gptq(config: ConfigReader, files: WeightFiles) -> Iterator[QuantizedWeight]:
    """Yield the weights of a GPTQ checkpoint.

    qweight int32 [K * bits / 32, N], packed along K; qzeros int32 [G, N * bits / 32], packed along N, minus 1 unless
    `checkpoint_format` is gptq_v2; scales [G, N]; g_idx int32 [K], the group of each input, which may be missing.
    """
    default = _bits(config, (2, 3, 4, 8))
    kind = config.text("checkpoint_format", "gptq")
    if kind not in ("gptq", "gptq_v2"):
        config.fail(f"checkpoint_format {kind!r} is not supported; supported: 'gptq', 'gptq_v2'")
    group_size = _group_size(config)
    for name in [name for name in files.tensors if name.endswith(".qweight")]:
        stored = StoredWeight(files, name.removesuffix("qweight"))
        packed, rows = stored.matrix("qweight", _WORDS)
        bits = default
        if "g_idx" in stored:  # GPTQModel's `dynamic` sets bits per module
            (width,) = stored.info("g_idx", (torch.int32, torch.int64)).shape or (0,)
            bits = packed * 32 // max(width, 1)
            if bits not in (2, 3, 4, 8) or packed * 32 != width * bits:
                stored.fail("qweight", f"has {packed} rows for {width} inputs")
        width = packed * 32 // bits
        count, _ = stored.matrix("scales", FLOATS)
        stored.info("scales", shape=(count, rows))
        stored.info("qzeros", _WORDS, (count, -(-rows * bits // 32)))
        if "g_idx" not in stored and count != -(-width // (group_size or width)):
            stored.fail("scales", f"has {count} groups of {width} inputs in groups of {group_size}")
        group_of = stored.load("g_idx").long() if "g_idx" in stored else None
        groups = Groups.of(width, count, group_of, group_size or width)
        if groups is None:
            stored.fail("g_idx", f"has a group that is not one of {count}")
        weight = _Gptq(stored, bits, rows, groups, has_offset=kind == "gptq")
        yield weight.quantized(f"{stored.prefix}weight", f"GPTQ {bits} bits")


def read_awq(config: ConfigReader, files: WeightFiles) -> Iterator[QuantizedWeight]:
    """Yield the weights of an AWQ checkpoint.

    qweight int32 [K, N / 8] and qzeros int32 [G, N / 8], packed along N in the order 0 2 4 6 1 3 5 7; scales [G, N].
    """
    bits = _bits(config, (4,), config.resolve_alias("bits", "w_bit"))
    version = config.text("version", "gemm").lower()
    if version != "gemm":
        config.fail(f"version {version!r} is not supported; supported: 'gemm': give the model before quantization")
    group_size = _group_size(config, config.resolve_alias("group_size", "q_group_size"))
    for name in [name for name in files.tensors if name.endswith(".qweight")]:
        stored = StoredWeight(files, name.removesuffix("qweight"))
        width, packed = stored.matrix("qweight", _WORDS)
        count, rows = stored.matrix("scales", FLOATS)
        if rows != packed * 8:
            stored.fail("scales", f"has {rows} columns, but qweight has {packed * 8}")
        if count != -(-width // (group_size or width)):
            stored.fail("scales", f"has {count} groups of {width} inputs in groups of {group_size}")
        stored.info("qzeros", _WORDS, (count, packed))
        groups = Groups.of(width, count, None, group_size or width)
        assert groups is not None
        yield _Awq(stored, bits, rows, groups).quantized(f"{stored.prefix}weight", "AWQ 4 bits")


@dataclass(frozen=True, slots=True)
class _Gptq(GroupedWeight):
    has_offset: bool  # zero points are stored minus 1

    def levels(self) -> Tensor:
        return unpack(self.stored.load("qweight").T, self.bits, self.groups.width)

    def scales(self) -> Tensor:
        return self.stored.load("scales").T

    def zeros(self) -> Tensor:
        words, largest = self.stored.load("qzeros"), (1 << self.bits) - 1
        if not self.has_offset:
            return unpack(words, self.bits, self.rows).T
        if 32 % self.bits:
            return (unpack(words, self.bits, self.rows) + 1 & largest).T
        # Savers subtract 1 from all numbers of a word at once: a zero point of 0 borrows from the next one.
        return unpack(words + 0xFFFFFFFF // largest, self.bits, self.rows).T


@dataclass(frozen=True, slots=True)
class _Awq(GroupedWeight):
    def levels(self) -> Tensor:
        return _awq_numbers(self.stored.load("qweight"))

    def scales(self) -> Tensor:
        return self.stored.load("scales").T

    def zeros(self) -> Tensor:
        return _awq_numbers(self.stored.load("qzeros"))


def _awq_numbers(words: Tensor) -> Tensor:
    """Return the numbers of words [A, N / 8] as [N, A]."""
    numbers = unpack(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
    return numbers[:, :, list(_AWQ_ORDER)].flatten(1).T


def _bits(config: ConfigReader, supported: tuple[int, ...], key: str = "bits") -> int:
    bits = config.integer(key, 4)
    if bits not in supported:
        config.fail(f"{key} is {bits}; supported: {', '.join(map(str, supported))}")
    return bits


def _group_size(config: ConfigReader, key: str = "group_size") -> int | None:
    """Return the inputs of a group, or None if a row is one group."""
    size = config.integer(key, 128)
    if size != -1 and not 1 <= size < 1 << 31:
        config.fail(f"{key} is {size}; it must be positive, or -1 for one group per row")
    return None if size == -1 else size
