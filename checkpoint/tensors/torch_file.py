"""What torch.save writes: which tensors of a state dict there are and where they lie. It reads no tensor's values.

The zip format, since torch 1.6: `NAME/data.pkl`, a storage a record `NAME/data/KEY`, `NAME/byteorder` (since 2.0).
The format before: five pickles (a magic number, a version, facts about the machine, the checkpoint, the storages'
keys), then for each key a count of numbers as i64 and the numbers. Pickles are read by `pickled.py`, never run.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from llm_edge.checkpoint.tensors.pickle_reader import MAX_PICKLE, Pickled, unpickle
from llm_edge.checkpoint.tensors.tensor_bytes import Checksum, FileBytes, Place, TensorInfo, check_name
from llm_edge.checkpoint.tensors.torch_names import Storage, StoredTensor
from llm_edge.checkpoint.tensors.zip_records import Record, read_records
from llm_edge.runtime.show import show

STATE_DICTS = ("model_state_dict", "state_dict", "model")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001

_DAMAGED = "the file is damaged: download it again"
_CUT = "the file is cut short: download it again"


def read_torch_zip(file: FileBytes) -> dict[str, Place]:
    """Where every tensor of the state dict lies in a zip archive of torch.save.

    Raises:
        CheckpointError: archive or pickle are damaged, contradict each other or ask for more than plain tensors.
    """
    records = read_records(file)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        file.fail("is a zip archive, but none that torch.save wrote: it has no data.pkl in a folder")
    prefix = pickles[0].removesuffix("data.pkl")
    if not all(name.startswith(prefix) for name in records):
        file.fail(f"has records beside its folder {show(prefix)}: save it with torch.save again")
    order = records.get(prefix + "byteorder")
    if order is not None and file.read(order.offset, min(order.size, 8)) != b"little":
        file.fail("was written on a big-endian machine: save it again on a little-endian one")
    pickle = records[pickles[0]]
    if pickle.size > MAX_PICKLE:
        file.fail(f"its data.pkl has {pickle.size} bytes, at most {MAX_PICKLE} are read: save only the state_dict")
    data = file.read(pickle.offset, pickle.size)
    if pickle.crc32 and zlib.crc32(data) != pickle.crc32:
        file.fail(f"its data.pkl does not have the checksum the archive states: {_DAMAGED}")

    pickled = unpickle(io.BytesIO(data), len(data), str(file.path))
    stored: dict[str, Record] = {}
    for key, storage in pickled.storages.items():
        record = records.get(f"{prefix}data/{key}")
        if record is None:
            file.fail(f"lacks the data of storage {show(key)}: {_DAMAGED}")
        if record.size != storage.nbytes:
            file.fail(f"storage {show(key)} has {record.size} bytes, {storage.nbytes} are needed: {_DAMAGED}")
        stored[key] = record

    def checksum(storage: Storage) -> Checksum:
        record = stored[storage.key]
        return Checksum(record.offset, record.size, record.crc32)

    return _places(file, pickled, {key: record.offset for key, record in stored.items()}, checksum)


def read_torch_legacy(file: FileBytes) -> dict[str, Place]:
    """Where every tensor of the state dict lies in a file of torch.save before torch 1.6.

    Raises:
        CheckpointError: the file is damaged or asks for more than plain tensors.
    """
    stream = file.stream()

    def next_pickle() -> Pickled:
        return unpickle(stream, file.size - stream.tell(), str(file.path))

    if next_pickle().value != LEGACY_MAGIC:
        file.fail("is a pickle, but none that torch.save wrote: save the state_dict with torch.save")
    if next_pickle().value != LEGACY_VERSION:
        file.fail("is of an unknown version of torch.save's old format: save the state_dict again")
    machine = next_pickle().value
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        file.fail("was written on a big-endian machine: save it again on a little-endian one")
    pickled = next_pickle()
    keys = next_pickle().value
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        file.fail(f"has no list of its storages: {_DAMAGED}")
    if len(keys) != len(pickled.storages) or set(keys) != pickled.storages.keys():
        file.fail(f"lists other storages than its tensors need: {_DAMAGED}")
    offsets: dict[str, int] = {}
    at = stream.tell()
    for key in keys:
        storage = pickled.storages[key]
        offsets[key] = at + 8
        if offsets[key] + storage.nbytes > file.size:
            file.fail(f"ends within storage {show(key)}; {_CUT}")
        count = int.from_bytes(file.read(at, 8), "little", signed=True)
        if count != storage.items:
            file.fail(f"storage {show(key)} has {count} numbers, {storage.items} are needed: {_DAMAGED}")
        at = offsets[key] + storage.nbytes
    return _places(file, pickled, offsets, None)


def _places(
    file: FileBytes,
    pickled: Pickled,
    offsets: Mapping[str, int],
    checksum: Callable[[Storage], Checksum] | None,
) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for key, tensor in _state_dict(file, pickled.value).items():
        if not isinstance(tensor, StoredTensor):
            continue  # a number, a text, the state of an optimizer
        name = check_name(file, key)
        info = TensorInfo(tensor.shape, tensor.dtype)
        order = _memory_order(tensor)
        if order is None:
            file.fail(
                f"tensor {name} is a view that skips or repeats numbers (shape {tensor.shape}, strides "
                f"{tensor.strides}): save tensor.contiguous() instead"
            )
        begin = tensor.offset * tensor.dtype.itemsize
        if begin + info.nbytes > tensor.storage.nbytes:
            file.fail(
                f"tensor {name} needs bytes {begin} to {begin + info.nbytes} of a storage of {tensor.storage.nbytes}: "
                f"{_DAMAGED}"
            )
        check = checksum(tensor.storage) if checksum else None
        places[name] = Place(
            info,
            offsets[tensor.storage.key] + begin,
            None if order == tuple(range(len(order))) else order,
            check if check and check.crc32 else None,  # 0: torch was told to make none
        )
    return places


def _state_dict(file: FileBytes, value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        for table in (*(value.get(key) for key in STATE_DICTS), value):
            if isinstance(table, dict) and any(isinstance(entry, StoredTensor) for entry in table.values()):
                return table
    elif isinstance(value, StoredTensor):
        file.fail("holds one tensor without a name: save a state_dict")
    return file.fail(
        f"holds no tensors at its top level, nor under {', '.join(STATE_DICTS)}: save the model's state_dict() there"
    )


def _memory_order(tensor: StoredTensor) -> tuple[int, ...] | None:
    """Dimensions, slowest first, of a tensor that lies in memory without gaps; None for any other view."""
    dims = range(len(tensor.shape))
    if 0 in tensor.shape:
        return tuple(dims)
    # A dimension of one number has no stride that matters, wherever it stands.
    moving = sorted((dim for dim in dims if tensor.shape[dim] > 1), key=lambda dim: -tensor.strides[dim])
    expected = 1
    for dim in reversed(moving):
        if tensor.strides[dim] != expected:
            return None
        expected *= tensor.shape[dim]
    if moving == sorted(moving):
        return tuple(dims)
    return (*(dim for dim in dims if tensor.shape[dim] == 1), *moving)
