"""Opens a file of plain tensors, whichever of the known formats its content is in. It knows no model and no GGUF.

    zip              what torch.save writes
    pickle           what torch.save wrote before torch 1.6
    safetensors
The readers beside this file say where the tensors lie; from there on all formats are alike. No reader believes a
number before it was held against the bytes there are, and none imports, calls or builds anything a file names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from llm_edge.checkpoint.tensors.safetensors_file import read_safetensors
from llm_edge.checkpoint.tensors.tensor_bytes import LOADABLE, Checksum, FileBytes, Place, TensorInfo
from llm_edge.checkpoint.tensors.torch_file import read_torch_legacy, read_torch_zip
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.show import show

__all__ = ["TensorFile", "TensorInfo", "open_tensor_file", "strip_prefixes"]

_WRAPPERS = ("module.", "_orig_mod.")  # put before every name by DistributedDataParallel and by torch.compile
_KNOWN = "what torch.save writes and safetensors can be read"


class TensorFile(Protocol):
    """Named tensors of one file, read when asked for."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and type of every tensor, in the order of the file; names as `strip_prefixes` leaves them."""

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor: contiguous, in the type of the file, in memory of its own.

        Raises:
            CheckpointError: there is none of that name, its type is not one torch computes in (float8, complex),
                or its bytes are damaged.
            MachineError: memory does not suffice.
        """


def open_tensor_file(path: Path) -> TensorFile:
    """Open a file of tensors; the format is told from its content.

    Of a checkpoint that torch.save wrote, the state dict is taken: the entry `model_state_dict`, `state_dict` or
    `model` where it holds tensors, else the top level. Everything else in it is left alone.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or asks for code to be run.
    """
    with FileBytes(path) as file:
        head = file.read(0, min(file.size, 512))
        if not head:
            file.fail("the file is empty: download it again")
        if head.startswith(b"PK"):
            places = read_torch_zip(file)
        elif head[8:9] == b"{":  # before pickle: a header of 640 bytes begins as a pickle does
            places = read_safetensors(file)
        elif head.startswith(b"\x80"):
            places = read_torch_legacy(file)
        elif head[257:262] == b"ustar":
            file.fail(
                "is a tar archive, as torch 0.1 wrote it: load it with an old torch and save the state_dict again"
            )
        elif head.startswith(b"version https://git-lfs"):
            file.fail("is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`")
        else:
            file.fail(
                f"begins with {show(head[:8])}: damaged, or of a format that is not known here; {_KNOWN}, and GGUF"
            )
    stored = strip_prefixes(places, str(path))
    return _StoredTensors(path, {name: places[within] for name, within in stored.items()})


def strip_prefixes(names: Iterable[str], where: str) -> dict[str, str]:
    """Clean name -> name in the file, without the `module.` and `_orig_mod.` that wrappers of a model lead with.

    Raises:
        CheckpointError: two tensors of the file `where` would have the same name.
    """
    stored: dict[str, str] = {}
    for name in names:
        clean = name
        while clean.startswith(_WRAPPERS):
            clean = clean.split(".", 1)[1]
        if clean in stored:
            raise CheckpointError(
                f"{where}: {show(stored[clean])} and {show(name)} are the same tensor but for a wrapper's prefix: "
                "save the state_dict of the model itself"
            )
        stored[clean] = name
    return stored


class _StoredTensors:
    """The one `TensorFile` there is; formats differ only in how they find the places."""

    def __init__(self, path: Path, places: Mapping[str, Place]) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = {name: place.info for name, place in places.items()}
        self._places = places
        self._verified: set[Checksum] = set()

    def __repr__(self) -> str:
        return f"TensorFile({str(self.path)!r}, {len(self.tensors)} tensors)"

    def load(self, name: str) -> torch.Tensor:
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(f"{self.path}: has no tensor {show(name)}")
        if place.info.dtype not in LOADABLE:
            raise CheckpointError(
                f"{self.path}: tensor {name} is stored as {str(place.info.dtype).removeprefix('torch.')}, which is not "
                "read here: save it as float32, float16 or bfloat16"
            )
        with FileBytes(self.path) as file:
            if place.offset + place.info.nbytes > file.size:
                file.fail(f"became shorter since it was opened: tensor {name} is no longer in it")
            if place.checksum is not None and place.checksum not in self._verified:
                file.verify(place.checksum, f"tensor {name}")
                self._verified.add(place.checksum)
            return file.tensor(place)
