"""Reads a GGUF file: metadata, the table of tensors, a tensor's values. It knows no model and no tokenizer."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llm_edge.checkpoint.gguf.header import GGUFTensor, Header
from llm_edge.model.block_weights import SOURCE_BLOCK, BlockKind, SourceBlocks
from llm_edge.runtime.errors import CheckpointError, MachineError
from llm_edge.runtime.show import show

CHUNK_ELEMENTS = 1 << 16  # dequantized at a time: few enough for the cache (2^14 and 2^18 took 1.5 times as long)

# Blocks whose numbers other runtimes take as they are, by ggml's block_q4_0, block_q4_1 and block_q8_0 (ggml-common.h):
# d is the scale and m the least weight; the low halves of q are the first 16 weights, the high halves the others.
_Q4 = ("q", "u1", (SOURCE_BLOCK // 2,))
_BLOCKS = {
    GGMLQuantizationType.Q4_0: (BlockKind(4, offsets=False), np.dtype([("d", "<f2"), _Q4])),
    GGMLQuantizationType.Q4_1: (BlockKind(4, offsets=True), np.dtype([("d", "<f2"), ("m", "<f2"), _Q4])),
    GGMLQuantizationType.Q8_0: (BlockKind(8, offsets=False), np.dtype([("d", "<f2"), ("q", "u1", (SOURCE_BLOCK,))])),
}


class GGUFFile:
    """A GGUF file (version 2 or 3, little-endian), mapped into memory and read on demand.

    A context manager, though leaving one out does no harm: the mapping goes with its last array.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map = _map_file(self.path)
        header = Header(self.path, self._map)
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
            self._fail(f"has no tensor {show(name)}")
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
            raise self._no_memory(tensor, 4) from e

    def block_kind(self, name: str) -> BlockKind | None:
        """See `BlockReader`."""
        tensor = self.tensor(name)
        kind, _ = _BLOCKS.get(tensor.ggml_type, (None, None))
        return kind if len(tensor.shape) == 2 else None

    def blocks(self, name: str) -> SourceBlocks:
        """See `BlockReader`; offsets are the sum of m and 8 d, rounded to float32."""
        tensor = self.tensor(name)
        kind, layout = _BLOCKS[tensor.ggml_type]
        stored = self.raw(name).view(layout).reshape(tensor.shape[0], -1)  # [N, K / 32]
        try:
            scales = stored["d"].astype(np.float32)
            whole = stored["q"]
            # Of 8 bits, from numbers with a sign to those whose zero is 128
            levels = np.concatenate([whole & 15, whole >> 4], axis=-1) if kind.bits == 4 else whole ^ 128
            offsets = None
            if kind.offsets:
                with np.errstate(all="ignore"):
                    offsets = torch.from_numpy(stored["m"].astype(np.float32) + 8 * scales)
            return SourceBlocks(torch.from_numpy(levels).view(tensor.shape), torch.from_numpy(scales), offsets)
        except MemoryError as e:
            raise self._no_memory(tensor, 1) from e

    def _no_memory(self, tensor: GGUFTensor, bytes_per_weight: int) -> MachineError:
        size = bytes_per_weight * tensor.n_elements / 2**20
        return MachineError(f"{self.path}: no memory for tensor {show(tensor.name)} ({size:.0f} MiB)")

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
                        f"{self.path}: tensor {show(tensor.name)} is stored as {tensor.ggml_type.name}, "
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
        self._fail(f"{key} is {'an array' if is_array else show(value)}, {wanted} is needed")

    def _fail(self, reason: str) -> NoReturn:
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
