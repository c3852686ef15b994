"""Opening bundles: valid ones open, and damage of any kind is one `BundleError` that names a remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_edge.runtime import Bundle, Guards, Model, ReasoningTokens
from llm_edge.runtime.bundle import MANIFEST, manifest_entry
from llm_edge.runtime.errors import BundleError, InputError
from llm_edge.runtime.model_shape import key_value_caches

FILES = (
    "chat_template.jinja",
    "config.json",
    "genai_config.json",
    "generation_config.json",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/model_q4.onnx",
    "onnx/model_q4.onnx_data",
    "onnx/model_quantized.onnx",
    "onnx/model_quantized.onnx_data",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
PRECISION = {"onnx/model.onnx": "fp32", "onnx/model_q4.onnx": "int4", "onnx/model_quantized.onnx": "int8"}


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_bundle` to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def check(path: Path) -> None:
    """Open a bundle and compare every file."""
    Bundle.open(path).verify()


def refusal(act: Callable[[], object]) -> str:
    """The message of the `BundleError`."""
    with pytest.raises(BundleError) as caught:
        act()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def refused(act: Callable[[], object]) -> bool:
    """Whether an `InputError` with a one-line message is raised; other errors propagate."""
    try:
        act()
    except InputError as error:
        message = str(error)
    else:
        return False
    assert message
    assert "\n" not in message
    return True


def precisions_of(name: str) -> list[str]:
    """Precisions that require a file."""
    own = PRECISION.get(name.removesuffix("_data"))
    return [own] if own else list(PRECISION.values())


def manifest(path: Path) -> Any:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def write(path: Path, content: Any) -> None:
    (path / MANIFEST).write_text(json.dumps(content), encoding="utf-8")


# ---- valid bundles


def test_a_valid_bundle_opens_and_describes_itself(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    bundle.verify()
    assert set(bundle.manifest["files"]) == set(FILES)  # so that the tests below damage every file
    assert bundle.name == "tiny"
    shape = bundle.shape
    assert (shape.vocab_size, shape.num_hidden_layers, shape.max_position_embeddings) == (331, 2, 1024)
    assert shape.caches == key_value_caches(layers=2, heads=2, head_dim=32)
    assert list(bundle.precisions) == ["fp32", "int8", "int4"]
    for name, info in bundle.precisions.items():
        graph = tiny_bundle / info.model
        assert info.name == name
        assert info.size == graph.stat().st_size + graph.with_name(f"{graph.name}_data").stat().st_size
        assert info.share_buffer
        assert info.parity.keys() == {"prefill", "steps", "chunk"}
    assert bundle.file("tokenizer.json") == tiny_bundle / "tokenizer.json"
    assert bundle.json("config.json")["vocab_size"] == 331
    assert bundle.chat_template() == (tiny_bundle / "chat_template.jinja").read_text(encoding="utf-8")


def test_the_default_precision_is_int8_or_else_the_first(bundle: Path) -> None:
    assert Bundle.open(bundle).precision().name == "int8"
    assert Bundle.open(bundle).precision("int4").name == "int4"
    content = manifest(bundle)
    del content["precisions"]["int8"]
    write(bundle, content)
    assert Bundle.open(bundle).precision().name == "fp32"
    assert "'int8'" in refusal(lambda: Bundle.open(bundle).precision("int8"))


def test_a_link_to_a_bundle_is_accepted(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_bundle)
    check(tmp_path / "link")
    assert Model.load(tmp_path / "link").precision.name == "int8"


def test_extra_files_are_ignored(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    check(bundle)
    assert "does not list notes.txt" in refusal(lambda: Bundle.open(bundle).file("notes.txt"))


def test_a_bundle_without_a_chat_template_has_none(bundle: Path) -> None:
    content = manifest(bundle)
    del content["files"]["chat_template.jinja"]
    write(bundle, content)
    assert Bundle.open(bundle).chat_template() is None


def test_reasoning_and_guards_are_read(bundle: Path) -> None:
    content = manifest(bundle)
    opened = Bundle.open(bundle)
    assert (opened.reasoning, opened.guards) == (None, None)
    reasoning = {"start": 7, "end": 8}
    for newlines, single in ((2, True), (None, False), (2**31 - 1, True)):
        guards = {"max_newlines": newlines, "single_think_end": single}
        write(bundle, content | {"reasoning": reasoning, "guards": guards})
        opened = Bundle.open(bundle)
        assert (opened.reasoning, opened.guards) == (ReasoningTokens(7, 8), Guards(newlines, single))
        params = Model.load(bundle, "fp32").default_params
        assert (params.max_newlines, params.single_think_end) == (newlines or 0, single)
    write(bundle, content | {"guards": {"max_newlines": 1, "single_think_end": False}})
    assert Bundle.open(bundle).guards == Guards(1, False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reasoning": {"start": 7, "end": 331}}, "reasoning.end is 331, not from 0 to 330"),
        ({"reasoning": {"start": 7, "end": 7}}, "reasoning starts and ends with the same token"),
        ({"guards": {"max_newlines": 0, "single_think_end": False}}, "guards.max_newlines is 0, not from 1 to"),
        ({"guards": {"max_newlines": 2, "single_think_end": True}}, "guards.single_think_end without 'reasoning'"),
    ],
)
def test_invalid_reasoning_and_guards_are_rejected(change: Any, reason: str, bundle: Path) -> None:
    write(bundle, manifest(bundle) | change)
    message = refusal(lambda: Bundle.open(bundle))
    assert MANIFEST in message
    assert reason in message


# ---- damaged files


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_detected(name: str, bundle: Path) -> None:
    data = bytearray((bundle / name).read_bytes())
    for at in (0, len(data) // 2, len(data) - 1):
        data[at] ^= 0x01
        (bundle / name).write_bytes(data)
        data[at] ^= 0x01
        assert str(bundle / name) in refusal(Bundle.open(bundle).verify)
        needed = precisions_of(name)
        for precision in needed:
            assert str(bundle / name) in refusal(lambda chosen=precision: Model.load(bundle, chosen))
        for precision in PRECISION.values():
            if precision not in needed:
                Bundle.open(bundle).verify(precision)


@pytest.mark.parametrize("name", FILES)
def test_truncated_grown_and_missing_files_are_detected_without_reading(name: str, bundle: Path) -> None:
    data = (bundle / name).read_bytes()
    for other in (b"", data[:1], data[: len(data) // 2], data[:-1], data + b"\0"):
        (bundle / name).write_bytes(other)
        message = refusal(lambda: Bundle.open(bundle))
        assert str(bundle / name) in message
        assert f"{len(other)} bytes instead of {len(data)}" in message
    (bundle / name).unlink()
    for act in (lambda: Bundle.open(bundle), lambda: Model.load(bundle)):
        message = refusal(act)
        assert f"{bundle / name} is missing" in message
        assert "export the bundle again" in message
    (bundle / name).mkdir()
    assert f"{bundle / name} is missing" in refusal(lambda: Bundle.open(bundle))
    (bundle / name).rmdir()
    os.mkfifo(bundle / name)
    assert f"{bundle / name} is missing" in refusal(lambda: Bundle.open(bundle))


@pytest.mark.parametrize("name", ["tokenizer.json", "onnx/model.onnx_data", "onnx"])
def test_a_link_out_of_the_folder_is_rejected(name: str, bundle: Path, tmp_path: Path) -> None:
    (bundle / name).rename(tmp_path / "outside")
    (bundle / name).symlink_to(tmp_path / "outside")
    for act in (lambda: Bundle.open(bundle), lambda: Model.load(bundle, "fp32")):
        assert "a link to outside of" in refusal(act)


def test_a_link_to_itself_is_refused(bundle: Path) -> None:
    (bundle / "config.json").unlink()
    (bundle / "config.json").symlink_to("config.json")
    assert "config.json" in refusal(lambda: Bundle.open(bundle))


def test_a_file_deleted_while_the_bundle_is_open_is_an_error(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / "config.json").unlink()
    for act in (opened.verify, lambda: opened.json("config.json")):
        assert "config.json" in refusal(act)


# ---- other folders and files


@pytest.mark.parametrize("name", ["nowhere", "file", "file/below", "empty", "x" * 300, "nul\0"])
def test_other_folders_and_files_are_rejected(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for act in (lambda: Bundle.open(tmp_path / name), lambda: Model.load(str(tmp_path / name))):
        assert "llm-export" in refusal(act)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"text"',
        b"\xff\xfe",
        b"{}",
        b'{"format_version": 1}',
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"format_version": ' + b"1" * 5_000 + b"}",
        b" " * (16 << 20) + b" {}",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_an_invalid_manifest_is_rejected(content: bytes, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(content)
    for act in (lambda: Bundle.open(bundle), lambda: Model.load(bundle)):
        assert MANIFEST in refusal(act)


def test_a_manifest_that_is_not_a_file_is_rejected(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    for make in (Path.mkdir, os.mkfifo):
        make(bundle / MANIFEST)
        assert MANIFEST in refusal(lambda: Bundle.open(bundle))
        (bundle / MANIFEST).rmdir() if make is Path.mkdir else (bundle / MANIFEST).unlink()


def test_a_manifest_truncated_anywhere_is_rejected(bundle: Path) -> None:
    data = (bundle / MANIFEST).read_bytes()
    for size in range(0, len(data) - 2, 37):
        (bundle / MANIFEST).write_bytes(data[:size])
        refusal(lambda: Bundle.open(bundle))


# ---- manifests with wrong values

WEIGHTS = "onnx/model_quantized.onnx_data"
WRONG: tuple[tuple[tuple[str, ...], Any], ...] = (
    *((("format_version",), value) for value in (0, 2, "1", 1.5, None, True, [1], 1 << 80)),
    *((("name",), value) for value in (None, 1, ["tiny"])),
    *((("model",), value) for value in (None, [], "model", {})),
    *(
        (("model", key), value)
        for key in (
            "vocab_size",
            "num_hidden_layers",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        for value in (0, -1, "2", 2.0, True, None, [2], 1 << 40, 1 << 80)
    ),
    *((("files",), value) for value in (None, [], "all", {}, {"config.json": {"size": 1, "sha256": ""}})),
    *((("files", WEIGHTS), value) for value in (None, [], 1, "x", {})),
    *((("files", WEIGHTS, "size"), value) for value in (None, -1, 0, "1", True, 1.5, 1 << 80)),
    *((("files", WEIGHTS, "sha256"), value) for value in (None, "", "0" * 64, 0, [], {})),
    *(
        (("files", name), {"size": 0, "sha256": "0" * 64})
        for name in (
            "../other/config.json",
            "/etc/hostname",
            "onnx/../../x",
            "",
            ".",
            "a//b",
            "c:\\x",
            "missing.bin",
            "nul\0",
            "x" * 300,
            "x/" * 3000 + "x",
        )
    ),
    *((("reasoning",), value) for value in (None, [], "think", 7, True, {}, {"start": 7}, {"end": 8}, [7, 8])),
    *((("reasoning",), {"start": value, "end": 8}) for value in (None, -1, 331, 1 << 80, "7", 7.0, True, [7], 8)),
    *((("reasoning",), {"start": 7, "end": value}) for value in (None, -1, 331, "<|im_end|>", 8.0, False)),
    *((("guards",), value) for value in (None, [], 2, {}, {"max_newlines": 2}, {"single_think_end": False})),
    *(
        (("guards",), {"max_newlines": value, "single_think_end": False})
        for value in (0, -1, "2", 2.0, True, [2], 2**31)
    ),
    *((("guards",), {"max_newlines": 2, "single_think_end": value}) for value in (None, 0, 1, "no", {})),
    (("guards",), {"max_newlines": None, "single_think_end": True}),  # but there is no reasoning
    *((("precisions",), value) for value in (None, [], {}, "int8", {"int8": None}, {"int8": []}, {"int8": {}})),
    *((("precisions", "int8", "model"), value) for value in (None, 1, "", "x", "../x", "config.json", "onnx")),
    *((("precisions", "int8", "recipe"), value) for value in (None, 8, [])),
    *((("precisions", "int8", "share_buffer"), value) for value in (None, 1, "true")),
    *((("precisions", "int8", key), value) for key in ("parity", "quality") for value in (None, 1, [], "good")),
)


def with_value(content: Any, path: tuple[str, ...], value: Any) -> Any:
    changed = json.loads(json.dumps(content))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def test_wrong_values_in_the_manifest_are_refused(bundle: Path) -> None:
    content = manifest(bundle)
    accepted = []
    for path, value in WRONG:
        write(bundle, with_value(content, path, value))
        if not (refused(lambda: check(bundle)) and refused(lambda: Model.load(bundle))):
            accepted.append((path, value))
    assert accepted == []


def test_a_file_name_that_is_not_unicode_is_rejected(bundle: Path) -> None:
    write(bundle, with_value(manifest(bundle), ("files", "\ud800"), {"size": 0, "sha256": ""}))
    refusal(lambda: Bundle.open(bundle))


def paths(value: Any, start: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every value in a tree of objects."""
    if start:
        yield start
    if isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, (*start, key))


