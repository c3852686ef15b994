"""Finds the weight files of a Hugging Face checkpoint and reads tensors from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llm_edge.checkpoint.base import by_frequency
from llm_edge.checkpoint.tensors.tensor_data import TYPE_NAMES, TensorInfo
from llm_edge.checkpoint.tensors.tensor_file import TensorFile, open_tensor_file
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import read_json


class WeightFiles:
    """The tensors of one file, or of all shards."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[str, TensorFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.format = "safetensors" if paths[0].suffix == ".safetensors" else "PyTorch"
        for path in paths:
            file = open_tensor_file(path)
            for name, info in file.tensors.items():
                if name in self._files:
                    raise CheckpointError(f"{path}: tensor {name} is also in {self._files[name].path.name}")
                self._files[name] = file
                self.tensors[name] = info

    @property
    def types(self) -> str:
        """Types of the tensors, most frequent first."""
        return by_frequency(TYPE_NAMES[info.dtype] for info in self.tensors.values() if info.dtype in TYPE_NAMES)

    def check_type(self, name: str) -> None:
        """Reject a tensor that does not hold floats."""
        dtype = self.tensors[name].dtype
        if dtype not in TYPE_NAMES:
            raise CheckpointError(
                f"{self._files[name].path}: tensor {name} is of type {str(dtype).removeprefix('torch.')}; "
                f"supported: {', '.join(sorted(TYPE_NAMES.values()))}"
            )

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor from disk."""
        return self._files[name].load(name)


def find_weight_files(folder: Path) -> list[Path]:
    """Return the files that an index names, else the file of the standard name, else the only safetensors file."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, whole = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.exists() or whole.exists():
            paths = _shards(index) if index.exists() else [whole]
            break
    else:
        paths = sorted(folder.glob("*.safetensors"))
        if len(paths) != 1:
            found = f"{len(paths)} .safetensors files and no model.safetensors.index.json" if paths else "no weights"
            raise CheckpointError(
                f"{folder} has {found}: model.safetensors, pytorch_model.bin or shards with their index are required"
            )
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again")
    return paths


def _shards(index: Path) -> list[Path]:
    shards = read_json(index, error=CheckpointError).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index}: weight_map is not a table of file names")
    names = sorted(set(shards.values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: weight_map names files outside the folder")
    return [index.parent / name for name in names]
