"""`read_records`: reads the directory of an uncompressed zip archive.

Stricter than zipfile: contradictions within the archive, overlapping records and compression are errors, so every
record is a range of bytes in the file. Layout and field names follow PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7
(local header), 4.3.9 (data descriptor), 4.3.12 (directory), 4.3.14 to 4.3.16 (end) and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from llm_edge.checkpoint.tensors.tensor_data import TensorReader
from llm_edge.runtime.safe_io import short_repr

MAX_RECORDS = 1 << 17  # torch.save writes one per storage
MAX_DIRECTORY = 1 << 25

_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_DESCRIPTORS = (struct.Struct("<4s3L"), struct.Struct("<4sL2Q"))
_HAS_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11
_IN_ZIP64 = 0xFFFFFFFF  # marks a size or an offset that is in the zip64 field instead
_DAMAGED = "the file is damaged: download it again"
_TRUNCATED = "the file is truncated: download it again"


@dataclass(frozen=True, slots=True)
class Record:
    """A record: name, range of bytes in the file, and CRC-32 (0 if the writer computed none)."""

    name: str
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of the directory; `header` is the offset of the local header."""

    name: str
    raw_name: bytes
    flags: int
    crc32: int
    size: int
    header: int


def read_records(file: TensorReader) -> dict[str, Record]:
    """Return all records of an archive, checked against their local headers.

    Raises:
        CheckpointError: the archive is damaged, contradicts itself, or has compressed or encrypted records.
    """
    begin, size, count = _find_directory(file)
    entries = _read_directory(file, file.read(begin, size), count)
    records: dict[str, Record] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        if entry.name in records:
            file.fail(f"has a duplicate record {short_repr(entry.name)}: {_DAMAGED}")
        if entry.header < end:
            file.fail(f"record {short_repr(entry.name)} overlaps the previous one: {_DAMAGED}")
        record, end = _check_local(file, entry, begin)
        records[entry.name] = record
    return {entry.name: records[entry.name] for entry in entries}


def _find_directory(file: TensorReader) -> tuple[int, int, int]:
    """Return offset, size and number of entries of the directory, which the end of the archive states."""
    tail = file.read(tail_at := max(file.size - _END.size - 0xFFFF, 0), file.size - tail_at)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        file.fail(f"starts like a zip archive but has no directory: {_TRUNCATED}")
    _, disk, first_disk, here, count, size, begin, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        file.fail(f"has data after the end of the zip archive: {_DAMAGED}")
    at += tail_at
    locator_at = at - _LOCATOR64.size
    if locator_at >= 0 and (locator := file.read(locator_at, _LOCATOR64.size)).startswith(b"PK\x06\x07"):
        _, disk64, end64_at, disks = _LOCATOR64.unpack(locator)
        if end64_at + _END64.size != locator_at or disk64 or disks > 1:
            file.fail(f"its zip64 end record is at the wrong position: {_DAMAGED}")
        short = (disk, first_disk, here, count, size, begin)
        magic, length, _, _, *wide = _END64.unpack(file.read(end64_at, _END64.size))
        limits = (0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, _IN_ZIP64, _IN_ZIP64)
        agree = all(a in (b, limit) for a, b, limit in zip(short, wide, limits, strict=True))
        if magic != b"PK\x06\x06" or length != _END64.size - 12 or not agree:
            file.fail(f"its two end records contradict each other: {_DAMAGED}")
        disk, first_disk, here, count, size, begin = wide
        at = end64_at
    if disk or first_disk or here != count:
        file.fail("is one volume of a multi-volume zip archive: join them")
    if begin + size != at:
        file.fail(f"its zip directory is at the wrong position: {_DAMAGED}")
    if count > MAX_RECORDS or size > MAX_DIRECTORY:
        file.fail(f"has {count} records in a directory of {size} bytes, which is too many: save it in several files")
    return begin, size, count


