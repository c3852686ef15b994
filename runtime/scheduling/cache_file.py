"""Saves the cache of a text to a file (an uncompressed npz), and loads it as untrusted input.

identity   hash of the graph that computed it; other graphs cannot use it
tokens     int64 [T]
0 … n-1    keys and values [K, T, D], and states [*shape] after T tokens, in the order of `ModelShape.caches`
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_edge.runtime.bundle import Bundle, PrecisionInfo
from llm_edge.runtime.errors import InputError, MachineError
from llm_edge.runtime.model_shape import ModelShape
from llm_edge.runtime.safe_io import write_atomically

Array = npt.NDArray[Any]
_HEADER_BYTES = 4096  # maximum size of an array's header


def identity(bundle: Bundle, precision: PrecisionInfo) -> str:
    """A hash that identifies a graph and its weights."""
    files = {name: entry for name, entry in bundle.manifest["files"].items() if name.startswith(precision.model)}
    return hashlib.sha256(repr(sorted((name, entry["sha256"]) for name, entry in files.items())).encode()).hexdigest()


def save(path: Path, identity_: str, tokens: Sequence[int], values: Sequence[Array]) -> None:
    """Write a file atomically; raises MachineError if it cannot be written."""
    arrays: dict[str, Any] = {str(index): value for index, value in enumerate(values)}
    arrays |= {"identity": np.array(identity_), "tokens": np.array(tokens, dtype=np.int64)}
    try:
        write_atomically(path, lambda file: np.savez(file, **arrays))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise MachineError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def load(
    path: Path, identity_: str, model: ModelShape, dtypes: Sequence[np.dtype[Any]]
) -> tuple[list[int], list[Array]]:
    """Load what `save` wrote: token ids, and the tensors of `model.caches`, which have these types.

    Raises:
        InputError: the file is missing, damaged, or of another graph.
    """
    limit, caches = model.max_position_embeddings, model.caches
    sizes = [math.prod(tensor.sized(limit)) * dtype.itemsize for tensor, dtype in zip(caches, dtypes, strict=True)]
    limit_bytes = max(*sizes, limit * 8) + _HEADER_BYTES
    try:
        with _Bounded(path, len(caches)) as file, zipfile.ZipFile(file) as archive:
            file.limit = limit_bytes
            if str(_array(archive, "identity", (), np.dtype("<U64"))) != identity_:
                raise InputError(f"{path}: computed by another bundle or precision: create it again with this one")
            ids = np.dtype(np.int64)
            length = (archive.getinfo("tokens.npy").file_size - len(_header((1,), ids))) // ids.itemsize
            if not 0 < length <= limit:
                raise ValueError("tokens")
            tokens: list[int] = _array(archive, "tokens", (length,), ids).tolist()
            kinds = [(tensor.sized(length), dtype) for tensor, dtype in zip(caches, dtypes, strict=True)]
            return tokens, [_array(archive, str(index), *kind) for index, kind in enumerate(kinds)]
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # whatever zipfile raises for damaged archives
        raise InputError(f"{path}: not a cache of this model, or damaged: create it again") from error


class _Bounded(io.FileIO):
    """A regular file that returns at most `limit` bytes per read, whatever sizes it declares.

    zipfile first reads the whole directory, which is short for `count` arrays.
    """

    def __init__(self, path: Path, count: int) -> None:
        super().__init__(path, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
        if not stat.S_ISREG(os.fstat(self.fileno()).st_mode):  # reading a pipe would block
            self.close()
            raise OSError("not a regular file")
        self.limit = 2**16 + 128 * (count + 32)  # zipfile searches the last 64 KiB for the directory

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most `limit` bytes; raises ValueError if there are more."""
        data = super().read(self.limit + 1 if size is None or size < 0 else min(size, self.limit + 1)) or b""
        if len(data) > self.limit:
            raise ValueError("larger than a cache")
        return data


def _array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array whose header must equal the one that numpy writes, so that no header is parsed."""
    info = archive.getinfo(f"{name}.npy")
    header = _header(shape, dtype)
    size = len(header) + math.prod(shape) * dtype.itemsize
    if info.compress_type != zipfile.ZIP_STORED or not info.file_size == info.compress_size == size:
        raise ValueError(name)
    data = archive.read(info)
    if not data.startswith(header):
        raise ValueError(name)
    return np.frombuffer(data, dtype=dtype, offset=len(header)).reshape(shape)


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    file = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()