ODD = (None, True, -1, 1 << 70, float("nan"), "", "../x\n", [], {}, {"": {}})


def test_no_value_anywhere_in_the_manifest_raises_another_error(bundle: Path) -> None:
    content = manifest(bundle)
    places = list(paths(content))
    assert len(places) > 80
    for place in places:
        for value in ODD:
            write(bundle, with_value(content, place, value))
            refused(lambda: check(bundle))


def test_no_missing_key_of_the_manifest_raises_another_error(bundle: Path) -> None:
    content = manifest(bundle)
    for place in paths(content):
        changed = with_value(content, place, None)
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        del parent[place[-1]]
        write(bundle, changed)
        refused(lambda: check(bundle))
        if not {"parity", "quality", "source", "tools"} & set(place):
            refused(lambda: Model.load(bundle))


def test_no_changed_byte_of_the_manifest_raises_another_error(bundle: Path) -> None:
    data = bytearray((bundle / MANIFEST).read_bytes())
    found = 0
    for at in range(0, len(data), 11):
        old, data[at] = data[at], data[at] ^ (1 << at % 8)
        (bundle / MANIFEST).write_bytes(data)
        data[at] = old
        found += refused(lambda: check(bundle))
    assert found > 50


# ---- damaged files with matching checksums, so that the readers have to detect the damage


