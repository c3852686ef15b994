"""Locates the tensors of a state dict in files of torch.save.

The zip format (since torch 1.6) has `NAME/data.pkl`, one record `NAME/data/KEY` per storage, and `NAME/byteorder`
(since 2.0). The legacy format has five pickles (magic number, version, machine properties, checkpoint, storage keys),
then for each key the number of elements as i64 and the elements. Pickles are parsed by `pickle_reader.py`, never run.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from llm_edge.checkpoint.tensors.pickle_globals import Storage, StoredTensor
from llm_edge.checkpoint.tensors.pickle_reader import MAX_PICKLE, Pickled, unpickle
from llm_edge.checkpoint.tensors.tensor_data import Checksum, TensorInfo, TensorLocation, TensorReader, check_name
from llm_edge.checkpoint.tensors.zip_reader import Record, read_records
from llm_edge.runtime.safe_io import short_repr

STATE_DICTS = ("model_state_dict", "state_dict", "model")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001

_MAX_DEPTH = 4  # of tables in tables
_TRAINING_STATE = re.compile(r"optim|sched|grad|exp_avg|momentum", re.IGNORECASE)  # tables that are not weights
_DAMAGED = "the file is damaged: download it again"
_TRUNCATED = "the file is truncated: download it again"


def read_torch_zip(file: TensorReader) -> dict[str, TensorLocation]:
    """Return the location of every tensor of the state dict in a zip archive of torch.save.

    Raises:
        CheckpointError: the archive or pickle is damaged, they do not match, or they contain more than plain tensors.
    """
    records = read_records(file)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        file.fail("is a zip archive, but not one of torch.save: it has no data.pkl in a folder")
    prefix = pickles[0].removesuffix("data.pkl")
    if not all(name.startswith(prefix) for name in records):
        file.fail(f"has records outside its folder {short_repr(prefix)}: save it with torch.save again")
    order = records.get(prefix + "byteorder")
    if order is not None and file.read(order.offset, min(order.size, 8)) != b"little":
        file.fail("was written on a big-endian machine: save it again on a little-endian one")
    pickle = records[pickles[0]]
    if pickle.size > MAX_PICKLE:
        file.fail(f"its data.pkl has {pickle.size} bytes; the limit is {MAX_PICKLE}: save only the state_dict")
    data = file.read(pickle.offset, pickle.size)
    if pickle.crc32 and zlib.crc32(data) != pickle.crc32:
        file.fail(f"its data.pkl does not match its checksum: {_DAMAGED}")

    pickled = unpickle(io.BytesIO(data), len(data), str(file.path))
    stored: dict[str, Record] = {}
    for key, storage in pickled.storages.items():
        record = records.get(f"{prefix}data/{key}")
        if record is None:
            file.fail(f"has no data for storage {short_repr(key)}: {_DAMAGED}")
        if record.size != storage.nbytes:
            file.fail(f"storage {short_repr(key)} has {record.size} bytes; {storage.nbytes} are required: {_DAMAGED}")
        stored[key] = record

    def checksum(storage: Storage) -> Checksum:
        record = stored[storage.key]
        return Checksum(record.offset, record.size, record.crc32)

    return _locations(file, pickled, {key: record.offset for key, record in stored.items()}, checksum)


def read_torch_legacy(file: TensorReader) -> dict[str, TensorLocation]:
    """Return the location of every tensor of the state dict in a file of torch.save before torch 1.6.

    Raises:
        CheckpointError: the file is damaged or contains more than plain tensors.
    """
    stream = file.stream()

    def next_pickle() -> Pickled:
        return unpickle(stream, file.size - stream.tell(), str(file.path))

    if next_pickle().value != LEGACY_MAGIC:
        file.fail("is a pickle, but not one of torch.save: save the state_dict with torch.save")
    if next_pickle().value != LEGACY_VERSION:
        file.fail("is of an unknown version of torch.save's legacy format: save the state_dict again")
    machine = next_pickle().value
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        file.fail("was written on a big-endian machine: save it again on a little-endian one")
    pickled = next_pickle()
    keys = next_pickle().value
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        file.fail(f"has no list of storages: {_DAMAGED}")
    if len(keys) != len(pickled.storages) or set(keys) != pickled.storages.keys():
        file.fail(f"lists other storages than its tensors refer to: {_DAMAGED}")
    offsets: dict[str, int] = {}
    at = stream.tell()
    for key in keys:
        storage = pickled.storages[key]
        offsets[key] = at + 8
        if offsets[key] + storage.nbytes > file.size:
            file.fail(f"ends within storage {short_repr(key)}; {_TRUNCATED}")
        count = int.from_bytes(file.read(at, 8), "little", signed=True)
        if count != storage.items:
            file.fail(f"storage {short_repr(key)} has {count} elements; {storage.items} are required: {_DAMAGED}")
        at = offsets[key] + storage.nbytes
    return _locations(file, pickled, offsets, None)


def _locations(
    file: TensorReader,
    pickled: Pickled,
    offsets: Mapping[str, int],
    checksum: Callable[[Storage], Checksum] | None,
) -> dict[str, TensorLocation]:
    locations: dict[str, TensorLocation] = {}
    for key, tensor in _state_dict(file, pickled.value).items():
        if not isinstance(tensor, StoredTensor):
            continue  # a number, a string, an optimizer state
        name = check_name(file, key)
        info = TensorInfo(tensor.shape, tensor.dtype)
        order = _memory_order(tensor)
        if order is None:
            file.fail(
                f"tensor {name} is a view that skips or repeats elements (shape {tensor.shape}, strides "
                f"{tensor.strides}): save tensor.contiguous() instead"
            )
        begin = tensor.offset * tensor.dtype.itemsize
        if begin + info.nbytes > tensor.storage.nbytes:
            file.fail(
                f"tensor {name} requires bytes {begin} to {begin + info.nbytes} of a storage of {tensor.storage.nbytes}"
                f": {_DAMAGED}"
            )
        check = checksum(tensor.storage) if checksum else None
        locations[name] = TensorLocation(
            info,
            offsets[tensor.storage.key] + begin,
            None if order == tuple(range(len(order))) else order,
            check if check and check.crc32 else None,  # 0: saved without checksums
        )
    return locations


def _state_dict(file: TensorReader, value: Any) -> dict[Any, Any]:
    """Return the table of the model's tensors; fail if there is none, or if several could be meant."""
    if isinstance(value, StoredTensor):
        file.fail("contains a single unnamed tensor: save a state_dict")
    found = _tensor_tables(value)
    named = {path: table for path, table in found.items() if any("." in str(name) for name in _tensors(table))}
    if named:  # parameters of modules have dotted names, single tensors such as a random state do not
        largest = max(len(_tensors(table)) for table in named.values())
        found = {path: table for path, table in named.items() if 2 * len(_tensors(table)) >= largest}
    else:
        preferred = next((path for path in (*STATE_DICTS, "") if path in found), None)
        found = found if preferred is None else {preferred: found[preferred]}
    if "" in found:
        return found[""]
    if len(found) > 1:
        shown = ", ".join(short_repr(path) for path in list(found)[:4])
        file.fail(f"has several state dicts ({shown}): save the one to export by itself")
    if not found:
        file.fail(
            f"has no tensors at the top level or under {', '.join(STATE_DICTS)}: save the model's state_dict() there"
        )
    return next(iter(found.values()))


