"""Models on the Hub: the real client with a local server. Required files are downloaded once; errors are one line."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import fake_hub
import huggingface_hub
import pytest
from fake_hub import COMMIT, OTHER_COMMIT, FakeHub
from huggingface_hub import _tree_cache, constants
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

from llm_edge.checkpoint.download import hub
from llm_edge.checkpoint.download import progress as hub_progress
from llm_edge.checkpoint.download.hub import fetch_adapter, fetch_checkpoint, is_hub_id
from llm_edge.runtime.errors import CheckpointError, InputError, LlmEdgeError, MachineError
from llm_edge.runtime.installation import install_hint

SMALL = {
    "config.json": '{"model_type": "llama"}',
    "generation_config.json": '{"do_sample": true}',
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"bos_token": "a"}',
    "special_tokens_map.json": '{"bos_token": "b"}',
    "chat_template.jinja": "{{ messages }}",
}
WEIGHTS = bytes(range(256)) * 400
NEEDLESS = {
    "README.md": "# A model",
    "LICENSE": "none",
    "modeling_llama.py": "raise SystemExit('never run')",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "tf_model.h5": b"h5",
    "flax_model.msgpack": b"flax",
    "model.fp16.gguf": b"GGUF",
    "onnx/model.onnx": b"onnx",
    "original/config.json": "{ }",
    "original/consolidated.00.pth": b"pth",
    "original/model.safetensors": b"other",
    "training_args.bin": b"args",
}
SHARDS = {f"model-0000{n}-of-00003.safetensors": bytes([n]) * 5000 for n in (1, 2, 3)}
INDEX = "model.safetensors.index.json"


class World(NamedTuple):
    """A Hub, a cache, and the reported messages."""

    hub: FakeHub
    cache: Path
    messages: list[str]

    def fetch(self, hub_id: str = "owner/name") -> Path:
        return fetch_checkpoint(hub_id, self.messages.append, endpoint=self.hub.endpoint, cache=self.cache)

    def refused(self, kind: type[LlmEdgeError], *words: str, hub_id: str = "owner/name") -> None:
        with pytest.raises(kind) as caught:
            self.fetch(hub_id)
        assert type(caught.value) is kind
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 400
        for word in words:
            assert word in message


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    huggingface_hub.close_session()
    fake = FakeHub()
    fake.add("owner/name", SMALL | NEEDLESS | {"model.safetensors": WEIGHTS})
    fake.start()
    yield World(fake, tmp_path / "cache", [])
    fake.stop()
    huggingface_hub.close_session()


def sharded(world: World, **weight_map: str) -> None:
    index = json.dumps({"weight_map": {f"tensor.{name}": name for name in SHARDS} | weight_map})
    world.hub.add("owner/name", SMALL | NEEDLESS | SHARDS | {INDEX: index})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(*parts: dict[str, Any]) -> dict[str, bytes]:
    return {name: it.encode() if isinstance(it, str) else it for part in parts for name, it in part.items()}


@pytest.mark.parametrize(
    "text",
    ["owner/name", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b.c_d-1.5", "o/n@main", "o/n@v1.0", "o/n@refs/pr/1"],
)
def test_repository_ids_are_recognized(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "smollm2",
        "owner/",
        "/name",
        "a/b/c",
        "./owner",
        "../name",
        "owner/..",
        "~/name",
        "owner/na me",
        "owner/näme",
        "owner\\name",
        "models/tiny.gguf",
        "models/model.safetensors",
        "run/last.pt",
        "owner/name@",
        "owner/name@../../x",
        "owner/name@/x",
        "owner/name@a b",
        "owner/name@main\n",
        "owner--x/name",
        "owner/name-",
        "https://huggingface.co/owner/name",
        "owner/" + "n" * 97,
        "C:/name",
    ],
)
def test_other_names_are_not_repository_ids(text: str) -> None:
    assert not is_hub_id(text)


# ---- downloaded files


def test_only_files_needed_by_an_export_are_downloaded(world: World) -> None:
    folder = world.fetch()
    assert content(folder) == expected(SMALL, {"model.safetensors": WEIGHTS})
    assert sorted(world.hub.fetched()) == sorted([*SMALL, "model.safetensors"])
    assert world.hub.fetched()[-1] == "model.safetensors"
    asked = {request.path.rpartition("/")[2] for request in world.hub.log if "/resolve/" in request.path}
    assert asked == {*SMALL, "model.safetensors"}
    assert any("owner/name" in line and "kB" in line for line in world.messages)


def test_all_shards_are_downloaded(world: World) -> None:
    sharded(world)
    folder = world.fetch()
    index = world.hub.repos["owner/name"][COMMIT][INDEX]
    assert content(folder) == expected(SMALL, SHARDS, {INDEX: index})
    assert world.hub.fetched()[-3:] == sorted(SHARDS)


def test_a_whole_file_is_preferred_to_shards_as_transformers_does(world: World) -> None:
    index = json.dumps({"weight_map": {f"tensor.{name}": name for name in SHARDS}})
    world.hub.add("owner/name", SMALL | SHARDS | {INDEX: index, "model.safetensors": WEIGHTS})
    assert content(world.fetch()) == expected(SMALL, {"model.safetensors": WEIGHTS})


@pytest.mark.parametrize("whole", [True, False])
def test_pytorch_weights_are_downloaded_if_there_are_no_others(world: World, whole: bool) -> None:
    parts: dict[str, Any] = {"pytorch_model.bin": b"zip"}
    if not whole:
        shards = {f"pytorch_model-0000{n}-of-00002.bin": bytes([n]) * 50 for n in (1, 2)}
        parts = {**shards, "pytorch_model.bin.index.json": json.dumps({"weight_map": {name: name for name in shards}})}
    world.hub.add("owner/name", SMALL | NEEDLESS | parts)
    assert content(world.fetch()) == expected(SMALL, parts)


def test_safetensors_are_preferred_to_pytorch_weights(world: World) -> None:
    world.hub.add("owner/name", SMALL | {"model.safetensors": WEIGHTS, "pytorch_model.bin": b"zip"})
    assert content(world.fetch()) == expected(SMALL, {"model.safetensors": WEIGHTS})


def test_a_single_safetensors_file_of_another_name_is_downloaded(world: World) -> None:
    world.hub.add("owner/name", SMALL | {"weights.safetensors": WEIGHTS, "adapter_model.safetensors": b"no"})
    assert content(world.fetch()) == expected(SMALL, {"weights.safetensors": WEIGHTS})


def test_vocabulary_and_merges_files_are_downloaded(world: World) -> None:
    files = {"config.json": "{}", "vocab.json": '{"a": 1}', "merges.txt": "a b", "model.safetensors": WEIGHTS}
    world.hub.add("owner/name", files | {"README.md": "no"})
    assert content(world.fetch()) == expected(files)


def test_other_vocabularies_and_named_templates_are_downloaded(world: World) -> None:
    template = "additional_chat_templates/tool_use.jinja"
    files = {"config.json": "{}", "tokenizer.model": "a", "added_tokens.json": "{}", template: "{{ tools }}"}
    world.hub.add("owner/name", files | {"model.safetensors": WEIGHTS, "additional_chat_templates/a.py": "no"})
    folder = world.fetch()
    assert {name: (folder / name).read_text() for name in files} == files
    assert not (folder / "additional_chat_templates" / "a.py").exists()


@pytest.mark.parametrize("revision", ["refs/pr/1", OTHER_COMMIT])
def test_another_revision_can_be_downloaded(world: World, revision: str) -> None:
    world.hub.add("owner/name", SMALL | {"config.json": '{"new": 1}', "model.safetensors": b"new"}, OTHER_COMMIT)
    old, new = world.fetch(), world.fetch(f"owner/name@{revision}")
    assert (old / "model.safetensors").read_bytes() == WEIGHTS
    assert (new / "model.safetensors").read_bytes() == b"new"
    assert world.hub.fetched().count("tokenizer.json") == 1  # the same in both
    world.hub.stop()
    assert world.fetch(f"owner/name@{revision}") == new
    assert world.fetch() == old


def test_a_moved_branch_is_downloaded_again(world: World) -> None:
    old = world.fetch()
    world.hub.add("owner/name", SMALL | {"model.safetensors": b"new"}, OTHER_COMMIT)
    world.hub.revisions["main"] = OTHER_COMMIT
    new = world.fetch()
    assert new != old
    assert (new / "model.safetensors").read_bytes() == b"new"


def test_an_adapter_is_downloaded(world: World) -> None:
    files = {"adapter_config.json": "{ }", "adapter_model.safetensors": b"lora"}
    world.hub.add("owner/adapter", files | {"README.md": "a", "tokenizer.json": "{}", "adapter_model.bin": b"zip"})
    folder = fetch_adapter("owner/adapter", world.messages.append, endpoint=world.hub.endpoint, cache=world.cache)
    assert content(folder) == expected(files)
    world.refused(CheckpointError, "owner/adapter", "adapter", "base model", hub_id="owner/adapter")
    with pytest.raises(CheckpointError, match="has no adapter"):
        fetch_adapter("owner/name", world.messages.append, endpoint=world.hub.endpoint, cache=world.cache)


def test_download_progress_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_progress, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 20_000)
    world.fetch()
    lines = [line for line in world.messages if "model.safetensors (6 of 6)" in line]
    assert len(lines) > 3
    assert lines[0].endswith("20 kB of 102 kB")
    assert lines[-1].endswith("102 kB of 102 kB")


def test_progress_is_reported_for_xet_downloads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most weights are downloaded by the Xet client, which requires other servers and reports to the same class."""
    monkeypatch.setattr(hub_progress, "REPORT_SECONDS", 0.0)
    messages: list[str] = []
    progress = hub_progress.progress_class(messages.append, "model.safetensors", 5_000_000_000)
    words = {"reconstruction_desc": "a", "transfer_desc": "b", "total": 5_000_000_000, "log_level": 30}
    with XetDownloadProgressReporter(**words, tqdm_class=progress) as reporter:
        for done in (0, 2_500_000_000, 5_000_000_000):
            report = SimpleNamespace(
                total_bytes=5_000_000_000,
                total_bytes_completed=done,
                total_transfer_bytes_completed=done // 2,
                total_bytes_completion_rate=1e6,
                total_transfer_bytes_completion_rate=None,
            )
            reporter.update_progress(report)
    assert messages == [f"downloading model.safetensors: {size} GB of 5.0 GB" for size in ("2.5", "5.0")]


