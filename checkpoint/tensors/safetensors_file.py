"""The header of a safetensors file: which tensors there are and where they lie. It reads no tensor's values.

    length u64 | JSON object of that length, padded with spaces | data
    name -> {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, offsets counting from the data
The rules are those of the format's description (https://github.com/huggingface/safetensors): a name stands once,
tensors follow each other without gaps, and the last one ends with the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from llm_edge.checkpoint.tensors.tensor_bytes import FileBytes, Place, TensorInfo, check_name, is_shape
from llm_edge.runtime.show import show

MAX_HEADER = 1 << 23  # a tensor takes about 120 bytes
DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}

_DAMAGED = "the file is damaged: download it again"


def read_safetensors(file: FileBytes) -> dict[str, Place]:
    """Where every tensor lies, in the order of the header.

    Raises:
        CheckpointError: the header breaks a rule of the format, or a tensor has a type torch does not know.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    begin = 8 + length
    if begin > file.size:
        file.fail(f"the header needs {length} bytes of a file of {file.size}: it is cut short, download it again")
    if length > MAX_HEADER:
        file.fail(f"the header has {length} bytes, at most {MAX_HEADER} are read here: split the file into shards")
    header = _parse(file, file.read(8, length))
    header.pop("__metadata__", None)
    places = {name: _place(file, check_name(file, name), row, begin) for name, row in header.items()}

    end = begin
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)):
        if place.offset != end:
            file.fail(f"tensor {name} begins at byte {place.offset}, the one before it ends at {end}: {_DAMAGED}")
        end += place.info.nbytes
    if end > file.size:
        file.fail(f"the tensors end at byte {end} of a file of {file.size}: it is cut short, download it again")
    if end < file.size:
        file.fail(f"{file.size - end} bytes after the last tensor belong to none: {_DAMAGED}")
    if not places:
        file.fail("holds no tensors: save a state_dict")
    return places


def _parse(file: FileBytes, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            file.fail(f"the header has a name twice: {_DAMAGED}")
        return table

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number of thousands of digits, or nested too deep
        file.fail(f"the header is not JSON: {_DAMAGED}")
    if not isinstance(header, dict):
        file.fail(f"the header is not a JSON object: {_DAMAGED}")
    return header


def _place(file: FileBytes, name: str, row: Any, begin: int) -> Place:
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        file.fail(f"tensor {name} is not described by dtype, shape and data_offsets: {_DAMAGED}")
    kind, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        shown = show(kind) if isinstance(kind, str) else "not named by a text"
        file.fail(f"tensor {name} is of a type that is not read here ({shown}): save it as F32, F16 or BF16")
    if not isinstance(shape, list) or not is_shape(shape):
        file.fail(f"tensor {name} has an impossible shape: {_DAMAGED}")
    info = TensorInfo(tuple(shape), DTYPES[kind])
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int and 0 <= offset < 1 << 63 for offset in offsets)
    ):
        file.fail(f"tensor {name} has impossible offsets: {_DAMAGED}")
    first, last = offsets
    if last - first != info.nbytes:
        file.fail(
            f"tensor {name} has {last - first} bytes, its shape {info.shape} and type {kind} need {info.nbytes}: "
            f"{_DAMAGED}"
        )
    return Place(info, begin + first)
