"""`read_safetensors`: parses the header of a safetensors file.

    length u64 | JSON object of that length, padded with spaces | data
    name -> {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, with offsets relative to the data

As the specification (https://github.com/huggingface/safetensors) requires, names must be unique, and tensors must fill
the data without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from llm_edge.checkpoint.tensors.tensor_data import TensorInfo, TensorLocation, TensorReader, check_name, is_shape
from llm_edge.runtime.safe_io import short_repr

MAX_HEADER = 1 << 23  # about 120 bytes per tensor
DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "C64": torch.complex64,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

_DAMAGED = "the file is damaged: download it again"


def read_safetensors(file: TensorReader) -> dict[str, TensorLocation]:
    """Return the location of every tensor, in the order of the header.

    Raises:
        CheckpointError: the header is invalid, or a tensor has a type that torch does not have.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    begin = 8 + length
    if begin > file.size:
        file.fail(f"the header needs {length} bytes of a file of {file.size}: it is truncated, download it again")
    if length > MAX_HEADER:
        file.fail(f"the header has {length} bytes; the limit is {MAX_HEADER}: split the file into shards")
    header = _parse(file, file.read(8, length))
    header.pop("__metadata__", None)
    locations = {name: _location(file, check_name(file, name), entry, begin) for name, entry in header.items()}

    end = begin
    for name, location in sorted(locations.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)):
        if location.offset != end:
            file.fail(f"tensor {name} starts at byte {location.offset}, but the previous one ends at {end}: {_DAMAGED}")
        end += location.info.nbytes
    if end > file.size:
        file.fail(f"the tensors end at byte {end} of a file of {file.size}: it is truncated, download it again")
    if end < file.size:
        file.fail(f"{file.size - end} bytes after the last tensor are unused: {_DAMAGED}")
    if not locations:
        file.fail("has no tensors: save a state_dict")
    return locations


def _parse(file: TensorReader, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            file.fail(f"the header has a duplicate name: {_DAMAGED}")
        return table

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, an integer of thousands of digits, or nested too deeply
        file.fail(f"the header is not JSON: {_DAMAGED}")
    if not isinstance(header, dict):
        file.fail(f"the header is not a JSON object: {_DAMAGED}")
    return header


def _location(file: TensorReader, name: str, entry: Any, begin: int) -> TensorLocation:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        file.fail(f"tensor {name} does not have exactly dtype, shape and data_offsets: {_DAMAGED}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        shown = short_repr(kind) if isinstance(kind, str) else "not a string"
        file.fail(f"tensor {name} is of an unsupported type ({shown}): save it as F32, F16 or BF16")
    if not isinstance(shape, list) or not is_shape(shape):
        file.fail(f"tensor {name} has an invalid shape: {_DAMAGED}")
    info = TensorInfo(tuple(shape), DTYPES[kind])
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int and 0 <= offset < 1 << 63 for offset in offsets)
    ):
        file.fail(f"tensor {name} has invalid offsets: {_DAMAGED}")
    first, last = offsets
    if last - first != info.nbytes:
        file.fail(
            f"tensor {name} has {last - first} bytes, but shape {info.shape} and type {kind} require {info.nbytes}: "
            f"{_DAMAGED}"
        )
    return TensorLocation(info, begin + first)