# ---- the cache


@pytest.mark.parametrize("way", ["stopped", "variable", "failing"])
def test_a_cached_model_works_offline(world: World, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    sharded(world)
    folder = world.fetch()
    world.hub.log.clear()
    assert world.fetch() == folder
    assert [request.path for request in world.hub.log] == [
        "/api/models/owner/name"
    ]  # checks whether the branch has moved
    if way == "stopped":
        world.hub.stop()
    elif way == "failing":
        world.hub.status = 503
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        world.hub.log.clear()
    assert world.fetch() == folder
    assert way != "variable" or not world.hub.log
    assert len(content(folder)) == len(SMALL) + len(SHARDS) + 1


def test_offline_with_the_cache_of_an_older_package(world: World) -> None:
    folder = world.fetch()
    world.hub.stop()
    shutil.rmtree(folder.parents[1] / "trees")
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    assert world.fetch() == folder


def test_files_missing_from_the_cache_are_downloaded(world: World) -> None:
    folder = world.fetch()
    (folder / "tokenizer.json").resolve().unlink()
    (folder / "generation_config.json").unlink()
    world.hub.log.clear()
    assert world.fetch() == folder
    assert content(folder) == expected(SMALL, {"model.safetensors": WEIGHTS})
    assert world.hub.fetched() == ["tokenizer.json"]  # the other one's content was still there


def test_offline_with_an_incomplete_cache_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.fetch()
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    world.refused(MachineError, "owner/name", "not completely cached", "HF_HUB_OFFLINE")


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_offline_without_a_cache_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    world.refused(MachineError, f"owner/name{revision}", "HF_HUB_OFFLINE", hub_id=f"owner/name{revision}")


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_no_network_without_a_cache_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    world.hub.stop()
    world.refused(MachineError, "owner/name", "unreachable", "refused", hub_id=f"owner/name{revision}")


# ---- errors


@pytest.mark.parametrize("hub_id", ["owner/other", "nobody/name", "owner/other@main"])
def test_an_unknown_repository_is_an_error(world: World, hub_id: str) -> None:
    world.refused(CheckpointError, hub_id, "neither a local path", "hf auth login", "HF_TOKEN", hub_id=hub_id)


def test_a_gated_repository_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.hub.gated.add("owner/name")
    world.refused(CheckpointError, "owner/name", "approval", "huggingface.co/owner/name", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", world.hub.token)
    world.hub.log.clear()
    assert content(world.fetch()) == expected(SMALL, {"model.safetensors": WEIGHTS})
    sent = {request.path.startswith("/store/"): "authorization" in request.headers for request in world.hub.log}
    assert sent == {False: True, True: False}  # never to the host that the Hub redirects to


def test_an_unknown_revision_is_an_error(world: World) -> None:
    world.refused(CheckpointError, "owner/name@v9", "no revision 'v9'", hub_id="owner/name@v9")
    world.refused(CheckpointError, "no revision", hub_id="owner/name@" + "0" * 40)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, CheckpointError, ["HF_TOKEN"]),
        (403, CheckpointError, ["rejects your token"]),
        (404, MachineError, ["404"]),
        (429, MachineError, ["429", "later"]),
        (500, MachineError, ["500", "later"]),
    ],
)
def test_server_errors_are_reported(world: World, status: int, kind: type[LlmEdgeError], words: list[str]) -> None:
    world.hub.status = status
    world.refused(kind, "owner/name", *words)


