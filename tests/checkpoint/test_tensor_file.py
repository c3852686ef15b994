"""Tensor files: files of torch and safetensors are read exactly, with one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from llm_edge.checkpoint.tensors.tensor_data import TensorInfo
from llm_edge.checkpoint.tensors.tensor_file import open_tensor_file
from llm_edge.checkpoint.tensors.wrapper_names import strip_wrappers
from llm_edge.runtime.errors import CheckpointError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def save_zip(value: Any, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def save_legacy(value: Any, path: Path, **options: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False, **options)
    return path


def save_safetensors(value: Mapping[str, torch.Tensor], path: Path) -> Path:
    safetensors.torch.save_file(dict(value), path)
    return path


TORCH = {"zip": save_zip, "legacy": save_legacy}
ALL = TORCH | {"safetensors": save_safetensors}
each_torch = pytest.mark.parametrize("save", TORCH.values(), ids=TORCH)
each_format = pytest.mark.parametrize("save", ALL.values(), ids=ALL)
Save = Callable[..., Path]


def assert_same(path: Path, expected: Mapping[str, torch.Tensor]) -> None:
    file = open_tensor_file(path)
    assert file.path == path
    assert dict(file.tensors) == {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in expected.items()}
    for name, theirs in expected.items():
        ours = file.load(name)
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous()
        assert not ours.requires_grad
        assert torch.equal(ours, theirs)


def one_line(error: Exception, path: Path) -> bool:
    message = str(error)
    return message.startswith(f"{path}: ") and message.isprintable() and len(message) < len(str(path)) + 500


# ---- agreement with torch


def every_type() -> dict[str, torch.Tensor]:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)) * 50
    tensors = {str(dtype): values.abs().to(dtype) for dtype in (*FLOATS, *INTEGERS)}
    return tensors | {"bool": values > 0}


@each_format
def test_every_data_type_is_read(save: Save, tmp_path: Path) -> None:
    assert_same(save(every_type(), tmp_path / "a.any"), every_type())


@each_torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(save: Save, protocol: int, tmp_path: Path) -> None:
    assert_same(
        save({"a": every_type()["torch.float16"]}, tmp_path / "a", pickle_protocol=protocol),
        {"a": every_type()["torch.float16"]},
    )


@each_torch
def test_views_parameters_and_unusual_shapes_match_torch(save: Save, tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    deep = torch.randn(2, 3, 1, 4)
    tensors = OrderedDict(
        whole=base,
        rows=base[2:5],
        row=base[3],
        one=base[1, 2],
        transposed=base.t(),
        transposed_rows=base[1:4].t(),
        permuted=deep.permute(3, 1, 2, 0),
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        expanded_of_one=torch.randn(1, 4).as_strided((1, 4), (77, 1)),
        shared=base,
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0),
        empty_3d=torch.zeros(2, 0, 3),
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
        buffer=torch.nn.Buffer(torch.ones(3)),
    )
    marked = torch.nn.Parameter(torch.randn(2))
    marked.layer = 3  # type: ignore[attr-defined]
    tensors["marked"] = marked
    path = save(tensors, tmp_path / "a.bin")
    if save is save_zip:
        expected = torch.load(path, weights_only=True)
    else:  # weights_only does not read every one of these from the old format
        expected = {name: tensor.detach() for name, tensor in tensors.items()}
    assert_same(path, {name: tensor.detach() for name, tensor in expected.items()})


@each_torch
def test_the_weights_of_a_checkpoint_with_an_optimizer_are_found(save: Save, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    checkpoint = {
        "epoch": 3,
        "best": 1.5,
        "seed": 2**70,
        "notes": ["a", None, True, (1, -2), {"nested": {"deeper": [b"bytes", bytearray(b"x"), {1}, 1j]}}, {(1, 2): 3}],
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
        "model_state_dict": model.state_dict(),
    }
    assert_same(save(checkpoint, tmp_path / "a.pt"), model.state_dict())


@each_torch
@pytest.mark.parametrize("wrapper", ["model_state_dict", "state_dict", "model"])
def test_wrapper_keys_are_removed(save: Save, wrapper: str, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    assert_same(save({"epoch": 1, "b": torch.zeros(1), wrapper: tensors}, tmp_path / "a.pt"), tensors)
    nothing = {"model_state_dict": None, "state_dict": {}, "model": tensors}
    assert_same(save(nothing, tmp_path / "b.pt"), tensors)


@each_torch
def test_other_values_are_ignored(save: Save, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    assert_same(save(tensors | {"model": 3, "_extra_state": {"x": 1}}, tmp_path / "a.pt"), tensors)


@each_format
def test_prefixes_of_wrapped_models_are_stripped(save: Save, tmp_path: Path) -> None:
    names = ("module._orig_mod.a.weight", "_orig_mod.module.module.b", "c.module.weight", "modules.d")
    tensors = {name: torch.full((1,), i) for i, name in enumerate(names)}
    clean = ("a.weight", "b", "c.module.weight", "modules.d")
    assert_same(save(tensors, tmp_path / "a"), {name: torch.full((1,), i) for i, name in enumerate(clean)})


def test_names_that_collide_without_their_prefix_are_rejected() -> None:
    assert strip_wrappers(["module.a", "b"], "x") == {"a": "module.a", "b": "b"}
    with pytest.raises(CheckpointError, match=r"^x: 'a' and 'module.a' differ only in"):
        strip_wrappers(["a", "module.a"], "x")


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    kept = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save_zip(every_type(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(kept)
    assert_same(path, every_type())


@each_format
def test_the_suffix_does_not_matter(save: Save, tmp_path: Path) -> None:
    for suffix in ("pt", "bin", "safetensors", "gguf", "txt"):
        assert_same(save({"a": torch.ones(2)}, tmp_path / f"a.{suffix}"), {"a": torch.ones(2)})


def test_a_safetensors_header_resembling_a_pickle_is_recognized(tmp_path: Path) -> None:
    path = save_safetensors({"a": torch.ones(2)}, tmp_path / "a")
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    padded = content[8 : 8 + length].ljust(0x280)
    path.write_bytes(struct.pack("<Q", 0x280) + padded + content[8 + length :])
    assert path.read_bytes().startswith(b"\x80\x02")
    assert_same(path, {"a": torch.ones(2)})


# ---- errors


@each_format
def test_types_torch_does_not_compute_in_are_listed_but_not_loaded(save: Save, tmp_path: Path) -> None:
    tensors = {str(dtype): torch.ones(2).to(dtype) for dtype in FLOAT8} | {"c": torch.ones(2, dtype=torch.complex64)}
    file = open_tensor_file(save(tensors, tmp_path / "a"))
    for name, tensor in tensors.items():
        assert file.tensors[name] == TensorInfo((2,), tensor.dtype)
        with pytest.raises(CheckpointError, match=f"tensor {name} is of type .* save it as float32") as caught:
            file.load(name)
        assert one_line(caught.value, file.path)


@each_format
def test_a_missing_tensor_is_named(save: Save, tmp_path: Path) -> None:
    file = open_tensor_file(save({"a": torch.ones(2)}, tmp_path / "a"))
    with pytest.raises(CheckpointError, match="has no tensor 'b'"):
        file.load("b")


class Custom:
    """A custom class in a pickle."""


@pytest.mark.filterwarnings("ignore:.*Sparse.*")
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.nn.Linear(2, 2), r"refers to 'torch.nn.modules.linear.Linear'.* torch.save\(model.state_dict\(\)"),
        ({"a": torch.ones(2), "args": Custom()}, r"refers to 'test_tensor_file.Custom'.* torch.save"),
        ({"a": torch.ones(2), "path": Path("x")}, r"refers to 'pathlib.* save only the weights"),
        ({"a": torch.eye(2).to_sparse()}, "an unsupported kind of tensor .*_rebuild_sparse_tensor.* dense"),
        ({"a": torch.ones(2, device="meta")}, "an unsupported kind of tensor .*meta"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "conjugated"),
        ({"a": torch.ones(2).expand(3, 2)}, "tensor a is a view that skips or repeats"),
        ({"a": torch.ones(4, 4)[:, :2]}, "tensor a is a view that skips or repeats .* save tensor.contiguous"),
        ({"a": torch.ones(9).as_strided((3, 3), (1, 1))}, "tensor a is a view"),
        ({1: torch.ones(2)}, "not a string"),
        ({"a\nb": torch.ones(2)}, r"unprintable tensor name 'a\\nb'"),
        ({"epoch": 3}, "has no tensors at the top level or under model_state_dict"),
        ({"optimizer": {"a": torch.ones(2)}}, "has no tensors at the top level"),
        ({"model": {"a.b": torch.ones(2)}, "ema": {"a.b": torch.zeros(2)}}, r"several state dicts \('model', 'ema'\)"),
        (
            {"nets": {"student": {"a.b": torch.ones(2)}, "teacher": {"a.b": torch.ones(2)}}},
            r"several state dicts \('nets.student', 'nets.teacher'\)",
        ),
        ([torch.ones(2)], "has no tensors at the top level"),
        (torch.ones(2), "a single unnamed tensor"),
        ({"module.a": torch.ones(2), "a": torch.ones(2)}, "wrapper's prefix"),
    ],
)
@each_torch
def test_files_without_a_state_dict_are_rejected_with_a_remedy(
    save: Save, value: Any, reason: str, tmp_path: Path
) -> None:
    path = save(value, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_tensor_file(path)
    assert one_line(caught.value, path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), str(path))
    with pytest.raises(CheckpointError, match=r"is compressed.*TorchScript archives"):
        open_tensor_file(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty: download it again"),
        (b"P", "starts with b'P': damaged, or not torch.save"),
        (b"#!/bin/sh\necho\n", "not torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"storages".ljust(257, b"\0") + b"ustar".ljust(300, b"\0"), "tar archive"),
        (b"\x80\x04}\x94.", "is a pickle, but not one of torch.save"),
        (b"PK\x03\x04" + bytes(40), "no directory"),
    ],
)
def test_other_files_are_refused_with_a_remedy(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_tensor_file(path)
    assert one_line(caught.value, path)


def test_paths_that_are_not_regular_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_tensor_file(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="a folder, not a file"):
        open_tensor_file(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_tensor_file(Path("a\0b"))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="not a regular file"):
            open_tensor_file(tmp_path / "pipe")


@each_format
def test_a_file_that_shrinks_or_disappears_after_opening_is_an_error(save: Save, tmp_path: Path) -> None:
    path = save({"a": torch.ones(100)}, tmp_path / "a")
    file = open_tensor_file(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="was truncated"):
        file.load("a")
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        file.load("a")


# ---- memory


@each_format
def test_memory_does_not_grow_with_the_file(save: Save, tmp_path: Path) -> None:
    each = 1 << 22
    tensors = {f"layers.{i}.weight": torch.full((each // 4,), float(i)) for i in range(15)}
    path = save(tensors, tmp_path / "a")
    assert path.stat().st_size > 60e6
    del tensors
    tracemalloc.start()
    try:
        file = open_tensor_file(path)
        opened = tracemalloc.get_traced_memory()[1]
        for i in range(15):
            assert file.load(f"layers.{i}.weight")[-1] == i
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert opened < 1 << 20
    assert each < peak < 1.5 * each


@each_format
def test_loaded_tensors_own_their_memory(save: Save, tmp_path: Path) -> None:
    path = save({"a": torch.ones(2)}, tmp_path / "a")
    before = path.read_bytes()
    file = open_tensor_file(path)
    first = file.load("a").mul_(2)
    assert file.load("a").tolist() == [1, 1]
    assert first.tolist() == [2, 2]
    assert path.read_bytes() == before


# ---- safetensors, rule by rule


def row(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(header: bytes, data: bytes = bytes(8), length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def described(data: bytes = bytes(8), **rows: Any) -> bytes:
    return raw(json.dumps(rows).encode(), data)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (raw(b'{"a":', length=2**63), "truncated"),
        (raw(b'{"a":'), "is not JSON"),
        (raw(b"{\xff}"), "is not JSON"),
        (raw(b"{" + b'"a":[' + b"[" * 200_000), "is not JSON"),
        (raw(b'{"a":' + b"9" * 5000 + b"}"), "is not JSON"),
        (raw(b'{"a":1,"a":1}'), "a duplicate name"),
        (raw(b'{"a":1}'), "tensor a does not have exactly dtype, shape and data_offsets"),
        (raw(b"{" + bytes(1 << 23)), "the limit is 8388608"),
        (described(a=row() | {"more": 1}), "does not have exactly"),
        (described(a=row(dtype="F4")), r"tensor a is of an unsupported type \('F4'\): save it as F32"),
        (described(a=row(dtype=["F32"])), "not a string"),
        (described(a=row(shape=(-2,))), "invalid shape"),
        (described(a=row(shape=(True, 2))), "invalid shape"),
        (described(a=row(shape=(2.0,))), "invalid shape"),
        (described(a=row(shape="2")), "invalid shape"),
        (described(a=row(shape=[1] * 17)), "invalid shape"),
        (described(a=row(shape=(0, 2**62, 2**62), offsets=(0, 0))), "invalid shape"),
        (described(a=row(shape=(2**64,))), "invalid shape"),
        (described(a=row(offsets=(0,))), "invalid offsets"),
        (described(a=row(offsets=(-8, 0))), "invalid offsets"),
        (described(a=row(offsets=(8, 0))), r"tensor a has -8 bytes"),
        (described(a=row(offsets=(0, 4))), r"tensor a has 4 bytes, but shape \(2,\) and type F32 require 8"),
        (described(a=row(offsets=(4, 12))), "tensor a starts at byte"),
        (described(a=row(), b=row()), "the previous one ends"),
        (described(a=row(offsets=(0, 8)), b=row(offsets=(4, 12))), "the previous one ends"),
        (described(bytes(12), a=row()), "4 bytes after the last tensor are unused"),
        (described(bytes(7), a=row()), "truncated"),
        (described(b"", __metadata__={"a": "b"}), "has no tensors"),
        (described(**{"a\x1b": row()}), r"unprintable tensor name"),
        (described(**{"\ud800": row()}), r"unprintable tensor name"),
    ],
)
def test_invalid_safetensors_headers_are_rejected(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_tensor_file(path)
    assert one_line(caught.value, path)
