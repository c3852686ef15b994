"""`Header`: parses the metadata and the tensor table at the start of a GGUF file.

The file is untrusted: every count, length and offset is checked against the remaining bytes before anything is
allocated or looped over, so an invalid file fails quickly with a `CheckpointError`.

    magic "GGUF" | version u32 | tensors u64 | keys u64
    per key     name str | type u32 | value
    per tensor  name str | n_dims u32 | ne u64 x n_dims, fastest first | ggml type u32 | offset u64 in data
    padding to `general.alignment`, then the data

A str is length u64 and UTF-8 bytes; an array is item type u32, length u64 and the items.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import short_repr

MAX_DIMS = 4
MAX_KEYS = 1 << 16  # real files have dozens
MAX_TENSORS = 1 << 18  # real files have thousands
MAX_ITEMS = 1 << 22  # strings and nested arrays in the metadata; the largest vocabularies have 2^19
MAX_NAME = 1 << 16
MAX_NESTING = 4
DEFAULT_ALIGNMENT = 32

_STRING = 8
_ARRAY = 9
_BOOL = 7
# GGUF value type -> NumPy and struct formats
_SCALARS: dict[int, tuple[str, struct.Struct]] = {
    0: ("<u1", struct.Struct("<B")),
    1: ("<i1", struct.Struct("<b")),
    2: ("<u2", struct.Struct("<H")),
    3: ("<i2", struct.Struct("<h")),
    4: ("<u4", struct.Struct("<I")),
    5: ("<i4", struct.Struct("<i")),
    6: ("<f4", struct.Struct("<f")),
    _BOOL: ("<u1", struct.Struct("<B")),
    10: ("<u8", struct.Struct("<Q")),
    11: ("<i8", struct.Struct("<q")),
    12: ("<f8", struct.Struct("<d")),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_TRUNCATED = "the file is truncated: download it again"
_DAMAGED = "the file is damaged: download it again"


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """An entry of the tensor table."""

    name: str
    shape: tuple[int, ...]  # in PyTorch's order, [out, in]
    ggml_type: GGMLQuantizationType
    offset: int  # position of the data in the file
    nbytes: int

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Header:
    """Metadata and tensor table, parsed in one pass."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._pos = 0  # next byte to read
        self._items_left = MAX_ITEMS
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}

        n_tensors, n_keys = self._read_counts()
        for _ in range(n_keys):
            self._read_key()
        alignment = self._alignment()
        self._locate([self._read_tensor() for _ in range(n_tensors)], alignment)

    def _read_counts(self) -> tuple[int, int]:
        magic = self._take(4, "the magic number")
        if magic != b"GGUF":
            self._fail(f"is not a GGUF file: it starts with {magic!r}")
        version = self._number(_U32, "the version")
        if version not in (2, 3):
            if version and version & 0xFFFF == 0:
                self._fail("is a big-endian GGUF file: convert the model to a little-endian one")
            self._fail(f"is GGUF version {version}; versions 2 and 3 are supported: convert the model again")
        n_tensors = self._number(_U64, "the number of tensors")
        n_keys = self._number(_U64, "the number of keys")
        # Minimum sizes: a key is name length, type and one byte; a tensor has one dimension.
        self._check_count(n_keys, 8 + 4 + 1, MAX_KEYS, "keys")
        self._check_count(n_tensors, 8 + 4 + 8 + 4 + 8, MAX_TENSORS, "tensors")
        return n_tensors, n_keys

    # ---- keys

    def _read_key(self) -> None:
        name = self._name("key")
        if name in self.metadata:
            self._fail(f"has a duplicate key {short_repr(name)}: {_DAMAGED}")
        kind = self._number(_U32, f"the type of {short_repr(name)}")
        self.metadata[name] = self._value(kind, name, 0)

    def _value(self, kind: int, name: str, depth: int) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {short_repr(name)}")
        if kind == _ARRAY:
            return self._array(name, depth)
        if kind not in _SCALARS:
            self._fail(f"key {short_repr(name)} has the unknown type {kind}: {_DAMAGED}")
        value = self._number(_SCALARS[kind][1], f"the value of {short_repr(name)}")
        if kind == _BOOL:
            if value > 1:
                self._fail(f"key {short_repr(name)} is {value}, not a boolean: {_DAMAGED}")
            return bool(value)
        return value

    def _array(self, name: str, depth: int) -> Any:
        if depth >= MAX_NESTING:
            self._fail(f"key {short_repr(name)} nests arrays more than {MAX_NESTING} deep: {_DAMAGED}")
        kind = self._number(_U32, f"the item type of {short_repr(name)}")
        count = self._number(_U64, f"the length of {short_repr(name)}")
        what = f"items in {short_repr(name)}"
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind][0])
            self._check_count(count, dtype.itemsize, self._size, what)
            items = np.frombuffer(self._data, dtype, count, self._pos).copy() if count else np.empty(0, dtype)
            self._pos += items.nbytes
            return items != 0 if kind == _BOOL else items
        if kind not in (_STRING, _ARRAY):
            self._fail(f"key {short_repr(name)} is an array of the unknown type {kind}: {_DAMAGED}")
        self._check_count(count, 8 if kind == _STRING else 12, self._items_left, what)
        self._items_left -= count
        if kind == _STRING:
            return self._strings(count, name)
        return [self._array(name, depth + 1) for _ in range(count)]

    def _strings(self, count: int, name: str) -> list[str]:
        # `_string` inlined for speed: a vocabulary with its merges has 100,000 strings.
        data, size, pos, unpack = self._data, self._size, self._pos, _U64.unpack_from
        strings: list[str] = []
        for index in range(count):
            if size - pos < 8:
                self._fail(f"ends within item {index} of {short_repr(name)}; {_TRUNCATED}")
            begin = pos + 8
            (length,) = unpack(data, pos)
            if length > size - begin:
                self._fail(f"ends within item {index} of {short_repr(name)}; {_TRUNCATED}")
            pos = begin + length
            try:
                strings.append(data[begin:pos].decode())
            except UnicodeDecodeError:
                self._fail(f"item {index} of {short_repr(name)} is not UTF-8: {_DAMAGED}")
        self._pos = pos
        return strings

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or value < 8 or value & (value - 1):
            self._fail(f"general.alignment is {short_repr(value)}; it must be a power of two, at least 8: {_DAMAGED}")
        return value

    # ---- tensors

    def _read_tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._name("tensor")
        what = f"the shape of tensor {short_repr(name)}"
        n_dims = self._number(_U32, what)
        if not 1 <= n_dims <= MAX_DIMS:
            self._fail(f"tensor {short_repr(name)} has {n_dims} dimensions; it must have 1 to {MAX_DIMS}: {_DAMAGED}")
        ne = [self._number(_U64, what) for _ in range(n_dims)]
        if 0 in ne:
            self._fail(f"tensor {short_repr(name)} has a dimension of 0: {_DAMAGED}")
        raw_type = self._number(_U32, f"the type of tensor {short_repr(name)}")
        try:
            ggml_type = GGMLQuantizationType(raw_type)
        except ValueError:
            self._fail(f"tensor {short_repr(name)} has the unknown type {raw_type}: convert the model to another type")
        block = GGML_QUANT_SIZES[ggml_type][0]
        if ne[0] % block:
            self._fail(f"tensor {short_repr(name)}: rows of {ne[0]} are not whole {ggml_type.name} blocks of {block}")
        offset = self._number(_U64, f"the offset of tensor {short_repr(name)}")
        return name, tuple(reversed(ne)), ggml_type, offset

    def _locate(
        self, entries: Iterable[tuple[str, tuple[int, ...], GGMLQuantizationType, int]], alignment: int
    ) -> None:
        """Convert offsets in the data to offsets in the file, and check bounds and overlaps."""
        begin = -(-self._pos // alignment) * alignment
        for name, shape, ggml_type, offset in entries:
            if name in self.tensors:
                self._fail(f"has a duplicate tensor {short_repr(name)}: {_DAMAGED}")
            if offset % alignment:
                self._fail(
                    f"the offset {offset} of tensor {short_repr(name)} is not aligned to {alignment}: {_DAMAGED}"
                )
            block, block_bytes = GGML_QUANT_SIZES[ggml_type]
            nbytes = math.prod(shape) // block * block_bytes
            if begin + offset + nbytes > self._size:
                self._fail(
                    f"tensor {short_repr(name)} needs bytes {begin + offset} to {begin + offset + nbytes} "
                    f"of a file of {self._size}; {_TRUNCATED}"
                )
            self.tensors[name] = GGUFTensor(name, shape, ggml_type, begin + offset, nbytes)
        last: GGUFTensor | None = None
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if last is not None and tensor.offset < last.offset + last.nbytes:
                self._fail(f"tensors {short_repr(last.name)} and {short_repr(tensor.name)} overlap: {_DAMAGED}")
            last = tensor

    # ---- bytes

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._pos:
            self._fail(f"ends within {what}; {_TRUNCATED}")
        begin, self._pos = self._pos, self._pos + count
        return self._data[begin : self._pos]

    def _number(self, layout: struct.Struct, what: str) -> Any:
        return layout.unpack(self._take(layout.size, what))[0]

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._number(_U64, what)
        if limit is not None and length > limit:
            self._fail(f"{what} has {length} bytes; the limit is {limit}: {_DAMAGED}")
        encoded = self._take(length, what)
        try:
            return encoded.decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is not UTF-8: {_DAMAGED}")

    def _name(self, what: str) -> str:
        return self._string(f"the name of a {what}", MAX_NAME)

    def _check_count(self, count: int, item_bytes: int, limit: int, what: str) -> None:
        left = self._size - self._pos
        if count * item_bytes > left:
            self._fail(f"states {count} {what} with {left} bytes left; {_TRUNCATED}")
        if count > limit:
            self._fail(f"states {count} {what}; the limit is {limit}")

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {reason}")
