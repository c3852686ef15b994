"""`StoredWeight` and `QuantizedWeight`: the tensors that hold one quantized weight, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from llm_edge.checkpoint.huggingface.weight_files import WeightFiles
from llm_edge.checkpoint.tensors.tensor_data import TensorInfo
from llm_edge.model.block_weights import BlockKind, SourceBlocks
from llm_edge.runtime.errors import CheckpointError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
Shape = tuple[int, ...]


class StoredWeight:
    """The tensors of one weight, whose names are a common prefix and the name of a part.

    All methods raise a `CheckpointError` that names the tensor if it is missing or invalid.

    Attributes:
        parts: full names of the tensors that were asked for and exist.
    """

    def __init__(self, files: WeightFiles, prefix: str) -> None:
        self._files = files
        self.prefix = prefix
        self.parts: set[str] = set()

    def __contains__(self, part: str) -> bool:
        return self.prefix + part in self._files.tensors

    def info(self, part: str, types: Collection[torch.dtype] | None = None, shape: Shape | None = None) -> TensorInfo:
        """Return shape and type of a part, which must be of these types and this shape."""
        name = self.prefix + part
        found = self._files.tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"{self._files.where}: tensor {name} of a quantized weight is missing: the checkpoint is incomplete, "
                "download it again"
            )
        if types is not None and found.dtype not in types:
            self.fail(part, f"is of type {_type(found.dtype)}, not {' or '.join(map(_type, types))}")
        if shape is not None and found.shape != shape:
            self.fail(part, f"has shape {found.shape}, not {shape}")
        self.parts.add(name)
        return found

    def matrix(self, part: str, types: Collection[torch.dtype]) -> tuple[int, int]:
        """Return the shape of a part that must have two dimensions, none of them empty."""
        shape = self.info(part, types).shape
        if len(shape) != 2 or 0 in shape:
            self.fail(part, f"has shape {shape}, not two dimensions")
        return shape[0], shape[1]

    def load(self, part: str) -> Tensor:
        """Read a part in the type of the file."""
        return self._files.load_stored(self.prefix + part)

    def fail(self, part: str, reason: str) -> NoReturn:
        """Raise a `CheckpointError` about a part."""
        raise CheckpointError(
            f"{self._files.where}: tensor {self.prefix}{part} {reason}: it does not match quantization_config"
        )


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight that is stored in quantized form.

    Attributes:
        name: of the tensor that it stands for.
        shape: of that tensor.
        parts: names of the stored tensors that make it up.
        kind: name of the storage type.
        load: reads and dequantizes it.
        dtype: of what `load` returns.
        block_kind: returns the block layout in which its numbers can be kept, or None if there is none.
        load_blocks: reads these numbers.
    """

    name: str
    shape: Shape
    parts: Collection[str]
    kind: str
    load: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32
    block_kind: Callable[[], BlockKind | None] = lambda: None
    load_blocks: Callable[[], SourceBlocks] | None = None


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
