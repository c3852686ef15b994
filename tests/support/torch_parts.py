"""Handcrafted files of torch.save, in which any part can be inconsistent."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
MACHINE = b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s."


# ---- pickles


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(encoded),)) + encoded


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", items: int = 4, kind: bytes = b"ctorch\nFloatStorage\n", legacy: bool = False) -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(items) + (b"N" if legacy else b"") + b"tQ"


def tensor(
    of: bytes, offset: int = 0, shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,), extra: bytes = b""
) -> bytes:
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = of + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks + extra
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def table(entries: Mapping[str, bytes], protocol: int = 2) -> bytes:
    """The pickle of a dict of already pickled values."""
    items = b"".join(text(name) + value for name, value in entries.items())
    return b"\x80" + bytes((protocol,)) + b"}(" + items + b"u."


# ---- containers


def legacy(pickle: bytes, storages: Mapping[str, bytes], item: int = 4) -> bytes:
    keys = b"\x80\x02](" + b"".join(map(text, storages)) + b"e."
    data = b"".join(struct.pack("<q", len(content) // item) + content for content in storages.values())
    return MAGIC + MACHINE + pickle + keys + data


@dataclass
class Record:
    """A record of an archive; omitted fields are derived from its content."""

    name: str | bytes
    data: bytes = b""
    flags: int = 0
    method: int = 0
    crc: int | None = None
    size: int | None = None  # in the directory
    packed: int | None = None
    at: int | None = None  # the header's offset, in the directory
    extra: bytes = b""  # in the directory
    local: dict[str, int] = field(default_factory=dict)  # values that differ in the local header
    local_name: bytes | None = None
    local_extra: bytes = b""
    after: bytes = b""  # after the data


@dataclass
class Archive:
    """A zip archive; omitted fields are derived from the records."""

    records: list[Record]
    count: int | None = None
    begin: int | None = None
    size: int | None = None
    disk: int = 0
    tail: bytes = b""
    before_end: bytes = b""

    def bytes(self) -> bytes:
        body, directory = bytearray(), bytearray()
        for record in self.records:
            name = record.name.encode() if isinstance(record.name, str) else record.name
            size, crc = len(record.data), zlib.crc32(record.data)
            fields = {"flags": record.flags, "method": record.method, "crc": crc, "packed": size, "size": size}
            fields |= record.local
            at = len(body)
            local_name = name if record.local_name is None else record.local_name
            body += struct.pack(
                "<4s5H3L2H",
                b"PK\x03\x04",
                20,
                fields["flags"],
                fields["method"],
                0,
                0,
                fields["crc"],
                fields["packed"],
                fields["size"],
                len(local_name),
                len(record.local_extra),
            )
            body += local_name + record.local_extra + record.data + record.after
            stated = (
                crc if record.crc is None else record.crc,
                size if record.packed is None else record.packed,
                size if record.size is None else record.size,
            )
            directory += struct.pack(
                "<4s6H3L5H2L",
                b"PK\x01\x02",
                20,
                20,
                record.flags,
                record.method,
                0,
                0,
                *stated,
                len(name),
                len(record.extra),
                0,
                0,
                0,
                0,
                at if record.at is None else record.at,
            )
            directory += name + record.extra
        count = len(self.records) if self.count is None else self.count
        begin = len(body) if self.begin is None else self.begin
        size = len(directory) if self.size is None else self.size
        end = struct.pack("<4s4H2LH", b"PK\x05\x06", self.disk, self.disk, count, count, size, begin, 0)
        return bytes(body + directory) + self.before_end + end + self.tail


def torch_records(pickle: bytes, storages: Mapping[str, bytes]) -> list[Record]:
    data = [Record(f"archive/data/{key}", content) for key, content in storages.items()]
    head = [Record("archive/data.pkl", pickle), Record("archive/byteorder", b"little")]
    return [*head, *data, Record("archive/version", b"3\n")]


def zipped(pickle: bytes, storages: Mapping[str, bytes]) -> bytes:
    return Archive(torch_records(pickle, storages)).bytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