def _tensor_tables(value: Any) -> dict[str, dict[Any, Any]]:
    """Return all tables with tensors, in tables of tables, by the keys that lead to them; the top level is "".

    The states of optimizers are left out, and tables with the same tensors are returned once.
    """
    found: dict[str, dict[Any, Any]] = {}
    visited: set[int] = set()
    contents: set[frozenset[tuple[Any, int]]] = set()
    pending = [("", value)]
    while pending:
        path, table = pending.pop(0)
        if not isinstance(table, dict) or id(table) in visited:
            continue
        visited.add(id(table))
        tensors = _tensors(table)
        content = frozenset((name, id(tensor)) for name, tensor in tensors.items())
        if tensors and content not in contents:
            contents.add(content)
            found[path] = table
        if path.count(".") < _MAX_DEPTH:
            pending += [
                (f"{path}.{key}" if path else key, inner)
                for key, inner in table.items()
                if isinstance(key, str) and isinstance(inner, dict) and not _TRAINING_STATE.search(key)
            ]
    return found


def _tensors(table: dict[Any, Any]) -> dict[Any, StoredTensor]:
    return {name: tensor for name, tensor in table.items() if isinstance(tensor, StoredTensor)}


def _memory_order(tensor: StoredTensor) -> tuple[int, ...] | None:
    """Return the dimensions, slowest first, of a tensor that is dense in memory; None for any other view."""
    dims = range(len(tensor.shape))
    if 0 in tensor.shape:
        return tuple(dims)
    # The strides of dimensions of size 1 are irrelevant.
    strided = sorted((dim for dim in dims if tensor.shape[dim] > 1), key=lambda dim: -tensor.strides[dim])
    expected = 1
    for dim in reversed(strided):
        if tensor.strides[dim] != expected:
            return None
        expected *= tensor.shape[dim]
    if strided == sorted(strided):
        return tuple(dims)
    return (*(dim for dim in dims if tensor.shape[dim] == 1), *strided)
