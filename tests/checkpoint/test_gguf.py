"""GGUF files: files written by the gguf package are read exactly, damaged ones are rejected with a one-line error."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from llm_edge.checkpoint.download.smollm2 import smollm2_gguf
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.runtime.errors import CheckpointError

FLOATS = ("F32", "F16", "BF16")
QUANTIZABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
READ_ONLY = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")
READ_ONLY += ("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "NVFP4")
UNREADABLE = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0")


# ---- what the gguf package writes


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], keys: dict[str, Any] | None = None) -> Path:
    """Write a GGUF file of arrays that are already in their storage type."""
    writer = GGUFWriter(path, "llama")
    for key, value in (keys or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (stored, kind) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_as(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(len(kind) + sum(shape))
    if kind in FLOATS or kind in QUANTIZABLE:
        values = rng.standard_normal(shape).astype(np.float32)
        return quantize(values, GGMLQuantizationType[kind])
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    row = shape[-1] // block * block_bytes
    return rng.integers(0, 256, (*shape[:-1], row), dtype=np.uint8)


def small(path: Path) -> Path:
    keys = {
        "llama.block_count": 2,
        "llama.epsilon": 0.5,
        "llama.flag": True,
        "llama.word": "wörd",
        "llama.words": ["a", "", "ü"],
        "llama.numbers": [1, 2, 3],
        "llama.floats": [0.5, 1.5],
        "llama.flags": [True, False],
    }
    tensors = {f"blk.{i}.{kind}": (stored_as(kind, (3, 256)), kind) for i, kind in enumerate(("F32", "Q4_1", "Q6_K"))}
    return write(path, tensors | {"norm": (stored_as("F16", (256,)), "F16")}, keys)


@pytest.mark.parametrize("kind", FLOATS + QUANTIZABLE + READ_ONLY)
def test_every_type_dequantizes_like_the_gguf_package(kind: str, tmp_path: Path) -> None:
    shapes = {"one_row": (512,), "wide": (3, 1024), "deep": (2, 5, 256), "chunks": (300, 1024)}
    tensors = {name: (stored_as(kind, shape), kind) for name, shape in shapes.items()}
    file = GGUFFile(write(tmp_path / "a.gguf", tensors))
    for theirs in GGUFReader(tmp_path / "a.gguf").tensors:
        ours = file.load(theirs.name)
        with np.errstate(all="ignore"):
            expected = dequantize(theirs.data, theirs.tensor_type)
        assert tuple(ours.shape) == shapes[theirs.name]
        assert ours.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
        assert np.array_equal(ours.float().numpy(), expected.reshape(ours.shape), equal_nan=True)
        assert file.raw(theirs.name).tobytes() == theirs.data.tobytes()
        assert not file.raw(theirs.name).flags.writeable
        assert file.tensors[theirs.name].nbytes == theirs.n_bytes


def test_the_type_lists_of_these_tests_are_complete() -> None:
    assert {*FLOATS, *QUANTIZABLE, *READ_ONLY, *UNREADABLE} == {kind.name for kind in GGMLQuantizationType}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unsupported_type_is_named_in_the_error(kind: str, tmp_path: Path) -> None:
    file = GGUFFile(Builder().tensor("odd", (256,), GGMLQuantizationType[kind]).write(tmp_path / "a.gguf"))
    assert file.raw("odd").size == file.tensors["odd"].nbytes
    with pytest.raises(CheckpointError, match=f"'odd' is stored as {kind}"):
        file.load("odd")


def test_metadata_matches_the_gguf_package(tmp_path: Path) -> None:
    path = small(tmp_path / "a.gguf")
    file = GGUFFile(path)
    expected = {k: f.contents() for k, f in GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    assert {k: plain(v) for k, v in file.metadata.items()} == expected
    assert isinstance(file.metadata["llama.numbers"], np.ndarray)
    assert "norm" in file.tensors


def test_smollm2_is_parsed_quickly_and_matches_the_gguf_package() -> None:
    path = smollm2_gguf()
    begin = time.perf_counter()
    file = GGUFFile(path)
    assert time.perf_counter() - begin < 0.5
    reader = GGUFReader(path)
    assert {k: plain(v) for k, v in file.metadata.items()} == {
        k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")
    }
    assert [(t.name, t.data_offset, t.n_bytes) for t in reader.tensors] == [
        (t.name, t.offset, t.nbytes) for t in file.tensors.values()
    ]
    for theirs in reader.tensors[:8]:
        expected = dequantize(theirs.data, theirs.tensor_type)
        assert np.array_equal(file.load(theirs.name).numpy(), expected)


def test_loading_uses_little_more_memory_than_the_tensor(tmp_path: Path) -> None:
    n = 1 << 24
    path = Builder().tensor("big", (1024, n // 1024), GGMLQuantizationType.Q8_0).write(tmp_path / "a.gguf")
    file = GGUFFile(path)
    tracemalloc.start()
    try:
        assert file.load("big").numel() == n
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * 4 * n


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = small(tmp_path / "a.gguf")
    file = GGUFFile(path)
    loaded = [file.load(name) for name in file.tensors]
    raw = file.raw("norm")
    kept = raw.tobytes()
    del file
    assert raw.tobytes() == kept
    for tensor in loaded:
        tensor.mul_(2)  # its own memory, not the file's
    assert GGUFFile(path).raw("norm").tobytes() == kept


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


# ---- typed access


def test_typed_access_returns_values(tmp_path: Path) -> None:
    file = GGUFFile(small(tmp_path / "a.gguf"))
    assert file.meta_int("llama.block_count", minimum=1, maximum=2) == 2
    assert file.meta_int("llama.missing", default=7) == 7
    assert file.meta_float("llama.epsilon") == 0.5
    assert file.meta_float("llama.block_count") == 2.0
    assert file.meta_bool("llama.flag") is True
    assert file.meta_bool("llama.missing", default=False) is False
    assert file.meta_str("llama.word") == "wörd"
    assert file.meta_strings("llama.words") == ["a", "", "ü"]
    assert file.meta_ints("llama.numbers", length=3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda f: f.meta_int("llama.missing"), "no llama.missing"),
        (lambda f: f.meta_int("llama.block_count", minimum=3), "at least 3"),
        (lambda f: f.meta_int("llama.block_count", maximum=1), "at most 1"),
        (lambda f: f.meta_int("llama.flag"), "not an integer"),
        (lambda f: f.meta_int("llama.epsilon"), "not an integer"),
        (lambda f: f.meta_int("llama.numbers"), "is an array"),
        (lambda f: f.meta_float("llama.word"), "a finite number"),
        (lambda f: f.meta_bool("llama.block_count"), "true or false"),
        (lambda f: f.meta_str("llama.block_count"), "not a string"),
        (lambda f: f.meta_strings("llama.numbers"), "an array of strings"),
        (lambda f: f.meta_ints("llama.floats"), "an array of integers"),
        (lambda f: f.meta_ints("llama.flags"), "an array of integers"),
        (lambda f: f.meta_ints("llama.words"), "an array of integers"),
        (lambda f: f.meta_ints("llama.numbers", length=4), "has 3 entries; 4 are required"),
        (lambda f: f.tensor("absent"), "no tensor 'absent'"),
        (lambda f: f.load("absent"), "no tensor 'absent'"),
    ],
)
def test_typed_access_reports_wrong_types_in_one_line(read: Any, reason: str, tmp_path: Path) -> None:
    file = GGUFFile(small(tmp_path / "a.gguf"))
    with pytest.raises(CheckpointError, match=reason) as caught:
        read(file)
    assert one_line(caught.value, file.path)


def test_a_number_that_is_not_finite_is_rejected(tmp_path: Path) -> None:
    path = Builder().key("llama.nan", 6, struct.pack("<f", float("nan"))).write(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="finite"):
        GGUFFile(path).meta_float("llama.nan")


# ---- hostile files, byte by byte


def text(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(encoded)) + encoded


class Builder:
    """Writes GGUF files without validating them."""

    def __init__(self, version: int = 3, magic: bytes = b"GGUF") -> None:
        self.head = magic + struct.pack("<I", version)
        self.keys: list[bytes] = []
        self.rows: list[bytes] = []
        self.size = 0
        self.n_tensors: int | None = None
        self.n_keys: int | None = None

    def key(self, name: str | bytes, kind: int, payload: bytes) -> Builder:
        self.keys.append(text(name) + struct.pack("<I", kind) + payload)
        return self

    def row(self, name: str, ne: list[int], kind: int, offset: int, n_dims: int | None = None) -> Builder:
        dims = struct.pack(f"<I{len(ne)}Q", len(ne) if n_dims is None else n_dims, *ne)
        self.rows.append(text(name) + dims + struct.pack("<IQ", kind, offset))
        return self

    def tensor(self, name: str, ne: tuple[int, ...], kind: GGMLQuantizationType) -> Builder:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        self.row(name, list(ne), int(kind), self.size)
        self.size += -(-int(np.prod(ne)) // block * block_bytes // 32) * 32
        return self

    def counts(self, n_tensors: int | None = None, n_keys: int | None = None) -> Builder:
        self.n_tensors, self.n_keys = n_tensors, n_keys
        return self

    def write(self, path: Path) -> Path:
        n_tensors = len(self.rows) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        header = self.head + struct.pack("<QQ", n_tensors, n_keys) + b"".join(self.keys + self.rows)
        path.write_bytes(header + bytes(-len(header) % 32 + self.size))
        return path


F32 = int(GGMLQuantizationType.F32)
Q4_0 = int(GGMLQuantizationType.Q4_0)
U32, STRING, ARRAY = 4, 8, 9
HUGE = 2**63


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def nested(depth: int) -> bytes:
    return array(ARRAY, 1) * depth + array(U32, 1, bytes(4))


HOSTILE: dict[str, tuple[Builder, str]] = {
    "magic": (Builder(magic=b"GGML"), "not a GGUF file"),
    "version 1": (Builder(version=1), "version 1; versions 2 and 3"),
    "version 4": (Builder(version=4), "version 4; versions 2 and 3"),
    "big-endian": (Builder(version=3 << 24), "big-endian"),
    "array of 2^63 numbers": (
        Builder().key("k", ARRAY, array(U32, HUGE)),
        "states 9223372036854775808 items",
    ),
    "array of 2^63 strings": (
        Builder().key("k", ARRAY, array(STRING, HUGE)),
        "states 9223372036854775808 items",
    ),
    "array of 2^63 arrays": (
        Builder().key("k", ARRAY, array(ARRAY, HUGE)),
        "states 9223372036854775808 items",
    ),
    "array of 2^64-1 bytes": (Builder().key("k", ARRAY, array(0, 2**64 - 1)), "states 18446744073709551615"),
    "array of an unknown type": (Builder().key("k", ARRAY, array(99, 0)), "array of the unknown type 99"),
    "depth bomb": (Builder().key("k", ARRAY, nested(10_000)), "nests arrays more than"),
    "string longer than the file": (Builder().key("k", STRING, struct.pack("<Q", HUGE)), "ends within"),
    "item longer than the file": (
        Builder().key("k", ARRAY, array(STRING, 1, struct.pack("<Q", HUGE))),
        "ends within item 0",
    ),
    "items that run out": (Builder().key("k", ARRAY, array(STRING, 2, text("x" * 39))), "ends within item 1"),
    "string not UTF-8": (Builder().key("k", STRING, text(b"\xff")), "not UTF-8"),
    "item not UTF-8": (Builder().key("k", ARRAY, array(STRING, 1, text(b"\xff"))), "not UTF-8"),
    "name not UTF-8": (Builder().key(b"\xff", U32, bytes(4)), "not UTF-8"),
    "name too long": (Builder().key("k" * 70_000, U32, bytes(4)), "the limit is"),
    "value of an unknown type": (Builder().key("k", 13, bytes(8)), "unknown type 13"),
    "not a boolean": (Builder().key("k", 7, b"\x02"), "not a boolean"),
    "key twice": (Builder().key("k", U32, bytes(4)).key("k", U32, bytes(4)), "duplicate key 'k'"),
    "2^63 keys": (Builder().counts(n_keys=HUGE), "states 9223372036854775808 keys"),
    "2^63 tensors": (Builder().counts(n_tensors=HUGE), "states 9223372036854775808 tensors"),
    "alignment 0": (Builder().key("general.alignment", U32, bytes(4)), "power of two"),
    "alignment 24": (Builder().key("general.alignment", U32, struct.pack("<I", 24)), "power of two"),
    "alignment of another type": (Builder().key("general.alignment", STRING, text("32")), "power of two"),
    "alignment of 2^31": (
        Builder().key("general.alignment", U32, struct.pack("<I", 2**31)).row("t", [8], F32, 0),
        "truncated",
    ),
    "no dimensions": (Builder().row("t", [], F32, 0), "0 dimensions"),
    "five dimensions": (Builder().row("t", [1] * 5, F32, 0), "5 dimensions"),
    "2^32-1 dimensions": (Builder().row("t", [8], F32, 0, n_dims=2**32 - 1), "4294967295 dimensions"),
    "a dimension of 0": (Builder().row("t", [8, 0], F32, 0), "dimension of 0"),
    "dimensions that overflow to 0": (Builder().row("t", [2**32, 2**32], F32, 0), "truncated"),
    "dimensions that overflow to 32": (Builder().row("t", [2**63 + 16, 2], F32, 0), "truncated"),
    "rows not of whole blocks": (Builder().row("t", [33], Q4_0, 0), "not whole Q4_0 blocks of 32"),
    "an unknown tensor type": (Builder().row("t", [32], 77, 0), "unknown type 77"),
    "a removed tensor type": (Builder().row("t", [32], 4, 0), "unknown type 4"),
    "an offset beyond the end": (Builder().row("t", [8], F32, 2**40), "truncated"),
    "an offset that overflows": (Builder().row("t", [8], F32, 2**64 - 32), "truncated"),
    "an offset not aligned": (
        Builder().tensor("t", (64,), GGMLQuantizationType.F32).row("u", [8], F32, 8),
        "aligned",
    ),
    "tensors that overlap": (
        Builder().tensor("t", (64,), GGMLQuantizationType.F32).row("u", [8], F32, 32),
        "'t' and 'u' overlap",
    ),
    "a tensor twice": (
        Builder().tensor("t", (8,), GGMLQuantizationType.F32).tensor("t", (8,), GGMLQuantizationType.F32),
        "duplicate tensor 't'",
    ),
    "a renamed part": (
        Builder().key("split.count", 2, struct.pack("<H", 3)),
        "one of 3 files of a split model: give it",
    ),
    "a number of parts that is none": (Builder().key("split.count", STRING, text("3")), "split.count is '3'"),
    "too many parts": (Builder().key("split.count", U32, struct.pack("<I", 2**31)), "split.count is 2147483648"),
    "control characters": (Builder().key("a\nb\x1b[2J", 99, b"\x00"), r"a\\nb\\x1b"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_rejected_quickly(what: str, tmp_path: Path) -> None:
    builder, reason = HOSTILE[what]
    path = builder.write(tmp_path / "hostile.gguf")
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=reason) as caught:
        GGUFFile(path)
    assert time.perf_counter() - begin < 1
    assert one_line(caught.value, path)


def test_the_49_bytes_that_hang_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, 0, HUGE))
    assert path.stat().st_size == 49
    with pytest.raises(CheckpointError, match="states 9223372036854775808 items in 'k' with 0 bytes left"):
        GGUFFile(path)


@pytest.mark.parametrize(("kind", "item"), [(STRING, bytes(8)), (ARRAY, array(U32, 0))])
def test_the_number_of_metadata_items_is_limited(
    kind: int, item: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_edge.checkpoint.gguf.header.MAX_ITEMS", 100)
    fits = Builder().key("k", ARRAY, array(kind, 60, item * 60)).key("l", ARRAY, array(kind, 40, item * 40))
    assert len(GGUFFile(fits.write(tmp_path / "a.gguf")).metadata["l"]) == 40
    fits.key("m", ARRAY, array(kind, 1, item))
    with pytest.raises(CheckpointError, match="states 1 items in 'm'; the limit is 0"):
        GGUFFile(fits.write(tmp_path / "b.gguf"))


def test_unusual_but_valid_files_are_read(tmp_path: Path) -> None:
    builder = Builder(version=2).key("split.count", 2, struct.pack("<H", 1))
    builder.key("nested", ARRAY, array(ARRAY, 2, array(U32, 1, struct.pack("<I", 5)) + array(STRING, 1, text("x"))))
    builder.key("empty", ARRAY, array(STRING, 0)).key("none", ARRAY, array(U32, 0))
    builder.key("general.alignment", U32, struct.pack("<I", 64))
    builder.row("second", [8], F32, 64).row("first", [8], F32, 0)
    builder.size = 256
    file = GGUFFile(builder.write(tmp_path / "a.gguf"))
    assert [plain(item) for item in file.metadata["nested"]] == [[5], ["x"]]
    assert file.meta_strings("empty") == file.meta_strings("none") == []
    assert file.tensors["first"].offset % 64 == 0
    assert file.tensors["second"].offset == file.tensors["first"].offset + 64
    assert file.load("second").tolist() == [0] * 8


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"GGUF\x03\0\0\0", b"#!/bin/sh\necho\n", b"PK\x03\x04" * 9])
def test_files_that_are_not_gguf_are_rejected(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"download it again|not a GGUF"):
        GGUFFile(path)


def test_paths_that_are_not_regular_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFFile(tmp_path)


def test_a_file_truncated_anywhere_is_rejected(tmp_path: Path) -> None:
    whole = small(tmp_path / "whole.gguf")
    content = whole.read_bytes()
    end = max(tensor.offset + tensor.nbytes for tensor in GGUFFile(whole).tensors.values())
    path = tmp_path / "cut.gguf"
    for size in range(end):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"truncated|is empty") as caught:
            GGUFFile(path)
        assert one_line(caught.value, path)


def test_smollm2_truncated_at_twenty_points_is_rejected(tmp_path: Path) -> None:
    whole = smollm2_gguf()
    file = GGUFFile(whole)
    begin = min(tensor.offset for tensor in file.tensors.values())
    end = max(tensor.offset + tensor.nbytes for tensor in file.tensors.values())
    cuts = [begin * i // 10 for i in range(1, 11)] + [begin + (end - begin) * i // 10 for i in range(1, 10)]
    with whole.open("rb") as source:
        header = source.read(begin)
    path = tmp_path / "cut.gguf"
    for size in [*cuts, end - 1]:
        path.write_bytes(header[:size])
        with path.open("r+b") as sparse:  # the tensor data is not read, so a sparse file suffices
            sparse.truncate(size)
        started = time.perf_counter()
        with pytest.raises(CheckpointError, match="truncated"):
            GGUFFile(path)
        assert time.perf_counter() - started < 1


def test_randomly_damaged_files_are_read_or_rejected(tmp_path: Path) -> None:
    content = small(tmp_path / "whole.gguf").read_bytes()
    header = min(t.offset for t in GGUFFile(tmp_path / "whole.gguf").tensors.values())
    rng = random.Random(20)
    path = tmp_path / "damaged.gguf"
    read = 0
    refusals: list[CheckpointError] = []
    for _ in range(4000):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            position = rng.randrange(header)
            damaged[position] = rng.choice((rng.randrange(256), damaged[position] ^ 1 << rng.randrange(8), 0, 255))
        path.write_bytes(damaged)
        begin = time.perf_counter()
        try:
            file = GGUFFile(path)
            for name in file.tensors:
                file.load(name)
            read += 1
        except CheckpointError as e:
            refusals.append(e)
        assert time.perf_counter() - begin < 1
    assert min(read, len(refusals)) > 100
    assert all(one_line(refusal, path) for refusal in refusals)


def one_line(error: Exception, path: Path) -> bool:
    message = str(error)
    return message.startswith(f"{path}: ") and message.isprintable() and len(message) < len(str(path)) + 400
