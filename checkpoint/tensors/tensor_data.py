"""Reads the data of plain tensors from a file, given their locations.

Files are not kept open, and only the requested tensor is held in memory.
"""

from __future__ import annotations

import io
import math
import os
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch

from llm_edge.runtime.errors import CheckpointError, MachineError
from llm_edge.runtime.safe_io import short_repr

MAX_DIMS = 16  # real weights have 1 to 4
MAX_ELEMENTS = 1 << 48
MAX_NAME = 1 << 12
TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
"""Supported types of weights and their display names."""
LOADABLE = frozenset({
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
})  # fmt: skip

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and type of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Checksum:
    """A range of bytes in the file and its expected CRC-32."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Location of a tensor's data: `info.nbytes` contiguous bytes."""

    info: TensorInfo
    offset: int  # position in the file
    order: tuple[int, ...] | None = None  # dimensions in memory order, slowest first; None for row-major order
    checksum: Checksum | None = None  # of a byte range that contains the data, if the format has one


class TensorReader:
    """A regular file of tensors, open for the duration of a `with` block.

    All methods raise a `CheckpointError` if the file cannot be read or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Opened without blocking and checked before reading, so that a pipe does not hang.
            raw = io.FileIO(path, "rb", opener=lambda p, f: os.open(p, f | getattr(os, "O_NONBLOCK", 0)))
            self._file = io.BufferedReader(raw)
            status = os.fstat(self._file.fileno())
        except FileNotFoundError as e:
            raise CheckpointError(f"{path}: no such file") from e
        except IsADirectoryError as e:
            raise CheckpointError(f"{path}: a folder, not a file") from e
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            raise CheckpointError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self._file.close()
            self.fail("not a regular file")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def fail(self, reason: str) -> NoReturn:
        """Raise a `CheckpointError` about this file."""
        raise CheckpointError(f"{self.path}: {reason}")

    def stream(self) -> BinaryIO:
        """Return the open file, positioned at its start; other reads change the position."""
        self._file.seek(0)
        return self._file

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; the caller has checked both against `self.size`."""
        return self._fill(offset, size).tobytes()

    def verify(self, checksum: Checksum, what: str) -> None:
        """Check a CRC-32, reading at most 1 MiB at a time."""
        crc = 0
        end = checksum.offset + checksum.size
        for offset in range(checksum.offset, end, _BLOCK):
            crc = zlib.crc32(self._fill(offset, min(_BLOCK, end - offset)).data, crc)
        if crc != checksum.crc32:
            self.fail(f"{what} does not match its checksum: the file is damaged, download it again")

    def tensor(self, location: TensorLocation) -> torch.Tensor:
        """Return the tensor at a location, contiguous and in newly allocated memory."""
        info = location.info
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        stored = self._fill(location.offset, info.nbytes)
        flat = torch.from_numpy(stored != 0 if info.dtype is torch.bool else stored).view(info.dtype)
        if location.order is None:
            return flat.view(info.shape)
        inverse = [location.order.index(dim) for dim in range(len(info.shape))]
        return flat.view([info.shape[dim] for dim in location.order]).permute(inverse).contiguous()

    def _fill(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        try:
            buffer = np.empty(size, np.uint8)
        except MemoryError as e:
            raise MachineError(f"{self.path}: no memory for {size / 2**20:.0f} MiB of it") from e
        rest = buffer.data
        try:
            self._file.seek(offset)
            while rest and (count := self._file.readinto(rest)):
                rest = rest[count:]
        except OSError as e:
            self.fail(f"cannot be read: {e.strerror or e}")
        if rest:
            self.fail("was truncated while it was read: try again")
        return buffer


def check_name(file: TensorReader, name: object) -> str:
    """Return the name of a tensor if it is a printable string, else fail."""
    if not isinstance(name, str):
        file.fail("has a tensor name that is not a string: save a state_dict")
    if len(name) > MAX_NAME or not name.isprintable():
        file.fail(f"has an unprintable tensor name {short_repr(name)}: the file is damaged, download it again")
    return name


def is_shape(shape: Sequence[object]) -> bool:
    """Whether a shape is valid: non-negative integers, with a limited number of dimensions and elements."""
    elements = 1
    for size in shape[: MAX_DIMS + 1]:
        if type(size) is not int or not 0 <= size <= MAX_ELEMENTS:
            return False
        elements *= max(size, 1)  # torch computes strides as if an empty dimension had size 1
    return len(shape) <= MAX_DIMS and elements <= MAX_ELEMENTS
