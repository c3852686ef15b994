"""Cache files: a saved prefix continues in another engine, and a bad file is rejected with a one-line error."""

from __future__ import annotations

import errno
import io
import os
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from mutate import memory_limit, mutations

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime import GenerationResult, SamplingParams
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import InputError, MachineError
from llm_edge.runtime.scheduling.prefixes import CHUNK_ALIGNMENT

SYSTEM = "The quick brown fox jumps over the lazy dog. " * 6
GREEDY = SamplingParams(temperature=0, repetition_penalty=10, repetition_window=-1, max_tokens=30)
DRAWN = SamplingParams(temperature=1.0, max_tokens=30, seed=1)
Load = Callable[..., Engine]


@pytest.fixture(scope="module")
def reader(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine.load(tiny_bundle, "fp32", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def saved(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "system.npz"
    with Engine.load(tiny_bundle, "fp32", threads=1) as engine:
        engine.generate(SYSTEM, GREEDY).result()
        assert engine.save_cache(path, SYSTEM) > 50
    return path


def outcome(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.tokens, result.finish_reason


def load_error(engine: Engine, path: Path) -> str:
    with pytest.raises(InputError) as error:
        engine.load_cache(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))
    return message


def arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)


def write_arrays(path: Path, arrays: dict[str, Any], save: Callable[..., None] = np.savez) -> Path:
    save(path, **arrays)
    return path


# Saving and loading


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_saved_prompt_is_reused_by_another_engine(load_engine: Load, tmp_path: Path, precision: str) -> None:
    first, path = load_engine(precision), tmp_path / "system.npz"
    first.generate(SYSTEM, GREEDY).result()
    length = first.save_cache(path, SYSTEM)
    assert length == len(first.tokenizer.encode(SYSTEM))
    second = load_engine(precision)
    assert second.load_cache(path) == length
    assert second.counters().kept_tokens == length
    for params in (GREEDY, DRAWN):
        for prompt in (SYSTEM, SYSTEM + "What is the capital of France?"):
            found = second.generate(prompt, params).result()
            fresh = load_engine(precision).generate(prompt, params).result()
            assert outcome(found) == outcome(fresh)
            assert (
                found.timings.cached_tokens
                >= (length - 2) // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT
                > fresh.timings.cached_tokens
                == 0
            )


def test_a_saved_conversation_continues_in_another_engine(load_engine: Load, tmp_path: Path) -> None:
    engine, path = load_engine(), tmp_path / "turn.npz"
    messages = [{"role": "user", "content": SYSTEM}]
    answer = engine.chat(messages, DRAWN).result()
    whole = [*engine.encode_chat(messages), *answer.tokens]
    assert engine.save_cache(path, whole) == len(whole) - 1  # the last token drawn was not computed
    assert engine.save_cache(path, str(path)) <= 1
    engine.save_cache(path, whole)
    other = load_engine()
    assert other.load_cache(path) == len(whole) - 1
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And?"}]
    assert other.chat(messages, GREEDY).result().tokens == engine.chat(messages, GREEDY).result().tokens


def test_nothing_is_written_for_a_prompt_that_was_not_computed(load_engine: Load, tmp_path: Path) -> None:
    assert load_engine().save_cache(tmp_path / "none.npz", SYSTEM) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_cache_can_be_loaded_during_generation(load_engine: Load, saved: Path) -> None:
    engine = load_engine(active=2, kept=1)
    long = replace(GREEDY, max_tokens=300)
    wanted = [outcome(load_engine().generate(prompt, long).result()) for prompt in ("What is", "Paris")]
    answers = [engine.generate(prompt, long) for prompt in ("What is", "Paris")]
    for _ in range(20):
        assert engine.load_cache(saved) > 50
    assert [outcome(answer.result()) for answer in answers] == wanted
    little = load_engine(cache_bytes=1000)
    little.load_cache(saved)
    assert little.counters().kept_tokens == 0


# Bad files


def test_a_cache_of_another_precision_is_rejected(load_engine: Load, saved: Path) -> None:
    for precision in ("int8", "int4"):
        assert "another bundle or precision" in load_error(load_engine(precision), saved)


def test_a_cache_of_another_bundle_is_rejected(saved: Path, tmp_path: Path) -> None:
    checkpoint = tiny.save_checkpoint(tmp_path / "other", seed=1)
    bundle = tmp_path / "bundle"
    export(str(checkpoint), ExportOptions(bundle, precision="fp32", validate=False))
    with Engine.load(bundle, "fp32", threads=1) as engine:
        assert "another bundle or precision" in load_error(engine, saved)


def test_paths_that_are_not_regular_files_are_rejected(reader: Engine, tmp_path: Path) -> None:
    assert "No such file" in load_error(reader, tmp_path / "missing")
    load_error(reader, tmp_path)
    pipe = tmp_path / "pipe"
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe)
        load_error(reader, pipe)  # without blocking
    if Path("/dev/zero").exists():
        load_error(reader, Path("/dev/zero"))
    for content in (b"", b"PK", b"no archive at all" * 100, bytes(100_000)):
        (tmp_path / "file").write_bytes(content)
        load_error(reader, tmp_path / "file")


def test_truncated_files_are_rejected(reader: Engine, saved: Path, tmp_path: Path) -> None:
    content, path = saved.read_bytes(), tmp_path / "cut.npz"
    for length in [*range(0, 200, 9), *range(200, len(content), len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:length])
        load_error(reader, path)


def test_damaged_files_are_rejected_or_give_the_same_answer(reader: Engine, saved: Path, tmp_path: Path) -> None:
    content, path = saved.read_bytes(), tmp_path / "damaged.npz"
    wanted = arrays(saved)
    directory = content.rindex(b"PK\x01\x02", 0, content.index(b"PK\x01\x02") + 4)
    headers = [range(600), range(directory, len(content)), range(len(content) - 22, len(content))]
    right = 0
    with memory_limit(512 << 20), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for damaged in mutations(content, 400, 1, headers):
            path.write_bytes(damaged)
            message = ""
            try:
                assert reader.load_cache(path) == len(wanted["tokens"])
                right += 1
            except InputError as error:
                message = str(error)
            assert not message or message.startswith(f"{path}: ")
            assert "\n" not in message
    assert right < 200
    prompt = [int(token) for token in wanted["tokens"]]
    assert outcome(reader.generate(prompt, GREEDY).result())[1]


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": None},
        {"0": None},
        {"3": None},
        {"identity": None},
        {"identity": np.array("0" * 64)},
        {"identity": np.array("x" * 100_000)},
        {"identity": np.zeros(3)},
        {"tokens": np.zeros((2, 30), np.int64)},
        {"tokens": np.zeros(0, np.int64)},
        {"tokens": np.full(61, 2.0)},
        {"tokens": np.zeros(5000, np.int64)},
        {"tokens": np.zeros(5_000_000, np.int64)},
        {"tokens": np.array(7)},
        {"0": np.zeros((2, 5, 32), np.float32)},
        {"0": np.zeros((1, 2, 61, 32), np.float32)},
        {"1": np.zeros((2, 64, 32), np.float64)},
        {"1": np.zeros((2, 64, 32), np.float16)},
        {"2": np.zeros(0, np.float32)},
        {"2": np.zeros((3000, 3000), np.float32)},
    ],
    ids=str,
)
def test_unexpected_arrays_are_rejected(reader: Engine, saved: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    contents = {name: value for name, value in {**arrays(saved), **change}.items() if value is not None}
    load_error(reader, write_arrays(tmp_path / "other.npz", contents))


@pytest.mark.parametrize("token", [-1, 331, 2**40])
def test_tokens_outside_the_vocabulary_are_rejected(reader: Engine, saved: Path, tmp_path: Path, token: int) -> None:
    contents = arrays(saved)
    contents["tokens"][3] = token
    with pytest.raises(InputError, match=r"^[^\n]*vocabulary[^\n]*$"):
        reader.load_cache(write_arrays(tmp_path / "ids.npz", contents))


def test_other_array_layouts_and_compression_are_rejected(reader: Engine, saved: Path, tmp_path: Path) -> None:
    contents = arrays(saved)
    load_error(reader, write_arrays(tmp_path / "packed.npz", contents, np.savez_compressed))
    fortran = {**contents, "0": np.asfortranarray(contents["0"])}
    load_error(reader, write_arrays(tmp_path / "fortran.npz", fortran))
    swapped = {**contents, "0": contents["0"].astype(">f4")}
    load_error(reader, write_arrays(tmp_path / "endian.npz", swapped))
    bomb = {**contents, "1": np.zeros((2, 100_000_000 // 4), np.float32)}
    write_arrays(tmp_path / "bomb.npz", bomb, np.savez_compressed)
    with memory_limit(64 << 20):
        load_error(reader, tmp_path / "bomb.npz")


class Trap:
    """Unpickling it has a visible side effect."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["identity", "tokens", "0", "3"])
def test_pickled_arrays_are_not_executed(reader: Engine, saved: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    trap = np.array([Trap(mark)], dtype=object)
    load_error(reader, write_arrays(tmp_path / "trap.npz", {**arrays(saved), name: trap}))
    assert not mark.exists()


def with_header(saved: Path, path: Path, name: str, header: bytes, body: bytes = b"") -> Path:
    """A copy in which one array is replaced by a handcrafted header."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.namelist():
            raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body
            new.writestr(entry, raw if entry == f"{name}.npy" else old.read(entry))
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{" * 3000,
        b"[" * 3000 + b"]" * 3000,
        b"-" * 9000 + b"1",
        b"(" * 60_000,
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (100000000000000,), }\n",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }\n",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",), }\n",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n",
        b"{'descr': [('a', '<i8', (1000000, 1000000))], 'fortran_order': False, 'shape': (1,), }\n",
        b"{'descr': '(999999999,)<i8', 'fortran_order': False, 'shape': (1,), }\n",
        b"{[]: 1}\n",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (1L,), }\n",
        b"__import__('os').mkdir('owned')\n",
        b"'''\n",
        b"  1\n 2\n",
        b"\x00\xff\n",
    ],
    ids=range(17),
)
@pytest.mark.parametrize("name", ["identity", "tokens", "1"])
def test_wrong_array_headers_are_rejected(
    reader: Engine, saved: Path, tmp_path: Path, name: str, header: bytes
) -> None:
    path = with_header(saved, tmp_path / "header.npz", name, header, bytes(488))
    with memory_limit(64 << 20):
        load_error(reader, path)


def test_wrong_archive_sizes_are_rejected(reader: Engine, saved: Path, tmp_path: Path) -> None:
    content, path = saved.read_bytes(), tmp_path / "sizes.npz"
    places = [at for at in range(len(content)) if content.startswith(b"PK\x01\x02", at)]
    assert len(places) == 6
    for at in places:
        for value in (2**31, 2**32 - 2, 0, 1):
            changed = bytearray(content)
            struct.pack_into("<2I", changed, at + 20, value, value)
            path.write_bytes(changed)
            with memory_limit(64 << 20):
                load_error(reader, path)


@pytest.mark.skipif(sys.platform != "linux", reason="makes a sparse file and limits memory as Linux does")
@pytest.mark.parametrize("size", [10**9, 4 * 10**9])
def test_an_archive_directory_with_too_many_entries_is_rejected(reader: Engine, tmp_path: Path, size: int) -> None:
    path = tmp_path / "sparse.npz"
    with path.open("wb") as file:
        file.write(b"PK\x01\x02")
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 6, 6, size, 0, 0))
    with memory_limit(64 << 20):
        load_error(reader, path)