def replaced(bundle: Path, name: str, data: bytes) -> None:
    (bundle / name).write_bytes(data)
    write(bundle, with_value(manifest(bundle), ("files", name), manifest_entry(bundle / name)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 64, b"\xff" * 64, b"{}", b"[]", b'{"a": 1}', b"{{ nothing", b"null", b"text"],
    ids=repr,
)
def test_damage_with_a_matching_checksum_is_rejected_or_harmless(name: str, content: bytes, bundle: Path) -> None:
    replaced(bundle, name, content)
    check(bundle)
    found = refused(lambda: Model.load(bundle, precisions_of(name)[-1]))
    if name in ("config.json", "genai_config.json", "special_tokens_map.json"):
        assert not found  # these are read by other libraries
    if name.startswith(("onnx/", "tokenizer.json")):
        assert found


def test_truncated_weights_with_a_matching_checksum_are_rejected(bundle: Path) -> None:
    replaced(bundle, WEIGHTS, (bundle / WEIGHTS).read_bytes()[:-5000])
    assert "model_quantized.onnx" in refusal(lambda: Model.load(bundle))


@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim"])
def test_a_shape_that_differs_from_the_graph_is_rejected(key: str, bundle: Path) -> None:
    content = manifest(bundle)
    for change in (1, -1):
        write(bundle, with_value(content, ("model", key), content["model"][key] + change))
        check(bundle)
        refusal(lambda: Model.load(bundle))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "onnx/model.onnx"])