@pytest.mark.parametrize("body", [b"", b"<html>Sign in to this network</html>", b"[]", b"{}"])
def test_an_invalid_response_is_an_error(world: World, body: bytes) -> None:
    world.hub.status, world.hub.body = 200, body
    world.refused(MachineError, "owner/name", "HF_ENDPOINT")


def test_a_server_that_does_not_respond_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "RESPONSE_SECONDS", 0.3)
    world.hub.silent = threading.Event()
    start = time.monotonic()
    world.refused(MachineError, "unreachable", "timed out")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_is_resumed(world: World, monkeypatch: pytest.MonkeyPatch, ranges: bool) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    world.hub.ranges = ranges
    world.hub.cut["model.safetensors"], world.hub.cuts["model.safetensors"] = 30_000, 2
    assert (world.fetch() / "model.safetensors").read_bytes() == WEIGHTS
    parts = [request.headers.get("range") for request in world.hub.log if request.path.startswith("/store/")]
    assert parts == [None, "bytes=30000-", "bytes=60000-" if ranges else "bytes=30000-"]


@pytest.mark.parametrize("after", [0, 60_000])
def test_a_download_that_keeps_failing_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    world.hub.ranges = False
    world.hub.cut["model.safetensors"], world.hub.cuts["model.safetensors"] = after, 10_000
    world.refused(MachineError, "owner/name", "connection was lost", "try again")
    assert world.hub.cuts["model.safetensors"] > 9_900
    assert not list(world.cache.rglob("*.incomplete"))
    world.hub.cuts.clear()
    world.hub.log.clear()
    assert content(world.fetch()) == expected(SMALL, {"model.safetensors": WEIGHTS})
    assert world.hub.fetched() == ["model.safetensors"]


