"""`ModelParallelShards`: a model of which each file holds a slice of every matrix, as in Meta's larger releases.

Files are `consolidated.00.pth`, `consolidated.01.pth`, … The slices are those of fairscale's layers in Meta's
`model.py`: ColumnParallelLinear has rows of the weight, RowParallelLinear columns, ParallelEmbedding columns (Llama 1
and 2) or rows (Llama 3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from llm_edge.checkpoint.tensors.tensor_data import TensorInfo
from llm_edge.checkpoint.tensors.tensor_file import TensorFile
from llm_edge.runtime.errors import CheckpointError

SHARD = re.compile(r"consolidated\.(\d{2,4})\.(pth|pt|safetensors)")
_COLUMNS = re.compile(r"(.*\.)?(wo|w2)\.weight")
_EMBEDDING = "tok_embeddings.weight"


class ModelTensors(Protocol):
    """The tensors of a model in one file or several."""

    @property
    def path(self) -> Path:
        """The first file, for messages."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and type of every tensor."""

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor."""


def find_shards(path: Path) -> list[Path]:
    """Return all shards of the model that a file belongs to, in order; another file is the only one.

    Raises:
        CheckpointError: a shard is missing, or the folder cannot be read.
    """
    match = SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    try:
        others = [each for each in path.parent.iterdir() if (m := SHARD.fullmatch(each.name)) and m[2] == match[2]]
    except OSError as error:
        raise CheckpointError(f"{path.parent}: cannot be read ({error.strerror})") from error
    shards = sorted(others, key=lambda each: each.name)
    names = {each.name for each in shards}
    expected = [f"consolidated.{number:0{len(match[1])}}.{match[2]}" for number in range(len(shards))]
    missing = next((name for name in expected if name not in names), None)
    if missing is not None:
        raise CheckpointError(f"{path.parent / missing} is missing: the checkpoint is incomplete, download it again")
    return shards


class ModelParallelShards:
    """The tensors of all shards; each is concatenated when it is read.

    Raises:
        CheckpointError: the shards do not have the same tensors, or their shapes do not fit together.
    """

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self._files = files
        self.path = files[0].path
        for file in files[1:]:
            different = sorted(files[0].tensors.keys() ^ file.tensors.keys())
            if different:
                raise CheckpointError(
                    f"{file.path}: {different[0]} is not in every shard: they are of different models"
                )
        norm = files[0].tensors.get("norm.weight")
        self._width = norm.shape[0] if norm is not None and norm.shape else None
        self.tensors = {name: self._info(name) for name in files[0].tensors}

    def _axis(self, name: str) -> int | None:
        """Return the axis along which a tensor is sliced; None if every shard has all of it."""
        info = self._files[0].tensors[name]
        if len(info.shape) != 2:
            return None
        if name == _EMBEDDING:
            return 0 if info.shape[1] == self._width else 1
        return 1 if _COLUMNS.fullmatch(name) else 0

    def _info(self, name: str) -> TensorInfo:
        axis, (first, *others) = self._axis(name), [file.tensors[name] for file in self._files]
        if any(other != first for other in others):
            raise CheckpointError(
                f"{self.path}: the shards have different shapes or types of {name}: they are of different models"
            )
        shape = list(first.shape)
        if axis is not None:
            shape[axis] *= len(self._files)
        return TensorInfo(tuple(shape), first.dtype)

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor from all shards."""
        if name not in self.tensors:
            return self._files[0].load(name)  # raises
        axis = self._axis(name)
        if axis is None:
            return self._files[0].load(name)
        return torch.cat([file.load(name) for file in self._files], dim=axis)
