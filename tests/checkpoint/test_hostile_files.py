"""Ten thousand damaged files of each checkpoint format: each is read, or rejected with a one-line error."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from mutate import memory_limit, mutations

from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.tensors.tensor_file import open_tensor_file
from llm_edge.runtime.errors import CheckpointError

GIB = 1 << 30
SECONDS = 2.0
FILES = 10_000


def one_line(error: Exception, path: Path) -> bool:
    message = str(error)
    return message.startswith(f"{path}: ") and message.isprintable() and len(message) < len(str(path)) + 500


def read_all(path: Path) -> dict[str, torch.Tensor]:
    file = open_tensor_file(path)
    return {name: file.load(name) for name in file.tensors}


def small_state_dict() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(6, 4, generator=generator)
    return {
        "module.embed.weight": shared,
        "module.rows": shared[2:4],
        "module.turned": shared.t(),
        "module.norm": torch.ones(4, dtype=torch.bfloat16),
        "module.steps": torch.arange(5),
    }


def small_torch(path: Path, checksums: bool, legacy_format: bool) -> None:
    kept = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        value = {"epoch": 1, "model": small_state_dict()}
        torch.save(value, path, _use_new_zipfile_serialization=not legacy_format)
    finally:
        torch.serialization.set_crc32_options(kept)


def small_safetensors(path: Path) -> None:
    tensors = {name: tensor.contiguous().clone() for name, tensor in small_state_dict().items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def small_gguf(path: Path) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("llama.words", ["a", "", "\u00fc"])
    writer.add_array("llama.numbers", [1, 2, 3])
    values = np.random.default_rng(3).standard_normal((2, 256)).astype(np.float32)
    for kind in (
        GGMLQuantizationType.F32,
        GGMLQuantizationType.F16,
        GGMLQuantizationType.Q4_0,
        GGMLQuantizationType.Q8_0,
    ):
        writer.add_tensor(kind.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> None:
    file = GGUFFile(path)
    for name in file.tensors:
        file.load(name)


def all_but_data(content: bytes, data: Sequence[bytes]) -> list[range]:
    """Return the parts of a file outside the tensor data."""
    taken = sorted((content.find(chunk), len(chunk)) for chunk in data)
    ends = [0, *(at + size for at, size in taken)]
    begins = [*(at for at, _ in taken), len(content)]
    return [range(a, b) for a, b in zip(ends, begins, strict=True) if a < b]


def survives(
    content: bytes, headers: Sequence[range], count: int, seed: int, read: Callable[[Path], Any], path: Path
) -> tuple[int, int]:
    """Return how many damaged copies were read and how many rejected; any other outcome fails the test."""
    done = refused = 0
    with memory_limit(GIB):
        for index, damaged in enumerate(mutations(content, count, seed, headers)):
            path.unlink()  # ext4 flushes overwritten files to disk immediately, which is slow
            path.write_bytes(damaged)
            begin = time.process_time()
            clear = True
            try:
                read(path)
                done += 1
            except CheckpointError as error:
                refused += 1
                clear = one_line(error, path)
            except Exception as error:
                raise AssertionError(f"file {index} of seed {seed}: {error!r}") from error
            seconds = time.process_time() - begin
            assert clear, f"file {index} of seed {seed}: not one line"
            assert seconds < SECONDS, f"file {index} of seed {seed}: {seconds:.1f} s"
    return done, refused


@pytest.mark.parametrize("kind", ["safetensors", "zip", "zip without checksums", "legacy", "gguf"])
def test_damaged_files_are_read_or_rejected(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if kind == "safetensors":
        small_safetensors(path)
    elif kind == "gguf":
        small_gguf(path)
    else:
        small_torch(path, kind == "zip", kind == "legacy")
    content = path.read_bytes()
    headers = all_but_data(content, [small_state_dict()["module.embed.weight"].numpy().tobytes()] * (kind != "gguf"))
    if kind == "gguf":
        headers = [range(min(tensor.offset for tensor in GGUFFile(path).tensors.values()))]
    count = FILES // 2 if kind.startswith("zip") else FILES
    done, refused = survives(content, headers, count, 7, read_gguf if kind == "gguf" else read_all, path)
    assert done + refused == count
    assert min(done, refused) > count / 100
