"""`open_tensor_file`: opens a file of plain tensors, detecting its format from the content.

Supported formats are safetensors, the zip archives of torch.save, and its pickles from before torch 1.6. The readers
of the formats return the location of every tensor. They check all numbers against the size of the file, and never
import or call anything that a file names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llm_edge.checkpoint.tensors.safetensors_file import read_safetensors
from llm_edge.checkpoint.tensors.tensor_data import LOADABLE, Checksum, TensorInfo, TensorLocation, TensorReader
from llm_edge.checkpoint.tensors.torch_file import read_torch_legacy, read_torch_zip
from llm_edge.checkpoint.tensors.wrapper_names import strip_wrappers
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import short_repr


class TensorFile:
    """Named tensors of one file, in file order, read on demand.

    Args:
        path: the file.
        locations: location of every tensor by its name in the file.
        stored_names: names in the file by the names to use.
    """

    def __init__(self, path: Path, locations: Mapping[str, TensorLocation], stored_names: Mapping[str, str]) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = {name: locations[stored].info for name, stored in stored_names.items()}
        self._locations = locations
        self._stored_names = stored_names
        self._verified: set[Checksum] = set()

    def __repr__(self) -> str:
        return f"TensorFile({str(self.path)!r}, {len(self.tensors)} tensors)"

    def within(self, prefix: str) -> TensorFile:
        """Return the tensors whose names begin with a prefix, without it."""
        names = {name.removeprefix(prefix): it for name, it in self._stored_names.items() if name.startswith(prefix)}
        return TensorFile(self.path, self._locations, names)

    def renamed(self, name: str, new_name: str) -> TensorFile:
        """Return the same tensors, one of them with another name."""
        names = {new_name if each == name else each: stored for each, stored in self._stored_names.items()}
        return TensorFile(self.path, self._locations, names)

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor as it is written in the file."""
        return self._stored_names[name]

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor, contiguous and in the type of the file.

        Raises:
            CheckpointError: the tensor does not exist, is damaged, or has an unsupported type (float8, complex).
            MachineError: there is not enough memory.
        """
        dtype = self._location(name).info.dtype
        if dtype not in LOADABLE:
            raise CheckpointError(
                f"{self.path}: tensor {name} is of type {str(dtype).removeprefix('torch.')}, which is "
                "not supported: save it as float32, float16 or bfloat16"
            )
        return self.load_stored(name)

    def load_stored(self, name: str) -> torch.Tensor:
        """Read a tensor of any type, contiguous and in that type; errors are those of `load`."""
        location = self._location(name)
        with TensorReader(self.path) as file:
            if location.offset + location.info.nbytes > file.size:
                file.fail(f"was truncated after it was opened: tensor {name} is missing")
            if location.checksum is not None and location.checksum not in self._verified:
                file.verify(location.checksum, f"tensor {name}")
                self._verified.add(location.checksum)
            return file.tensor(location)

    def _location(self, name: str) -> TensorLocation:
        stored = self._stored_names.get(name)
        if stored is None:
            raise CheckpointError(f"{self.path}: has no tensor {short_repr(name)}")
        return self._locations[stored]


def open_tensor_file(path: Path) -> TensorFile:
    """Open a file of tensors.

    From a checkpoint of torch.save, the state dict is read: the top level, or the only table of named tensors in it,
    whatever its name. Everything else is ignored.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or contains code.
    """
    with TensorReader(path) as file:
        head = file.read(0, min(file.size, 512))
        if not head:
            file.fail("the file is empty: download it again")
        if head.startswith(b"PK"):
            locations = read_torch_zip(file)
        elif head[8:9] == b"{":  # before pickle, because a header of 640 bytes starts like a pickle
            locations = read_safetensors(file)
        elif head.startswith(b"\x80"):
            locations = read_torch_legacy(file)
        elif head[257:262] == b"ustar":
            file.fail("is a tar archive of torch 0.1: load it with an old torch and save the state_dict again")
        elif head.startswith(b"version https://git-lfs"):
            file.fail("is a Git LFS pointer instead of the file: download it with `git lfs pull`")
        else:
            file.fail(f"starts with {short_repr(head[:8])}: damaged, or not torch.save, safetensors or GGUF")
    return TensorFile(path, locations, strip_wrappers(locations, str(path)))
