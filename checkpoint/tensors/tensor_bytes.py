"""Plain tensors inside of a file: where their bytes lie, and reading them. It knows no format that puts them there.

Nothing is kept open and nothing but the tensor asked for is held, whatever the size of the file.
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
from llm_edge.runtime.show import show

MAX_DIMS = 16  # real weights have 1 to 4
MAX_ELEMENTS = 1 << 48
MAX_NAME = 1 << 12
TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
"""Types that weights may have, and what people call them."""
LOADABLE = frozenset(
    {
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint64,
        torch.uint32,
        torch.uint16,
        torch.uint8,
        torch.bool,
    }
)

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and type of a tensor as its file states them."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Checksum:
    """A run of bytes in the file and the CRC-32 it must have."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: `info.nbytes` bytes without gaps from `offset` (in the file) on.

    Attributes:
        order: the tensor's dimensions as memory has them, slowest first; None where that is their own order.
        checksum: of the bytes around the tensor, where the format has one.
    """

    info: TensorInfo
    offset: int
    order: tuple[int, ...] | None = None
    checksum: Checksum | None = None


class FileBytes:
    """A regular file, open while the `with` block lasts. Every failure is a CheckpointError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Not to hang on a pipe, the file is opened without waiting and looked at before it is read.
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
        """Raise a CheckpointError about this file."""
        raise CheckpointError(f"{self.path}: {reason}")

    def stream(self) -> BinaryIO:
        """The file from its beginning on; every other read moves it."""
        self._file.seek(0)
        return self._file

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; both were held against `self.size` before."""
        return self._filled(offset, size).tobytes()

    def verify(self, checksum: Checksum, what: str) -> None:
        """Compare a CRC-32 in one pass that holds a MiB at most."""
        crc = 0
        end = checksum.offset + checksum.size
        for offset in range(checksum.offset, end, _BLOCK):
            crc = zlib.crc32(self._filled(offset, min(_BLOCK, end - offset)).data, crc)
        if crc != checksum.crc32:
            self.fail(f"{what} does not have the checksum the file states: the file is damaged, download it again")

    def tensor(self, place: Place) -> torch.Tensor:
        """The tensor at `place`, contiguous, in memory of its own."""
        info = place.info
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        stored = self._filled(place.offset, info.nbytes)
        flat = torch.from_numpy(stored != 0 if info.dtype is torch.bool else stored).view(info.dtype)
        if place.order is None:
            return flat.view(info.shape)
        inverse = [place.order.index(dim) for dim in range(len(info.shape))]
        return flat.view([info.shape[dim] for dim in place.order]).permute(inverse).contiguous()

    def _filled(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
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
            self.fail("became shorter while it was read: try again")
        return buffer


def check_name(file: FileBytes, name: object) -> str:
    """The name of a tensor, if it is text that can be printed."""
    if not isinstance(name, str):
        file.fail("names a tensor with something else than a text: save a state_dict")
    if len(name) > MAX_NAME or not name.isprintable():
        file.fail(f"names a tensor {show(name)}, which cannot be printed: the file is damaged, download it again")
    return name


def is_shape(shape: Sequence[object]) -> bool:
    """Whether these are sizes of a tensor that can be: integers, not too many, their product within bounds."""
    elements = 1
    for size in shape[: MAX_DIMS + 1]:
        if type(size) is not int or not 0 <= size <= MAX_ELEMENTS:
            return False
        elements *= max(size, 1)  # torch multiplies strides past an empty dimension
    return len(shape) <= MAX_DIMS and elements <= MAX_ELEMENTS
