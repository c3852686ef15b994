"""Reads a GGUF file: metadata, the table of tensors, a tensor's values. It knows no model and no tokenizer.

The file is taken for hostile. Every count, length and offset is held against the bytes that are left before
anything is allocated or looped over, so that what does not fit costs one `CheckpointError`, not minutes.

    magic "GGUF" | version u32 | tensors u64 | keys u64
    a key       name str | type u32 | value
    a tensor    name str | n_dims u32 | ne u64 x n_dims, fastest first | ggml type u32 | offset u64 in data
    padding to `general.alignment`, then the data
where a str is length u64 and UTF-8, and an array is item type u32, length u64 and the items.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llm_edge.runtime.errors import CheckpointError, MachineError

MAX_DIMS = 4
MAX_KEYS = 1 << 16  # real files have dozens
MAX_TENSORS = 1 << 18  # real files have thousands
MAX_ITEMS = 1 << 22  # strings and nested arrays in a file's metadata; the largest vocabularies have 2^19
MAX_NAME = 1 << 16
MAX_NESTING = 4
DEFAULT_ALIGNMENT = 32
CHUNK_ELEMENTS = 1 << 16  # dequantized at a time: few enough for the cache (2^14 and 2^18 took 1.5 times as long)

_STRING = 8
_ARRAY = 9
_BOOL = 7
# GGUF's number of a value type -> how numpy and struct read it
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
_CUT = "the file is cut short: download it again"
_DAMAGED = "the file is damaged: download it again"


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One row of the table of tensors; `offset` counts from the beginning of the file."""

    name: str
    shape: tuple[int, ...]  # as torch has it: [out, in]
    ggml_type: GGMLQuantizationType
    offset: int
    nbytes: int

    @property
    def n_elements(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


class GGUFFile:
    """A GGUF file (version 2 or 3, little-endian), mapped into memory and read on demand.

    A context manager, though leaving one out does no harm: the mapping goes with its last array.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map = _map_file(self.path)
        header = _Header(self.path, self._map)
        self.metadata: dict[str, Any] = header.metadata
        self.tensors: dict[str, GGUFTensor] = header.tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; arrays that `raw` gave out keep it mapped until they are gone."""
        self._map = None

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.metadata)} keys, {len(self.tensors)} tensors)"

    # ---- tensors

    def tensor(self, name: str) -> GGUFTensor:
        """The row of the table for `name`."""
        found = self.tensors.get(name)
        if found is None:
            self._fail(f"has no tensor {_show(name)}")
        return found

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor, read-only and not copied: quantized types as their blocks."""
        tensor = self.tensor(name)
        if self._map is None:
            raise ValueError(f"{self.path}: closed")
        return np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)

    def load(self, name: str) -> torch.Tensor:
        """The values of a tensor: F16 and BF16 in their own dtype, every other type as float32."""
        tensor = self.tensor(name)
        stored = self.raw(name)
        try:
            if tensor.ggml_type == GGMLQuantizationType.F16:
                return torch.from_numpy(stored.view("<f2").copy()).view(tensor.shape)
            if tensor.ggml_type == GGMLQuantizationType.BF16:
                return torch.from_numpy(stored.view("<i2").copy()).view(torch.bfloat16).view(tensor.shape)
            if tensor.ggml_type == GGMLQuantizationType.F32:
                return torch.from_numpy(stored.view("<f4").copy()).view(tensor.shape)
            return torch.from_numpy(self._dequantized(tensor, stored)).view(tensor.shape)
        except MemoryError as e:
            size = 4 * tensor.n_elements / 2**20
            raise MachineError(f"{self.path}: no memory for tensor {_show(name)} ({size:.0f} MiB)") from e

    def _dequantized(self, tensor: GGUFTensor, stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        block, block_bytes = GGML_QUANT_SIZES[tensor.ggml_type]
        step = max(CHUNK_ELEMENTS // block, 1) * block_bytes
        values = np.empty(tensor.n_elements, np.float32)
        done = 0
        # Blocks do not know of each other, so a run of them is given as one long row: gguf loops over rows.
        with np.errstate(all="ignore"):
            for begin in range(0, tensor.nbytes, step):
                chunk = stored[begin : begin + step].reshape(1, -1)
                try:
                    part = dequantize(chunk, tensor.ggml_type)
                except NotImplementedError as e:
                    raise CheckpointError(
                        f"{self.path}: tensor {_show(tensor.name)} is stored as {tensor.ggml_type.name}, "
                        "which cannot be dequantized here: convert the model to another type"
                    ) from e
                values[done : done + part.size] = part[0]
                done += part.size
        return values

    # ---- metadata, checked

    def meta_int(
        self, key: str, *, minimum: int | None = None, maximum: int | None = None, default: int | None = None
    ) -> int:
        """An integer of the metadata; `default` stands in where the key is missing."""
        value = self._meta(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(key, value, "an integer")
        self._in_range(key, value, minimum, maximum)
        return value

    def meta_float(
        self,
        key: str,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
        default: float | None = None,
    ) -> float:
        """A finite number of the metadata, integers included."""
        value = self._meta(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._wrong(key, value, "a finite number")
        self._in_range(key, value, minimum, maximum)
        return float(value)

    def meta_bool(self, key: str, *, default: bool | None = None) -> bool:
        """A truth value of the metadata."""
        value = self._meta(key, default)
        if not isinstance(value, bool):
            self._wrong(key, value, "true or false")
        return value

    def meta_str(self, key: str, *, default: str | None = None) -> str:
        """A string of the metadata."""
        value = self._meta(key, default)
        if not isinstance(value, str):
            self._wrong(key, value, "a string")
        return value

    def meta_strings(self, key: str) -> list[str]:
        """An array of strings."""
        value = self._meta(key, None)
        if isinstance(value, np.ndarray) and value.size == 0:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._wrong(key, value, "an array of strings")
        return value

    def meta_ints(self, key: str, *, length: int | None = None) -> list[int]:
        """An array of integers, of `length` where that is given."""
        value = self._meta(key, None)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            self._wrong(key, value, "an array of integers")
        if length is not None and len(value) != length:
            self._fail(f"{key} has {len(value)} entries, {length} are needed")
        return [int(item) for item in value.tolist()]

    def _meta(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            self._fail(f"the metadata has no {key}: convert the model again with a current llama.cpp")
        return value

    def _in_range(self, key: str, value: float, minimum: float | None, maximum: float | None) -> None:
        if minimum is not None and value < minimum:
            self._fail(f"{key} is {value}, at least {minimum} is needed")
        if maximum is not None and value > maximum:
            self._fail(f"{key} is {value}, at most {maximum} is possible")

    def _wrong(self, key: str, value: Any, wanted: str) -> NoReturn:
        is_array = isinstance(value, list | np.ndarray)
        self._fail(f"{key} is {'an array' if is_array else _show(value)}, {wanted} is needed")

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}")


class _Header:
    """One pass over everything before the data; `_pos` is the next byte to read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._pos = 0
        self._items_left = MAX_ITEMS
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}

        n_tensors, n_keys = self._counts()
        for _ in range(n_keys):
            self._key()
        if self.metadata.get("split.count", 0) not in (0, 1):
            self._fail(
                f"is one of {_show(self.metadata['split.count'])} parts of a split model: "
                "merge them first (llama-gguf-split --merge)"
            )
        alignment = self._alignment()
        rows = [self._tensor() for _ in range(n_tensors)]
        self._place(rows, alignment)

    def _counts(self) -> tuple[int, int]:
        magic = self._take(4, "the magic number")
        if magic != b"GGUF":
            self._fail(f"is not a GGUF file: it begins with {magic!r}")
        version = self._number(_U32, "the version")
        if version not in (2, 3):
            if version and version & 0xFFFF == 0:
                self._fail("is a big-endian GGUF file: convert the model to a little-endian one")
            self._fail(f"is GGUF version {version}; versions 2 and 3 can be read: convert the model again")
        n_tensors = self._number(_U64, "the number of tensors")
        n_keys = self._number(_U64, "the number of keys")
        # The smallest key is name length, type, one byte; the smallest tensor has one dimension.
        self._check_count(n_keys, 8 + 4 + 1, MAX_KEYS, "keys")
        self._check_count(n_tensors, 8 + 4 + 8 + 4 + 8, MAX_TENSORS, "tensors")
        return n_tensors, n_keys

    # ---- keys

    def _key(self) -> None:
        name = self._name("key")
        if name in self.metadata:
            self._fail(f"has the key {_show(name)} twice: {_DAMAGED}")
        kind = self._number(_U32, f"the type of {_show(name)}")
        self.metadata[name] = self._value(kind, name, 0)

    def _value(self, kind: int, name: str, depth: int) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {_show(name)}")
        if kind == _ARRAY:
            return self._array(name, depth)
        if kind not in _SCALARS:
            self._fail(f"key {_show(name)} has the unknown type {kind}: {_DAMAGED}")
        value = self._number(_SCALARS[kind][1], f"the value of {_show(name)}")
        if kind == _BOOL:
            if value > 1:
                self._fail(f"key {_show(name)} is neither true nor false but {value}: {_DAMAGED}")
            return bool(value)
        return value

    def _array(self, name: str, depth: int) -> Any:
        if depth >= MAX_NESTING:
            self._fail(f"key {_show(name)} nests arrays more than {MAX_NESTING} deep: {_DAMAGED}")
        kind = self._number(_U32, f"the item type of {_show(name)}")
        count = self._number(_U64, f"the length of {_show(name)}")
        what = f"items in {_show(name)}"
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind][0])
            self._check_count(count, dtype.itemsize, self._size, what)
            items = np.frombuffer(self._data, dtype, count, self._pos).copy() if count else np.empty(0, dtype)
            self._pos += items.nbytes
            return items != 0 if kind == _BOOL else items
        if kind not in (_STRING, _ARRAY):
            self._fail(f"key {_show(name)} is an array of the unknown type {kind}: {_DAMAGED}")
        self._check_count(count, 8 if kind == _STRING else 12, self._items_left, what)
        self._items_left -= count
        if kind == _STRING:
            return self._strings(count, name)
        return [self._array(name, depth + 1) for _ in range(count)]

    def _strings(self, count: int, name: str) -> list[str]:
        # A vocabulary with its merges is 100,000 strings: `_string`, written out for speed.
        data, size, pos, unpack = self._data, self._size, self._pos, _U64.unpack_from
        strings: list[str] = []
        for index in range(count):
            if size - pos < 8:
                self._fail(f"ends within item {index} of {_show(name)}; {_CUT}")
            begin = pos + 8
            (length,) = unpack(data, pos)
            if length > size - begin:
                self._fail(f"ends within item {index} of {_show(name)}; {_CUT}")
            pos = begin + length
            try:
                strings.append(data[begin:pos].decode())
            except UnicodeDecodeError:
                self._fail(f"item {index} of {_show(name)} is not UTF-8: {_DAMAGED}")
        self._pos = pos
        return strings

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or value < 8 or value & (value - 1):
            self._fail(f"general.alignment is {_show(value)}, a power of two from 8 on is needed: {_DAMAGED}")
        return value

    # ---- tensors

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._name("tensor")
        what = f"the shape of tensor {_show(name)}"
        n_dims = self._number(_U32, what)
        if not 1 <= n_dims <= MAX_DIMS:
            self._fail(f"tensor {_show(name)} has {n_dims} dimensions, 1 to {MAX_DIMS} are possible: {_DAMAGED}")
        ne = [self._number(_U64, what) for _ in range(n_dims)]
        if 0 in ne:
            self._fail(f"tensor {_show(name)} has a dimension of 0: {_DAMAGED}")
        raw_type = self._number(_U32, f"the type of tensor {_show(name)}")
        try:
            ggml_type = GGMLQuantizationType(raw_type)
        except ValueError:
            self._fail(f"tensor {_show(name)} has the unknown type {raw_type}: convert the model to another type")
        block = GGML_QUANT_SIZES[ggml_type][0]
        if ne[0] % block:
            self._fail(f"tensor {_show(name)}: rows of {ne[0]} are not whole {ggml_type.name} blocks of {block}")
        offset = self._number(_U64, f"the offset of tensor {_show(name)}")
        return name, tuple(reversed(ne)), ggml_type, offset

    def _place(self, rows: Iterable[tuple[str, tuple[int, ...], GGMLQuantizationType, int]], alignment: int) -> None:
        """Turn offsets in the data into offsets in the file, and see that every tensor has its own bytes."""
        begin = -(-self._pos // alignment) * alignment
        for name, shape, ggml_type, offset in rows:
            if name in self.tensors:
                self._fail(f"has the tensor {_show(name)} twice: {_DAMAGED}")
            if offset % alignment:
                self._fail(f"tensor {_show(name)} lies at {offset}, not aligned to {alignment}: {_DAMAGED}")
            block, block_bytes = GGML_QUANT_SIZES[ggml_type]
            nbytes = math.prod(shape) // block * block_bytes  # Python's integers: no overflow
            if begin + offset + nbytes > self._size:
                self._fail(
                    f"tensor {_show(name)} needs bytes {begin + offset} to {begin + offset + nbytes} "
                    f"of a file of {self._size}; {_CUT}"
                )
            self.tensors[name] = GGUFTensor(name, shape, ggml_type, begin + offset, nbytes)
        last: GGUFTensor | None = None
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if last is not None and tensor.offset < last.offset + last.nbytes:
                self._fail(f"tensors {_show(last.name)} and {_show(tensor.name)} share bytes: {_DAMAGED}")
            last = tensor

    # ---- bytes

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._pos:
            self._fail(f"ends within {what}; {_CUT}")
        begin, self._pos = self._pos, self._pos + count
        return self._data[begin : self._pos]

    def _number(self, layout: struct.Struct, what: str) -> Any:
        return layout.unpack(self._take(layout.size, what))[0]

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._number(_U64, what)
        if limit is not None and length > limit:
            self._fail(f"{what} has {length} bytes, at most {limit} are possible: {_DAMAGED}")
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
            self._fail(f"claims {count} {what} with {left} bytes left; {_CUT}")
        if count > limit:
            self._fail(f"claims {count} {what}, more than the {limit} that are read here")

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {reason}")


def _map_file(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{path}: the file is empty: download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: no such file") from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e


def _show(value: object) -> str:
    """A value from the file as one short, printable line."""
    text = value[:80] if isinstance(value, str) else value
    shown = ascii(text)
    return shown if len(shown) <= 100 else shown[:97] + "..."