def test_a_file_that_another_precision_claims_is_still_verified(name: str, bundle: Path) -> None:
    content = manifest(bundle)
    content["files"][f"{name}_data"] = content["files"]["onnx/model.onnx_data"]
    content["precisions"]["int8"]["model"] = name
    write(bundle, content)
    shutil.copy(bundle / "onnx" / "model.onnx_data", bundle / f"{name}_data") if "onnx/" not in name else None
    changed = bytearray((bundle / name).read_bytes())
    changed[5] ^= 1
    (bundle / name).write_bytes(changed)
    assert refused(lambda: Bundle.open(bundle).verify("fp32"))


@pytest.mark.parametrize("name", ["onnx/model.ort", "onnx/model", "tokenizer.json"])
def test_graphs_have_the_suffix_of_their_format(name: str, bundle: Path) -> None:
    content = manifest(bundle)
    content["precisions"]["int8"]["model"] = name
    write(bundle, content)
    assert "not a name with .onnx" in refusal(lambda: Bundle.open(bundle))


def test_weights_that_the_manifest_does_not_list_are_never_read(bundle: Path) -> None:
    """Neither another file that a graph names, nor one of the same name in the wrong place."""
    graph = bundle / "onnx" / "model.onnx"
    data = graph.read_bytes().replace(b"model.onnx_data", b"hodel.onnx_data")
    graph.write_bytes(data)
    (bundle / "onnx" / "model.onnx_data").rename(bundle / "onnx" / "hodel.onnx_data")
    content = manifest(bundle)
    content["files"]["onnx/model.onnx"] = manifest_entry(graph)
    (bundle / "onnx" / "model.onnx_data").write_bytes((bundle / "onnx" / "hodel.onnx_data").read_bytes())
    write(bundle, content)
    assert "weights are in 'hodel.onnx_data'" in refusal(lambda: Model.load(bundle, "fp32"))
