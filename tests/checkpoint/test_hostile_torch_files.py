"""Malicious files of torch.save: no code runs, none takes long, each is read or rejected with a one-line error."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutate import memory_limit
from torch_parts import (
    MACHINE,
    MAGIC,
    Archive,
    Record,
    legacy,
    number,
    storage,
    table,
    tensor,
    text,
    torch_records,
    write,
    zipped,
)

from llm_edge.checkpoint.tensors.tensor_file import open_tensor_file
from llm_edge.runtime.errors import CheckpointError

GIB = 1 << 30
SECONDS = 2.0
FOUR = struct.pack("<4f", 1, 2, 3, 4)


def one_line(error: Exception, path: Path) -> bool:
    message = str(error)
    return message.startswith(f"{path}: ") and message.isprintable() and len(message) < len(str(path)) + 500


def read_all(path: Path) -> dict[str, torch.Tensor]:
    file = open_tensor_file(path)
    return {name: file.load(name) for name in file.tensors}


def zip_of(payload: bytes, protocol: int = 2) -> bytes:
    """Return a valid state dict with one additional entry, in the zip format."""
    return zipped(table({"w": tensor(storage()), "x": payload}, protocol), {"0": FOUR})


def legacy_of(payload: bytes, protocol: int = 2) -> bytes:
    return legacy(table({"w": tensor(storage(legacy=True)), "x": payload}, protocol), {"0": FOUR})


each_container = pytest.mark.parametrize("container", [zip_of, legacy_of], ids=["zip", "legacy"])
Container = Callable[..., bytes]


@each_container
def test_handcrafted_files_are_read_by_torch(container: Container, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", container(text("more")))
    theirs = torch.load(path, weights_only=True)
    assert theirs["x"] == "more"
    assert torch.equal(read_all(path)["w"], theirs["w"])
    assert theirs["w"].tolist() == [1, 2, 3, 4]


@each_container
def test_other_tensor_encodings_are_read(container: Container, tmp_path: Path) -> None:
    content = container(text("more"))
    on_a_gpu = content.replace(text("cpu"), b"X\x06\x00\x00\x00cuda:0")
    old = content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor").replace(b"\x89ccollections\nOrderedDict\n)R", b"")
    for variant in (on_a_gpu, old):
        assert variant != content
        if container is zip_of:
            payload = variant[content.find(b"\x80\x02") : variant.find(b"u.PK") + 2]
            variant = zipped(payload, {"0": FOUR})
        assert read_all(write(tmp_path / "a.pt", variant))["w"].tolist() == [1, 2, 3, 4]


# ---- pickles with code in them

COMMAND = "COMMAND"  # placeholder for a command that creates the witness file; same length in all payloads
SYSTEM = b"cos\nsystem\n"
CALLED = SYSTEM + text(COMMAND) + b"\x85R"
POPEN = b"csubprocess\nPopen\n"

CODE: dict[str, bytes] = {
    "GLOBAL, REDUCE": CALLED,
    "STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93" + text(COMMAND) + b"\x85R",
    "INST": b"(" + text(COMMAND) + b"ios\nsystem\n",
    "OBJ": b"(" + SYSTEM + text(COMMAND) + b"o",
    "eval": b"cbuiltins\neval\n" + text(f"__import__('os').system({COMMAND!r})") + b"\x85R",
    "exec": b"cbuiltins\nexec\n" + text(f"__import__('os').system({COMMAND!r})") + b"\x85R",
    "runpy": b"crunpy\n_run_code\n" + text(f"__import__('os').system({COMMAND!r})") + b"}\x86R",
    "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n"
    + text("os")
    + b"\x85R"
    + text("system")
    + b"tR"
    + text(COMMAND)
    + b"\x85R",
    "a partial by BUILD": b"cfunctools\npartial\n" + SYSTEM + b"\x85R(" + SYSTEM + text(COMMAND) + b"\x85}Ntb)R",
    "inside of a list": b"](" + CALLED + b"e",
    "as the key of a dict": b"}" + CALLED + b"Ns",
    "as the items of an OrderedDict": b"ccollections\nOrderedDict\n" + CALLED + b"0)R",
    "inside of a tuple's REDUCE": b"ctorch\nSize\n](" + CALLED + b"e\x85R",
    "before being dropped": CALLED + b"0N",
}
CANNOT_RUN_ALONE: dict[str, bytes] = {
    "eval of Python 2": b"c__builtin__\neval\n" + text("1") + b"\x85R",
    "NEWOBJ": POPEN + text(COMMAND) + b"\x85\x81",
    "NEWOBJ_EX": POPEN + b")}\x92",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "BUILD on a tensor": tensor(storage()) + CALLED.replace(b"R", b"") + b"\x86b",
    "BUILD on a type": b"ctorch\nTensor\n}" + text("__setstate__") + text("x") + b"sb",
    "the type of a storage": b"(" + text("storage") + SYSTEM + text("1") + text("cpu") + number(1) + b"tQ",
    "the key of a storage": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + CALLED
    + text("cpu")
    + number(1)
    + b"tQ",
    "a persistent module": b"(" + text("module") + SYSTEM + text(COMMAND) + text("x") + b"tQ",
    "a persistent text": text(COMMAND) + b"Q",
    "PERSID": COMMAND.encode().join((b"P", b"\n")),
    "torch.load": b"ctorch\nload\n" + text(COMMAND) + b"}" + text("weights_only") + b"\x89s\x86R",
    "torch.load by its storage": b"ctorch.storage\n_load_from_bytes\nC\x04abcd\x85R",
    "torch.hub": b"ctorch.hub\nload\n" + text("a/b") + text("c") + b"\x86R",
    "torch.jit": b"ctorch.jit\nload\n" + text("x") + b"\x85R",
    "a dotted name": b"\x8c\x05torch\x8c\x16Size.__class__.__new__\x93)R",
    "a name as module": b"ctorch.os\nsystem\n" + text(COMMAND) + b"\x85R",
    "a dtype called": b"ctorch\nfloat32\n)R",
    "a storage called": b"ctorch\nFloatStorage\n" + number(2**40) + b"\x85R",
    "a text called": text("os.system") + text(COMMAND) + b"\x85R",
    "a rebuild of a rebuild": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + SYSTEM + b"ctorch\nTensor\n)}tR",
    "a rebuild as a class": b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\n"
    + POPEN
    + b")}tR",
    "copyreg": b"ccopy_reg\n_reconstructor\n" + POPEN + b"c__builtin__\nobject\nN\x87R",
    "numpy": b"cnumpy\nload\n" + text("x") + b"\x85R",
    "a state for everything": b"ccollections\nOrderedDict\n)R" + CALLED + b"b",
}


def with_command(payload: bytes, witness: Path) -> bytes:
    """Return the payload with its command inserted and the preceding string lengths corrected."""
    command = f"echo>{witness}"
    for wrapped in (f"__import__('os').system({COMMAND!r})", COMMAND):
        payload = payload.replace(text(wrapped), text(wrapped.replace(COMMAND, command)))
    return payload


@each_container
@pytest.mark.parametrize("what", CODE | CANNOT_RUN_ALONE)
def test_code_in_a_pickle_does_not_run(container: Container, what: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    payload = with_command((CODE | CANNOT_RUN_ALONE)[what], witness)
    path = write(tmp_path / "a.pt", container(payload, 4))
    with pytest.raises(
        CheckpointError,
        match=r"calls something|contains the pickle opcode|refers to|sets the "
        r"state|custom class|describes an invalid",
    ) as caught:
        read_all(path)
    assert one_line(caught.value, path)
    assert not witness.exists()


def test_the_code_would_run_in_pickle_itself(tmp_path: Path) -> None:
    for i, payload in enumerate(CODE.values()):
        write(tmp_path / f"{i}.pkl", b"\x80\x04" + with_command(payload, tmp_path / f"{i}.witness") + b".")
    unpickle = (
        "import contextlib, pathlib, pickle, sys\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.pkl'):\n"
        "    with contextlib.suppress(Exception): pickle.loads(path.read_bytes())\n"
    )
    subprocess.run([sys.executable, "-c", unpickle, str(tmp_path)], check=True)
    harmless = [what for i, what in enumerate(CODE) if not (tmp_path / f"{i}.witness").exists()]
    assert not harmless


def test_a_rejected_file_is_not_retried_with_another_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", fail)
    for content in (zip_of(CALLED), legacy_of(CALLED), legacy_of(text("fine"))[:-1]):
        with pytest.raises(CheckpointError):
            read_all(write(tmp_path / "a.pt", content))


# ---- pickles that would take memory or time

DEEP = 100_000
INERT: dict[str, bytes] = {  # harmless unless they are evaluated
    "bytearray(2**40)": b"c__builtin__\nbytearray\n" + number(2**40) + b"\x85R",
    "set of 2**40": b"cbuiltins\nset\n" + number(2**40) + b"\x85R",
    "lists that double": b"](]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(200)) + b"e",
    "tuples that double": b"]()\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(200)) + b"e",
    "tuples that double, as keys": b"}()\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(201)) + b"u",
    "a list in itself": b"]\x94h\x00a",
    "a dict in itself": b"}\x94" + text("a") + b"h\x00s",
    "deep lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "deep tuples": b")" + b"\x85" * DEEP,
    "deep dicts": b"}" + (text("k") + b"}") * DEEP + b"s" * DEEP,
}
BOMBS: dict[str, tuple[bytes, str]] = {
    "DUP": (b"]" + b"2(2e" * 50, "pickle opcode 0x32"),
    "LONG4": (b"\x8b" + struct.pack("<i", 2**31 - 1), "pickle opcode 0x8b"),
    "a text of 2^63": (b"\x8d" + struct.pack("<Q", 2**63) + b"a", "contains an invalid pickle"),
    "bytes of 2^63": (b"\x8e" + struct.pack("<Q", 2**63) + b"a", "contains an invalid pickle"),
    "bytearray of 2^63": (b"\x96" + struct.pack("<Q", 2**63) + b"a", "contains an invalid pickle"),
    "a frame of 2^63": (b"\x95" + struct.pack("<Q", 2**63), "contains an invalid pickle"),
    "memo 2^32-1": (b"Nr\xff\xff\xff\xff", "contains an invalid pickle"),
    "memo that is not": (b"h\xfe", "contains an invalid pickle"),
    "the stack runs out": (b"000000", "pickle opcode 0x30"),
    "tuples of nothing": (b"\x87" * 9, "contains an invalid pickle"),
    "marks that are not": (b"ttttttt", "contains an invalid pickle"),
    "values taken from below a mark": (b"(\x86t", "contains an invalid pickle"),
    "a stop in the middle": (b".", "leaves more than one value"),
    "marks without end": (b"(" * 5_000_000, "pickle is too long"),
    "lists without end": (b"]" * 5_000_000, "pickle is too long"),
    "a name without end": (b"c" + b"a" * 5_000_000, "contains an invalid pickle"),
    "protocol 0": (b"\x80\x00", "pickle protocol 0"),
    "a long name": (b"c" + b"a" * 200 + b"\n" + b"b" * 200 + b"\n", "refers to"),
    "control characters": (b"c\x1b[2J\n\r\n", r"refers to '\\x1b"),
}


@each_container
@pytest.mark.parametrize("what", INERT)
def test_unused_values_are_not_built(container: Container, what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", container(INERT[what], 4))
    begin = time.process_time()
    with memory_limit(GIB):
        assert read_all(path)["w"].tolist() == [1, 2, 3, 4]
    assert time.process_time() - begin < SECONDS


@each_container
@pytest.mark.parametrize("what", BOMBS)
def test_bombs_are_rejected_quickly(container: Container, what: str, tmp_path: Path) -> None:
    payload, reason = BOMBS[what]
    path = write(tmp_path / "a.pt", container(payload, 4))
    begin = time.process_time()
    with memory_limit(GIB), pytest.raises(CheckpointError, match=reason) as caught:
        read_all(path)
    assert time.process_time() - begin < 5 * SECONDS  # two million instructions take about one second
    assert one_line(caught.value, path)


# ---- invalid tensors and storages

TENSORS: dict[str, tuple[bytes, str]] = {
    "an offset beyond the end": (tensor(storage(), offset=1), "requires bytes 4 to 20 of a storage of 16"),
    "a negative offset": (tensor(storage(), offset=-1), "an invalid tensor"),
    "an offset of 2^62": (tensor(storage(), offset=2**62), "an invalid tensor"),
    "an offset of 2^47": (tensor(storage(), offset=2**47), "of a storage of 16"),
    "a negative size": (tensor(storage(), shape=(-4,)), "an invalid tensor"),
    "a size beyond the end": (tensor(storage(), shape=(5,)), "requires bytes 0 to 20"),
    "a size of 2^64": (tensor(storage(), shape=(2**64,)), "an invalid tensor"),
    "sizes that overflow": (tensor(storage(), shape=(2**40, 2**40), strides=(2**40, 1)), "an invalid tensor"),
    "sizes that overflow to none": (tensor(storage(), shape=(0, 2**40, 2**40), strides=(0, 1, 1)), "an invalid tensor"),
    "a negative stride": (tensor(storage(), strides=(-1,)), "an invalid tensor"),
    "a stride of 0": (tensor(storage(), strides=(0,)), "skips or repeats"),
    "a stride of 2^40": (tensor(storage(), strides=(2**40,)), "skips or repeats"),
    "strides that overlap": (tensor(storage(), shape=(2, 2), strides=(1, 1)), "skips or repeats"),
    "fewer strides than sizes": (tensor(storage(), shape=(2, 2)), "an invalid tensor"),
    "a thousand dimensions": (tensor(storage(), shape=(1,) * 1000, strides=(1,) * 1000), "an invalid tensor"),
    "no storage": (tensor(b"N"), "an invalid tensor"),
    "a storage as the offset": (tensor(storage()).replace(number(0), storage(), 1), "an invalid tensor"),
    "truth as a size": (tensor(storage()).replace(number(4) + b"t(", b"\x88t("), "an invalid tensor"),
    "a storage of -4": (tensor(storage(items=-4)), "an invalid storage"),
    "a storage of 2^62": (tensor(storage(items=2**62)), "an invalid storage"),
    "a storage too long": (
        tensor(storage(items=5)),
        "storage '0' has .* 20 are required|has 16 bytes|has 4 elements; 5|ends",
    ),
    "a storage too short": (tensor(storage(items=3), shape=(3,)), "has 16 bytes; 12 are|has 4 elements; 3 are"),
    "a storage of another type": (tensor(storage(kind=b"ctorch\nDoubleStorage\n")), "has 16 bytes; 32 are|ends within"),
    "a storage of no type": (tensor(storage(kind=b"N")), "an invalid storage"),
    "a storage in two types": (
        b"]" + storage(kind=b"ctorch\nIntStorage\n") + b"a0"[:1] + tensor(storage()) + b"a",
        "storage '0' inconsistently",
    ),
    "a storage that is absent": (tensor(storage("7")), "no data for storage '7'|other storages"),
    "a storage by another path": (tensor(storage("../data/0")), "no data for storage|other storages"),
    "an argument too few": (b"ctorch._utils\n_rebuild_tensor_v2\n" + storage() + b"\x85R", "from 1 values"),
    "a parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\nN\x88N\x87R", "other than a tensor"),
    "a dtype that is none": (
        b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage() + number(0) + b"))\x89NctorcH\nx\ntR",
        "refers to",
    ),
}


@pytest.mark.parametrize("make", [zipped, legacy], ids=["zip", "legacy"])
@pytest.mark.parametrize("what", TENSORS)
def test_an_invalid_tensor_is_rejected(make: Callable[..., bytes], what: str, tmp_path: Path) -> None:
    payload, reason = TENSORS[what]
    path = write(tmp_path / "a.pt", make(table({"a": payload}), {"0": FOUR}))
    with memory_limit(GIB), pytest.raises(CheckpointError, match=reason) as caught:
        read_all(path)
    assert one_line(caught.value, path)


def changed(index: int, **wrong: Any) -> Archive:
    """Return an archive with one changed record: 0 is data.pkl, 1 byteorder, 2 and 3 are storages."""
    records = torch_records(table({"a": tensor(storage("0")), "b": tensor(storage("1"))}), {"0": FOUR, "1": FOUR[::-1]})
    for name, value in wrong.items():
        setattr(records[index], name, value)
    return Archive(records)


def ended(**wrong: Any) -> Archive:
    archive = changed(0)
    for name, value in wrong.items():
        setattr(archive, name, value)
    return archive


def archive_with(*more: Record) -> Archive:
    archive = changed(0)
    archive.records.extend(more)
    return archive


def one_inside_another() -> Archive:
    """Return an archive in which storage 1 and its header are inside the bytes of storage 0."""
    inner = Archive([Record("archive/data/1", FOUR)]).bytes()[: 30 + 14 + 16]
    pickle = table({"a": tensor(storage("0", len(inner) // 4), shape=(15,)), "b": tensor(storage("1"))})
    archive = Archive(torch_records(pickle, {"0": inner, "1": b""}))
    whole = archive.bytes()
    archive.records[3] = Record("archive/data/1", b"", at=whole.find(inner), size=16, packed=16, crc=zlib.crc32(FOUR))
    return archive


def zip64(*fields: int, kind: int = 1) -> bytes:
    return struct.pack(f"<2H{len(fields)}Q", kind, 8 * len(fields), *fields)


def end64(count: int, size: int, begin: int, at: int | None = None) -> bytes:
    end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, begin)
    return end + struct.pack("<4sLQL", b"PK\x06\x07", 0, begin + size if at is None else at, 1)


NONE = 0xFFFFFFFF
GOOD = changed(0).bytes()
BEGIN = GOOD.rfind(b"PK\x05\x06") - sum(46 + len(record.name) for record in changed(0).records)
SIZE = GOOD.rfind(b"PK\x05\x06") - BEGIN
BOMB = zlib.compress(bytes(1 << 26), wbits=-15)

ARCHIVES: dict[str, tuple[Archive, str]] = {
    "a compressed bomb": (changed(2, data=BOMB, method=8, size=1 << 26, local={"size": 1 << 26}), "is compressed"),
    "a bomb that says it is stored": (
        changed(2, data=BOMB, size=1 << 26, local={"size": 1 << 26}),
        "contradictory sizes",
    ),
    "compressed only for its header": (changed(2, local={"method": 8}), "contradict"),
    "encrypted": (changed(2, flags=1), "is encrypted"),
    "strongly encrypted": (changed(2, flags=1 << 6), "is compressed"),
    "flags that differ": (changed(2, local={"flags": 1 << 11}), "contradict"),
    "a size too large": (changed(3, size=17, packed=17), "contradict"),
    "a size beyond the file": (changed(3, size=1 << 30, packed=1 << 30), "outside the file"),
    "another size in the header": (changed(2, local={"size": 12, "packed": 12}), "contradict"),
    "another CRC in the header": (changed(2, local={"crc": 1}), "contradict"),
    "a wrong CRC": (changed(2, crc=1, local={"crc": 1}), "tensor a does not match its checksum"),
    "a wrong CRC of the pickle": (changed(0, crc=1, local={"crc": 1}), "data.pkl does not match its checksum"),
    "a wrong name in the header": (changed(2, local_name=b"archive/data/x"), "contradict"),
    "a shorter name in the header": (changed(2, local_name=b"archive/data/"), "contradict"),
    "a header that is none": (changed(4, at=GOOD.rfind(b"PK\x03\x04") + 1), "outside the file"),
    "a header beyond the file": (changed(2, at=1 << 31), "outside the file"),
    "a header of another record": (changed(3, at=0), "contradicts|overlaps"),
    "overlapping records": (one_inside_another(), "'archive/data/1' overlaps"),
    "the same name twice": (archive_with(Record("archive/data/0", FOUR)), "duplicate record 'archive/data/0'"),
    "two archives in one": (archive_with(Record("other/data.pkl", b"x")), "not one of torch.save"),
    "records outside the folder": (archive_with(Record("evil.py", b"x")), "records outside its folder"),
    "no pickle": (changed(0, name="archive/other.pkl"), "not one of torch.save"),
    "a big-endian machine": (changed(1, data=b"big"), "big-endian"),
    "no endianness at all": (changed(1, data=b""), "big-endian"),
    "a name that is not UTF-8": (changed(1, name=b"archive/\xff"), "is not UTF-8"),
    "a descriptor that is not there": (changed(2, flags=8), "contradicts its data descriptor"),
    "a wrong descriptor": (
        changed(2, flags=8, after=struct.pack("<4s3L", b"PK\x07\x08", zlib.crc32(FOUR), 16, 15)),
        "contradicts its data descriptor",
    ),
    "a million records": (
        ended(count=0xFFFF, before_end=bytes(60_000_000) + end64(10**6, 60_000_000 + SIZE, BEGIN)),
        "contradict|1000000 records",
    ),
    "more records than there are": (ended(count=9), "states 9 records, but its directory has 5"),
    "fewer records than there are": (ended(count=2), "extra bytes"),
    "a directory elsewhere": (ended(begin=0), "zip directory is at the wrong position"),
    "a directory beyond the file": (ended(begin=1 << 31), "zip directory is at the wrong position"),
    "a directory of another size": (ended(size=1), "zip directory is at the wrong position"),
    "a part of several": (ended(disk=1), "join them"),
    "more after the end": (ended(tail=b"more"), "has data after the end"),
    "an end cut short": (ended(tail=b"PK\x05\x06"), "no directory"),
    "zip64 without its field": (changed(2, size=NONE, packed=NONE), "has no zip64 field"),
    "zip64 with half a field": (changed(2, size=NONE, packed=NONE, extra=zip64(16)), "has no zip64 field"),
    "zip64 of another kind": (changed(2, size=NONE, packed=NONE, extra=zip64(16, 16, kind=2)), "has no zip64 field"),
    "zip64 of 2^64-1": (changed(2, size=NONE, packed=NONE, extra=zip64(2**64 - 1, 2**64 - 1)), "outside the file"),
    "zip64 of two sizes": (changed(2, size=NONE, packed=NONE, extra=zip64(16, 12)), "contradictory sizes"),
    "zip64 with a header far away": (changed(2, at=NONE, extra=zip64(2**63)), "outside the file"),
    "zip64 that differs in the header": (
        changed(2, local={"size": NONE, "packed": NONE}, local_extra=zip64(12, 12)),
        "contradict",
    ),
    "zip64 end elsewhere": (ended(before_end=end64(5, SIZE, BEGIN, at=0)), "zip64 end record is at the wrong position"),
    "zip64 end with other counts": (ended(before_end=end64(4, SIZE, BEGIN)), "contradict"),
    "zip64 end of 2^63": (
        ended(count=0xFFFF, size=NONE, before_end=end64(5, 2**63, BEGIN, at=BEGIN + SIZE)),
        "wrong position",
    ),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_an_inconsistent_archive_is_rejected(what: str, tmp_path: Path) -> None:
    archive, reason = ARCHIVES[what]
    path = write(tmp_path / "a.pt", archive.bytes())
    begin = time.process_time()
    with memory_limit(GIB), pytest.raises(CheckpointError, match=reason) as caught:
        read_all(path)
    assert time.process_time() - begin < SECONDS
    assert one_line(caught.value, path)


@pytest.mark.parametrize(
    "archive",
    [
        changed(0),
        changed(2, crc=0, local={"crc": 0}),  # as torch writes with checksums turned off
        changed(
            2,
            flags=8,
            local={"size": 0, "packed": 0, "crc": 0},
            after=struct.pack("<4s3L", b"PK\x07\x08", zlib.crc32(FOUR), 16, 16),
        ),
        changed(2, flags=8, after=struct.pack("<4sL2Q", b"PK\x07\x08", zlib.crc32(FOUR), 16, 16)),
        changed(2, size=NONE, packed=NONE, extra=b"xx\x02\x00ab" + zip64(16, 16)),
        changed(2, local={"size": NONE, "packed": NONE}, local_extra=zip64(16, 16)),
        changed(0, at=NONE, extra=zip64(0)),
        ended(before_end=end64(5, SIZE, BEGIN)),
        ended(count=0xFFFF, size=NONE, begin=NONE, before_end=end64(5, SIZE, BEGIN)),
        archive_with(Record("archive/", b""), Record("archive/notes.txt", b"x")),
    ],
)
def test_an_unusual_but_valid_archive_is_read(archive: Archive, tmp_path: Path) -> None:
    read = read_all(write(tmp_path / "a.pt", archive.bytes()))
    assert read["a"].tolist() == [1, 2, 3, 4]
    assert read["b"].numpy().tobytes() == FOUR[::-1]


LEGACY: dict[str, tuple[bytes, str]] = {
    "another version": (MAGIC.replace(b"\xe9\x03", b"\xe8\x03") + MACHINE, "unknown version"),
    "a big-endian machine": (MAGIC + MACHINE.replace(b"\x88s.", b"\x89s."), "big-endian"),
    "no facts about the machine": (MAGIC + b"\x80\x02N.", "big-endian"),
    "no storages": (MAGIC + MACHINE + table({"a": tensor(storage())}) + b"\x80\x02N.", "no list of storages"),
    "a storage twice": (
        MAGIC + MACHINE + table({"a": tensor(storage())}) + b"\x80\x02](" + text("0") * 2 + b"e." + FOUR * 9,
        "other storages",
    ),
    "a view of a storage": (
        legacy(table({"a": tensor(storage(legacy=True).replace(b"NtQ", b")tQ"))}), {}),
        "as a view",
    ),
    "a count of 2^62": (
        legacy(table({"a": tensor(storage())}), {"0": FOUR}).replace(struct.pack("<q", 4) + FOUR, b"\xff" * 24),
        "has -1 elements",
    ),
    "nothing but magic": (MAGIC, "ends within its pickle"),
}


@pytest.mark.parametrize("what", LEGACY)
def test_an_inconsistent_legacy_file_is_rejected(what: str, tmp_path: Path) -> None:
    content, reason = LEGACY[what]
    path = write(tmp_path / "a.pt", content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_all(path)
    assert one_line(caught.value, path)
