"""`GGUFFile`: metadata and tensors of a GGUF file."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llm_edge.checkpoint.gguf.blocks import TYPES, read_blocks
from llm_edge.checkpoint.gguf.header import GGUFTensor, Header
from llm_edge.checkpoint.gguf.split import other_parts, read_part
from llm_edge.model.block_weights import BlockKind, SourceBlocks
from llm_edge.runtime.errors import CheckpointError, MachineError
from llm_edge.runtime.safe_io import short_repr

CHUNK_ELEMENTS = 1 << 16  # dequantized at a time to stay in the CPU cache (2^14 and 2^18 took 1.5 times as long)


class GGUFFile:
    """A GGUF file (version 2 or 3, little-endian), mapped into memory and read on demand.

    Given the first part of a split model, it has the tensors of all parts. The mapping is released with the file object
    and its last array.

    Attributes:
        path: the file, or its first part.
        parts: paths of all files that were read.
        metadata: keys and values; numeric arrays are NumPy arrays.
        tensors: the table of tensors.

    Raises:
        CheckpointError: the file or a part is missing or damaged, or it is a part other than the first.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        first = _map_file(self.path)
        header = Header(self.path, first)
        self.metadata: dict[str, Any] = header.metadata
        self.tensors: dict[str, GGUFTensor] = dict(header.tensors)
        self._maps = dict.fromkeys(header.tensors, first)
        self.parts = [self.path]
        for part in other_parts(self.path, header.metadata):
            data = _map_file(part)
            tensors = read_part(part, data, len(self.parts), self.metadata)
            if shared := self.tensors.keys() & tensors.keys():
                raise CheckpointError(f"{part}: tensor {short_repr(min(shared))} is in an earlier part too")
            self.tensors |= tensors
            self._maps |= dict.fromkeys(tensors, data)
            self.parts.append(part)
        expected = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(self.parts) > 1 and expected != len(self.tensors):
            self.fail(
                f"its parts have {len(self.tensors)} tensors instead of {short_repr(expected)}: download them again"
            )

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.metadata)} keys, {len(self.tensors)} tensors)"

    # ---- tensors

    def tensor(self, name: str) -> GGUFTensor:
        """Return shape, type and location of a tensor."""
        found = self.tensors.get(name)
        if found is None:
            self.fail(f"has no tensor {short_repr(name)}")
        return found

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the stored bytes of a tensor as a read-only view; quantized types as their blocks."""
        tensor = self.tensor(name)
        return np.frombuffer(self._maps[name], np.uint8, tensor.nbytes, tensor.offset)

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor: F16 and BF16 in their own dtype, every other type as float32."""
        tensor = self.tensor(name)
        stored = self.raw(name)
        try:
            if tensor.ggml_type == GGMLQuantizationType.F16:
                return torch.from_numpy(stored.view("<f2").copy()).view(tensor.shape)
            if tensor.ggml_type == GGMLQuantizationType.BF16:
                return torch.from_numpy(stored.view("<i2").copy()).view(torch.bfloat16).view(tensor.shape)
            if tensor.ggml_type == GGMLQuantizationType.F32:
                return torch.from_numpy(stored.view("<f4").copy()).view(tensor.shape)
            return torch.from_numpy(self._dequantize(tensor)).view(tensor.shape)
        except MemoryError as e:
            raise self._no_memory(tensor, 4) from e

    def block_kind(self, name: str) -> BlockKind | None:
        """Return the block layout of a tensor, or None if it is stored in another way."""
        tensor = self.tensor(name)
        found = TYPES.get(tensor.ggml_type)
        return found.kind if found is not None and len(tensor.shape) == 2 else None

    def blocks(self, name: str) -> SourceBlocks:
        """Read the blocks of a tensor."""
        tensor = self.tensor(name)
        try:
            return read_blocks(self.raw(name), tensor.ggml_type, tensor.shape[0])
        except MemoryError as e:
            raise self._no_memory(tensor, 1) from e

    def _no_memory(self, tensor: GGUFTensor, bytes_per_weight: int) -> MachineError:
        size = bytes_per_weight * tensor.n_elements / 2**20
        return MachineError(f"{self.path}: no memory for tensor {short_repr(tensor.name)} ({size:.0f} MiB)")

    def equal(self, name: str, other: str) -> bool:
        """Return whether two tensors have the same shape and the same numbers, perhaps in different types."""
        first, second = self.tensor(name), self.tensor(other)
        if first.shape != second.shape:
            return False
        if first.ggml_type == second.ggml_type:
            stored, others = self.raw(name), self.raw(other)
            starts = range(0, first.nbytes, CHUNK_ELEMENTS)
            return all(
                np.array_equal(stored[at : at + CHUNK_ELEMENTS], others[at : at + CHUNK_ELEMENTS]) for at in starts
            )
        return all(map(np.array_equal, self._chunks(first), self._chunks(second)))

    def _dequantize(self, tensor: GGUFTensor) -> npt.NDArray[np.float32]:
        values = np.empty(tensor.n_elements, np.float32)
        done = 0
        for chunk in self._chunks(tensor):
            values[done : done + chunk.size] = chunk
            done += chunk.size
        return values

    def _chunks(self, tensor: GGUFTensor) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the values of a tensor, `CHUNK_ELEMENTS` at a time."""
        stored = self.raw(tensor.name)
        block, block_bytes = GGML_QUANT_SIZES[tensor.ggml_type]
        step = max(CHUNK_ELEMENTS // block, 1) * block_bytes
        # Blocks are independent, so each chunk is passed as one long row: gguf loops over rows in Python.
        for begin in range(0, tensor.nbytes, step):
            chunk = stored[begin : begin + step].reshape(1, -1)
            try:
                with np.errstate(all="ignore"):
                    yield dequantize(chunk, tensor.ggml_type)[0]
            except NotImplementedError as e:
                raise CheckpointError(
                    f"{self.path}: tensor {short_repr(tensor.name)} is stored as {tensor.ggml_type.name}, "
                    "which is not supported: convert the model to another type"
                ) from e

    # ---- metadata, type-checked; a missing key without a default is an error

    def meta_int(
        self, key: str, *, minimum: int | None = None, maximum: int | None = None, default: int | None = None
    ) -> int:
        """Return an integer."""
        value = self._meta(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self._fail_type(key, value, "an integer")
        self._check_range(key, value, minimum, maximum)
        return value

    def meta_float(
        self,
        key: str,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
        default: float | None = None,
    ) -> float:
        """Return an integer or finite float as a float."""
        value = self._meta(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._fail_type(key, value, "a finite number")
        self._check_range(key, value, minimum, maximum)
        return float(value)

    def meta_bool(self, key: str, *, default: bool | None = None) -> bool:
        """Return a boolean."""
        value = self._meta(key, default)
        if not isinstance(value, bool):
            self._fail_type(key, value, "true or false")
        return value

    def meta_str(self, key: str, *, default: str | None = None) -> str:
        """Return a string."""
        value = self._meta(key, default)
        if not isinstance(value, str):
            self._fail_type(key, value, "a string")
        return value

    def meta_strings(self, key: str) -> list[str]:
        """Return an array of strings."""
        value = self._meta(key, None)
        if isinstance(value, np.ndarray) and value.size == 0:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._fail_type(key, value, "an array of strings")
        return value

    def meta_ints(self, key: str, *, length: int | None = None) -> list[int]:
        """Return an array of integers, checking its length if given."""
        value = self._meta(key, None)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            self._fail_type(key, value, "an array of integers")
        if length is not None and len(value) != length:
            self.fail(f"{key} has {len(value)} entries; {length} are required")
        return [int(item) for item in value.tolist()]

    def _meta(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            self.fail(f"the metadata has no {key}: convert the model again with a current llama.cpp")
        return value

    def _check_range(self, key: str, value: float, minimum: float | None, maximum: float | None) -> None:
        if minimum is not None and value < minimum:
            self.fail(f"{key} is {value}; it must be at least {minimum}")
        if maximum is not None and value > maximum:
            self.fail(f"{key} is {value}; it must be at most {maximum}")

    def _fail_type(self, key: str, value: Any, expected: str) -> NoReturn:
        is_array = isinstance(value, list | np.ndarray)
        self.fail(f"{key} is {'an array' if is_array else short_repr(value)}, not {expected}")

    def fail(self, reason: str) -> NoReturn:
        """Raise a `CheckpointError` about this file."""
        raise CheckpointError(f"{self.path}: {reason}")


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
