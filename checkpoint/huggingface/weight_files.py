"""Finds the weight files of a Hugging Face checkpoint, as transformers does, and reads tensors from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_edge.checkpoint.base import by_frequency
from llm_edge.checkpoint.tensors.tensor_data import TYPE_NAMES, TensorInfo
from llm_edge.checkpoint.tensors.tensor_file import TensorFile, open_tensor_file
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import read_json, short_repr

_INDEX = ".index.json"
_STANDARD_NAMES = (  # in transformers' order of precedence (modeling_utils.py: _get_resolved_checkpoint_files)
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)


@dataclass(frozen=True, slots=True)
class WeightPaths:
    """The files that hold a model's weights.

    Attributes:
        paths: one file, or the shards in the order of their names.
        index: the table of shards, or None.
        notes: files that were left aside, one sentence each.
    """

    paths: tuple[Path, ...]
    index: Path | None = None
    notes: tuple[str, ...] = ()


class WeightFiles:
    """The tensors of one file, or of all shards.

    A tensor may be stored in several shards. If the copies differ, they must not be ambiguous: an index names the copy
    that counts, whereas transformers reads the shards in order and keeps the last one.

    Attributes:
        tensors: shape and type of every tensor.
        format: name of the file format.
        where: path of the file, or of the folder of the shards, for messages.
        notes: files that were left aside, one sentence each.

    Raises:
        CheckpointError: a file is missing or damaged, or two shards have different tensors of one name.
    """

    def __init__(self, found: WeightPaths) -> None:
        self._files: dict[str, TensorFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.where = str(found.paths[0] if len(found.paths) == 1 else found.paths[0].parent)
        self.notes = found.notes
        self.format = "safetensors" if found.paths[0].suffix == ".safetensors" else "PyTorch"
        shard_of = _weight_map(found.index) if found.index is not None else {}
        for path in found.paths:
            file = open_tensor_file(path)
            for name, info in file.tensors.items():
                if name in self._files:
                    _check_copies(name, self._files[name], file, shard_of.get(file.stored_name(name)))
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

    def load_stored(self, name: str) -> torch.Tensor:
        """Read a tensor from disk in any type of the file, such as float8, which not all operators support."""
        return self._files[name].load_stored(name)


def find_weight_files(folder: Path, named_by_config: object = None) -> WeightPaths:
    """Return the weight files of a folder: those that transformers loads, else the only safetensors file.

    Args:
        folder: the checkpoint.
        named_by_config: `transformers_weights` of `config.json`, a file in the folder that takes precedence.

    Raises:
        CheckpointError: there are no weights, a file is missing, or the index is invalid.
    """
    if named_by_config is not None:
        chosen = folder / _plain_name(named_by_config, folder)
        others: list[Path] = []
    else:
        existing = [folder / name for name in _STANDARD_NAMES if (folder / name).exists()]
        chosen, *others = existing or [_only_safetensors(folder)]
    if chosen.name.endswith(_INDEX):
        weights = sorted({chosen.parent / name for name in _weight_map(chosen).values()})
        found = WeightPaths(tuple(weights), chosen)
    else:
        # Folders often have both formats; only a second table of the same format suggests different weights.
        stale = [path.name for path in others if path.name == f"{chosen.name}{_INDEX}"]
        notes = [f"{name} and its shards are ignored: transformers loads {chosen.name}" for name in stale]
        found = WeightPaths((chosen,), notes=tuple(notes))
    for path in found.paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again")
    return found


def _plain_name(name: object, folder: Path) -> str:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith((".safetensors", _INDEX)):
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers_weights is {short_repr(name)}, not a safetensors file here"
        )
    return name


def _only_safetensors(folder: Path) -> Path:
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) != 1:
        found = f"{len(paths)} .safetensors files and no model.safetensors{_INDEX}" if paths else "no weights"
        raise CheckpointError(
            f"{folder} has {found}: model.safetensors, pytorch_model.bin or shards with their index are required"
        )
    return paths[0]


def _weight_map(index: Path) -> Mapping[str, str]:
    """Return the file name of every tensor that an index lists."""
    shards = read_json(index, error=CheckpointError).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index}: weight_map is not a table of file names")
    if any(Path(name).name != name for name in shards.values()):
        raise CheckpointError(f"{index}: weight_map names files outside the folder")
    return shards


def _check_copies(name: str, first: TensorFile, second: TensorFile, indexed: str | None) -> None:
    """Raise CheckpointError if two shards have different copies of a tensor, and the index does not name the last."""
    same = first.tensors[name] == second.tensors[name] and torch.equal(first.load(name), second.load(name))
    if same or indexed == second.path.name:
        return
    raise CheckpointError(
        f"{second.path}: tensor {short_repr(name)} differs from that in {first.path.name}"
        + (", which the index names, but transformers would load this one" if indexed else "")
        + ": remove the wrong copy"
    )