def _read_directory(file: TensorReader, data: bytes, count: int) -> list[_Entry]:
    entries: list[_Entry] = []
    at = 0
    for _ in range(count):
        if len(data) - at < _ENTRY.size:
            file.fail(f"states {count} records, but its directory has {len(entries)}: {_DAMAGED}")
        magic, _, _, flags, method, _, _, crc, packed, size, n, m, k, disk, _, _, header = _ENTRY.unpack_from(data, at)
        name_at = at + _ENTRY.size
        at = name_at + n + m + k
        if magic != b"PK\x01\x02" or at > len(data) or disk:
            file.fail(f"entry {len(entries)} of its zip directory is invalid: {_DAMAGED}")
        raw_name = data[name_at : name_at + n]
        try:
            name = raw_name.decode("utf-8")
        except UnicodeDecodeError:
            file.fail(f"the name of record {len(entries)} is not UTF-8: {_DAMAGED}")
        if flags & 1:
            file.fail(f"record {short_repr(name)} is encrypted: save it with torch.save again")
        if method or flags & ~(_HAS_DESCRIPTOR | _UTF8):
            file.fail(
                f"record {short_repr(name)} is compressed, which torch.save never does (TorchScript archives are): "
                "save the model's state_dict() with torch.save"
            )
        wide = _widen(file, name, data[name_at + n : name_at + n + m], (size, packed, header))
        size, packed, header = wide
        if packed != size:
            file.fail(f"record {short_repr(name)} has contradictory sizes {size} and {packed}: {_DAMAGED}")
        entries.append(_Entry(name, raw_name, flags, crc, size, header))
    if at != len(data):
        file.fail(f"its zip directory has {len(data) - at} extra bytes: {_DAMAGED}")
    return entries


def _check_local(file: TensorReader, entry: _Entry, limit: int) -> tuple[Record, int]:
    """Return the record and its end; its local header and data descriptor must match the directory."""
    what = f"record {short_repr(entry.name)}"
    names_at = entry.header + _LOCAL.size
    if names_at + len(entry.raw_name) > limit:
        file.fail(f"{what} is outside the file: {_DAMAGED}")
    head = file.read(entry.header, _LOCAL.size + len(entry.raw_name))
    magic, _, flags, method, _, _, crc, packed, size, n, m = _LOCAL.unpack_from(head)
    offset = names_at + n + m
    end = offset + entry.size
    if magic != b"PK\x03\x04" or end > limit:
        file.fail(f"{what} is outside the file: {_DAMAGED}")
    size, packed = _widen(
        file, entry.name, file.read(names_at + n, m) if _IN_ZIP64 in (size, packed) else b"", (size, packed)
    )
    stated = (crc, packed, size)
    listed = (entry.crc32, entry.size, entry.size)
    has_descriptor = bool(entry.flags & _HAS_DESCRIPTOR)
    if (
        head[_LOCAL.size :] != entry.raw_name
        or n != len(entry.raw_name)
        or (flags, method) != (entry.flags, 0)
        or not all(a == b or (has_descriptor and a == 0) for a, b in zip(stated, listed, strict=True))
    ):
        file.fail(f"{what} contradicts the zip directory: {_DAMAGED}")
    if has_descriptor:
        after = file.read(end, min(limit - end, _DESCRIPTORS[-1].size))
        for layout in _DESCRIPTORS:
            if len(after) >= layout.size and layout.unpack_from(after) == (b"PK\x07\x08", *listed):
                end += layout.size
                break
        else:
            file.fail(f"{what} contradicts its data descriptor: {_DAMAGED}")
    return Record(entry.name, offset, entry.size, entry.crc32), end


def _widen(file: TensorReader, name: str, extra: bytes, values: tuple[int, ...]) -> list[int]:
    """Replace the sizes and offsets that are in the zip64 field by its values."""
    wide = b""
    at = 0
    while _IN_ZIP64 in values and len(extra) - at >= 4:
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
            break
        at += 4 + length
    widened: list[int] = []
    for value in values:
        if value == _IN_ZIP64:
            if len(wide) < 8:
                file.fail(f"record {short_repr(name)} has no zip64 field: {_DAMAGED}")
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        widened.append(value)
    return widened