def test_a_file_much_larger_than_listed_is_rejected(world: World) -> None:
    world.hub.listed = [{"type": "file", "path": "model.safetensors", "size": 10, "oid": "0" * 40}]
    world.refused(MachineError, "model.safetensors", "download keeps restarting")
    assert not list(world.cache.rglob("*.incomplete"))


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/tmp/evil.safetensors", "..\\evil.safetensors", "a/../../evil.bin", "..", "", "."]
)
def test_hostile_file_names_are_rejected(world: World, name: str) -> None:
    world.hub.listed = [{"type": "file", "path": name, "size": 5, "oid": "0" * 40}]
    before = content(world.cache.parent)
    assert content(world.fetch()) == expected(SMALL, {"model.safetensors": WEIGHTS})
    made = content(world.cache.parent).keys() - before.keys()
    assert not [made_name for made_name in made if "evil" in made_name]
    assert not Path("/tmp/evil.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/passwd", "onnx/model.onnx", "", ".", "gone.safetensors", "a\\b.safetensors"]
)
def test_an_index_with_paths_outside_the_repository_is_rejected(world: World, name: str) -> None:
    sharded(world, more=name)
    world.refused(CheckpointError, "owner/name", INDEX, repr(name))
    assert not [fetched for fetched in world.hub.fetched() if fetched.endswith(".safetensors")]


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_invalid_index_is_rejected(world: World, index: str) -> None:
    world.hub.add("owner/name", SMALL | SHARDS | {INDEX: index})
    world.refused(CheckpointError, INDEX)