def test_an_archive_with_extra_entries_is_rejected(reader: Engine, saved: Path, tmp_path: Path) -> None:
    contents = arrays(saved) | {f"extra {number}": np.zeros(1) for number in range(3000)}
    load_error(reader, write_arrays(tmp_path / "many.npz", contents))


# Writing


@pytest.fixture
def writer(load_engine: Load) -> Engine:
    engine = load_engine()
    engine.generate(SYSTEM, GREEDY).result()
    return engine


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_write_changes_no_file(
    writer: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    kept = tmp_path / "kept.npz"
    writer.save_cache(kept, SYSTEM)
    before = kept.read_bytes()

    def savez(file: io.BufferedWriter, **_: Any) -> None:
        file.write(b"PK\x03\x04 half of it")
        raise error

    monkeypatch.setattr(np, "savez", savez)
    for path in (kept, tmp_path / "new.npz"):
        with pytest.raises(MachineError if isinstance(error, OSError) else KeyboardInterrupt) as failed:
            writer.save_cache(path, SYSTEM)
        assert isinstance(error, KeyboardInterrupt) or str(failed.value) == (
            f"{path}: cannot be written (No space left on device)"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["kept.npz"]
    assert kept.read_bytes() == before


def test_unwritable_paths_are_reported(writer: Engine, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (
        tmp_path / "missing" / "x",
        tmp_path / "folder",
        saved / "x",
        tmp_path / "a\0b",
        tmp_path / ("n" * 999),
    ):
        with pytest.raises(MachineError, match=r"^[^\n]*: cannot be written \([^\n]+\)$"):
            writer.save_cache(path, SYSTEM)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert list((tmp_path / "folder").iterdir()) == []