@pytest.mark.parametrize("commit", ["../../../evil", "main", "", "x" * 5000, "0" * 39])
def test_an_invalid_commit_hash_is_rejected(world: World, commit: str) -> None:
    world.hub.revisions["main"] = commit
    world.hub.repos["owner/name"][commit] = world.hub.repos["owner/name"][COMMIT]
    world.refused(CheckpointError, "owner/name", "invalid commit")
    assert not world.hub.fetched()
    assert not (world.cache.parent / "evil").exists()


def test_a_repository_with_only_gguf_files_is_an_error(world: World) -> None:
    world.hub.add("owner/name", {"README.md": "a", "m-Q8_0.gguf": b"GGUF" * 9, "m-Q4_K.gguf": b"GGUF"})
    world.refused(CheckpointError, "only GGUF files", "hf download owner/name m-Q4_K.gguf", "path")


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"README.md": "a"}, "no supported weights"),
        (SMALL | {"tf_model.h5": b"h5", "sub/model.safetensors": b"x"}, "no supported weights"),
        (SMALL | {"a.safetensors": b"x", "b.safetensors": b"y"}, "no supported weights"),
        ({"model.safetensors": b"x", "tokenizer.json": "{}"}, "no config.json"),
        ({}, "no supported weights"),
    ],
)
def test_repositories_without_a_model_are_errors(world: World, files: dict[str, Any], word: str) -> None:
    world.hub.add("owner/name", files)
    world.refused(CheckpointError, "owner/name", word)
    assert set(world.hub.fetched()) <= {"config.json"}


def test_insufficient_disk_space_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(world.cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    world.refused(MachineError, "owner/name", "102 kB", "1 kB", "HF_HUB_CACHE")
    assert set(world.hub.fetched()) <= {"config.json"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_failing_disk_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "/disk/file")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", fail)
    world.refused(MachineError, "disk space" if code == errno.ENOSPC else "/disk/file", "HF_HUB_CACHE")


def test_a_cache_path_that_is_not_a_folder_is_an_error(world: World) -> None:
    world.cache.write_text("")
    world.refused(MachineError, str(world.cache), "HF_HUB_CACHE")


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=re.escape(install_hint("export"))):
        fetch_checkpoint("owner/name", print)


def test_invalid_names_are_not_requested(world: World) -> None:
    world.refused(CheckpointError, "owner/name@../x", "owner/name@revision", hub_id="owner/name@../x")
    assert not world.hub.log


# ---- as for a user: a separate process configured by environment variables


def test_environment_variables_apply_in_a_new_process(world: World) -> None:
    code = """
import sys
from llm_edge.checkpoint.download.hub import fetch_checkpoint
assert "huggingface_hub" not in sys.modules
print(fetch_checkpoint("owner/name", lambda _: None))
"""
    variables = {"HF_ENDPOINT": world.hub.endpoint, "HF_HOME": str(world.cache), "AI_AGENT": "someone"}
    world.hub.cut["model.safetensors"], world.hub.cuts["model.safetensors"] = (
        50_000,
        1,
    )  # the package logs a warning about this
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert content(Path(done.stdout.strip())) == expected(SMALL, {"model.safetensors": WEIGHTS})
    assert Path(done.stdout.strip()).is_relative_to(world.cache)
    agents = {request.headers["user-agent"] for request in world.hub.log if "/resolve/" in request.path}
    assert not [agent for agent in agents if "torch" in agent or "someone" in agent]
    assert {request.path.split("/")[1] for request in world.hub.log} == {"api", "owner", "store"}
    assert fake_hub.COMMIT in done.stdout
