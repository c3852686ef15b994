"""Bad input to the commands: a one-line error, the right exit code, and no created or lost files."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from llm_edge.bench import cli as bench_cli
from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.exporter import cli as export_cli
from llm_edge.exporter import export as export_module
from llm_edge.exporter.bundle import manifest as manifest_module
from llm_edge.exporter.bundle import onnx_writer as graphs_module
from llm_edge.exporter.bundle import staging as staging_module
from llm_edge.exporter.graph.trace import trace
from llm_edge.exporter.progress import STAGES
from llm_edge.exporter.quantization.recipes import RECIPES
from llm_edge.runtime import Model
from llm_edge.runtime.bundle import manifest_entry
from llm_edge.runtime.errors import CheckpointError
from llm_edge.tui import cli as chat_cli

SCRIPTS = Path(sysconfig.get_path("scripts"))

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Done:
    """The result of a command."""

    code: int
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs a command's entry point in this process."""

    def run(main: Callable[[], None], *arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, capsys.readouterr().err)

    return run


@pytest.fixture
def llm_export(command: Callable[..., Done]) -> Callable[..., Done]:
    return lambda *arguments: command(export_cli.main, *arguments, "--progress", "none")


@pytest.fixture(scope="module")
def kept_trace() -> Callable[..., ir.Model]:
    return functools.cache(trace)


@pytest.fixture
def traced_once(kept_trace: Callable[..., ir.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Share the trace between exports of the same shape in this file."""
    monkeypatch.setattr(graphs_module, "trace", kept_trace)


def script(name: str, *arguments: object, cwd: Path | None = None) -> Done:
    """Run the installed console script."""
    words = [str(SCRIPTS / name), *map(str, arguments)]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)
    return Done(done.returncode, done.stderr)


def refused(done: Done, *words: str, code: int = 2) -> None:
    """Check that the error is a single line that contains all of these words."""
    lines = done.err.splitlines()
    assert done.code == code, done.err
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    assert lines[0].isprintable()
    for word in words:
        assert word in lines[0]


def everything(folder: Path) -> dict[str, str]:
    """Every path under a folder with its content; equal only if nothing was created, deleted or changed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"link to {path.readlink()}"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = what
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- changes that damage a checkpoint or bundle


def text(name: str, content: str | bytes) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def gone(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def fields(name: str, **changes: Any) -> Change:
    """Set keys of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        path = folder / name
        content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def config(**changes: Any) -> Change:
    return fields("config.json", **changes)


def cut(name: str, where: Callable[[int], int]) -> Change:
    def change(folder: Path) -> None:
        size = (folder / name).stat().st_size
        assert 0 <= where(size) < size
        os.truncate(folder / name, where(size))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        loaded = load_file(folder / "model.safetensors")
        edit(loaded)
        save_file(loaded, folder / "model.safetensors")

    return change


def index(weight_map: Any) -> Change:
    return index_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index_text(content: str) -> Change:
    """An index in place of the whole file, which would take precedence."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return change


def twice(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def many_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    template = content["added_tokens"][0]
    content["added_tokens"] += [{**template, "id": 320 + n, "content": f"<new {n}>"} for n in range(100)]
    path.write_text(json.dumps(content), encoding="utf-8")


def past_header(size: int) -> int:
    assert size > 20_000
    return 20_000


EMBEDDING = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"

# change to a valid folder -> words that the message must contain
FOLDERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no config": (gone("config.json"), ("no ", "config.json")),
    "config empty": (text("config.json", ""), ("config.json", "not JSON")),
    "config cut": (cut("config.json", lambda size: size // 2), ("config.json", "not JSON")),
    "config an array": (text("config.json", "[1, 2]"), ("config.json", "object")),
    "config not text": (text("config.json", b"\xff\xfe\x00{"), ("config.json", "UTF-8")),
    "config nested": (text("config.json", '{"a":' * 50_000), ("config.json", "too deep")),
    "config a large number": (text("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), ("config.json",)),
    "no architecture": (config(model_type=None), ("model_type",)),
    "unknown architecture": (config(model_type="rwkv"), ("model_type", "'rwkv'", "--families")),
    "architecture with an escape": (config(model_type="\x1b[2J\nx"), ("model_type",)),
    "unknown activation": (config(hidden_act="tan"), ("hidden_act", "'tan'", "transformers")),
    "biases": (config(attention_bias=True), ("q_proj.bias", "missing")),
    "no vocabulary": (config(vocab_size=None), ("vocab_size", "missing")),
    "vocabulary of text": (config(vocab_size="331"), ("vocab_size", "'331'")),
    "vocabulary true": (config(vocab_size=True), ("vocab_size", "True")),
    "vocabulary below zero": (config(vocab_size=-1), ("vocab_size", "-1")),
    "other vocabulary": (config(vocab_size=330), ("embed_tokens", "331", "330")),
    "KV heads do not divide": (config(num_key_value_heads=3), ("num_attention_heads (4)", "num_key_value_heads (3)")),
    "no KV heads": (config(num_key_value_heads=0), ("num_key_value_heads",)),
    "heads do not divide": (config(num_attention_heads=5, head_dim=None), ("hidden_size (64)", "(5)", "head_dim")),
    "no heads": (config(num_attention_heads=0), ("num_attention_heads",)),
    "heads of an odd size": (config(head_dim=31), ("head_dim", "31")),
    "other heads": (config(head_dim=16), ("q_proj", "(128, 64)")),
    "other width": (config(hidden_size=32), ("embed_tokens", "(331, 64)")),
    "too few layers": (config(num_hidden_layers=1), ("model.layers.1.", "only 1 layers", "unexpected tensor")),
    "too many layers": (config(num_hidden_layers=3), ("model.layers.2.", "missing")),
    "absurdly many layers": (config(num_hidden_layers=10**12), ("num_hidden_layers",)),
    "epsilon not a number": (config(rms_norm_eps=float("nan")), ("config.json", "norm_eps", "nan")),
    "scaled positions": (config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}), ("rope", "'dynamic'")),
    "positions of text": (config(rope_parameters="linear"), ("rope_parameters",)),
    "no weights": (gone("model.safetensors"), ("no weights", "model.safetensors")),
    "two sets of weights": (twice, ("2 .safetensors files",)),
    "an index without its shards": (index({EMBEDDING: "model-00001-of-00002.safetensors"}),
                                    ("model-00001-of-00002.safetensors", "missing")),
    "an index that leaves the folder": (index({EMBEDDING: "../model.safetensors"}), ("index.json", "outside")),
    "an index that is no table": (index([1]), ("index.json", "weight_map")),
    "an index of numbers": (index({EMBEDDING: 1}), ("index.json", "weight_map")),
    "an index cut": (index_text('{"weight_map": {'), ("index.json", "not JSON")),
    "weights empty": (cut("model.safetensors", lambda _: 0), ("model.safetensors", "empty")),
    "weights cut in the length": (cut("model.safetensors", lambda _: 5), ("model.safetensors", "damaged")),
    "weights cut after the length": (cut("model.safetensors", lambda _: 8), ("model.safetensors", "damaged")),
    "weights cut in the header": (cut("model.safetensors", lambda _: 500), ("model.safetensors", "truncated")),
    "weights cut early": (cut("model.safetensors", past_header), ("model.safetensors", "truncated")),
    "weights cut in the middle": (cut("model.safetensors", lambda size: size // 2), ("model.safetensors", "truncated")),
    "weights cut by a byte": (cut("model.safetensors", lambda size: size - 1), ("model.safetensors", "truncated")),
    "weights of text": (text("model.safetensors", "not weights at all, " * 10), ("model.safetensors", "damaged")),
    "weights with a header of 2^63": (text("model.safetensors", struct.pack("<Q", 1 << 63) + b"{}"),
                                      ("model.safetensors", "truncated")),
    "a tensor missing": (tensors(lambda t: t.pop(DOWN)), (DOWN, "missing")),
    "a tensor too much": (tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)})),
                          ("q_proj.bias", "unexpected tensor")),
    "a tensor that clears the screen": (tensors(lambda t: t.update({"\x1b[2J\nx": torch.zeros(1)})), ("unprintable",)),
    "a tensor transposed": (tensors(lambda t: t.update({DOWN: t[DOWN].T.contiguous()})), (DOWN, "(128, 64)")),
    "a tensor of whole numbers": (tensors(lambda t: t.update({DOWN: t[DOWN].int()})), (DOWN, "int32")),
    "a tensor of no dimension": (tensors(lambda t: t.update({"model.norm.weight": torch.tensor(1.0)})), ("norm",)),
    "no tokenizer": (gone("tokenizer.json"), ("no tokenizer.json",)),
    "tokenizer empty": (text("tokenizer.json", ""), ("tokenizer.json",)),
    "tokenizer of text": (text("tokenizer.json", "garbage"), ("tokenizer.json",)),
    "tokenizer not text": (text("tokenizer.json", b"\x80garbage"), ("tokenizer.json", "UTF-8")),
    "tokenizer without a model": (text("tokenizer.json", "{}"), ("tokenizer.json",)),
    "tokenizer cut": (cut("tokenizer.json", lambda size: size // 2), ("tokenizer.json",)),
    "tokenizer of another model": (many_tokens, ("331", "use the tokenizer that belongs to the weights")),
    "tokenizer config garbage": (text("tokenizer_config.json", "{]"), ("tokenizer_config.json", "not JSON")),
    "chat template not text": (text("chat_template.jinja", b"\xff"), ("chat_template.jinja", "UTF-8")),
    "generation config garbage": (text("generation_config.json", "nope"), ("generation_config.json", "not JSON")),
    "generation config an array": (text("generation_config.json", "[]"), ("generation_config.json", "object")),
    "end token of text": (fields("generation_config.json", eos_token_id="</s>"), ("eos_token_id", "'</s>'")),
}  # fmt: skip


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_checkpoint` to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))


@pytest.mark.parametrize("case", FOLDERS)
def test_a_bad_folder_is_rejected(case: str, source: Path, tmp_path: Path, llm_export: Callable[..., Done]) -> None:
    change, words = FOLDERS[case]
    before = everything(tmp_path)
    change(source)
    assert (damaged := everything(tmp_path)) != before
    refused(llm_export(source, "-o", tmp_path / "out" / "bundle"), *words)
    assert everything(tmp_path) == damaged


def test_an_invalid_generation_default_is_left_out_and_named(
    source: Path, tmp_path: Path, llm_export: Callable[..., Done], traced_once: None
) -> None:
    fields("generation_config.json", temperature="hot", do_sample=True)(source)
    done = llm_export(source, "-o", tmp_path / "bundle", "--no-validate", "--precision", "fp32")
    assert done.code == 0
    (note,) = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["notes"]
    assert "temperature" in note
    assert "left out" in note
    assert Model.load(tmp_path / "bundle").default_params.temperature == 1.0


def a_file(content: bytes) -> Change:
    return lambda path: path.write_bytes(content)


SOURCES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing": (lambda path: None, ("model.gguf", "no such file or folder")),
    "empty file": (Path.touch, ("model.gguf", "is empty")),
    "text file": (a_file(b"GGML is not GGUF"), ("model.gguf", "not torch.save")),
    "a pickle": (a_file(b"\x80\x02}q\x00."), ("model.gguf", "pickle")),
    "magic only": (a_file(b"GGUF"), ("model.gguf",)),
    "another version": (a_file(b"GGUF" + struct.pack("<IQQ", 99, 0, 0)), ("model.gguf",)),
    "nothing in it": (a_file(b"GGUF" + struct.pack("<IQQ", 3, 0, 0)), ("model.gguf", "general.architecture")),
    "countless tensors": (a_file(b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0)), ("model.gguf",)),
    "a folder": (Path.mkdir, ("model.gguf", "config.json")),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), ("model.gguf", "no such file")),
    "a link to itself": (lambda path: path.symlink_to(path), ("model.gguf",)),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_bad_source_is_rejected(case: str, tmp_path: Path, llm_export: Callable[..., Done]) -> None:
    make, words = SOURCES[case]
    make(tmp_path / "model.gguf")
    before = everything(tmp_path)
    refused(llm_export(tmp_path / "model.gguf", "-o", tmp_path / "bundle"), *words)
    assert everything(tmp_path) == before


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A valid GGUF with one layer."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    bpe = json.loads(tiny.tokenizer().to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tiny.SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_checkpoint(str(path), SourceOptions(), lambda _: None).config.num_hidden_layers == 1
    return path.read_bytes()


@pytest.mark.parametrize("twentieth", range(20))
def test_a_gguf_truncated_anywhere_is_rejected(
    twentieth: int, small_gguf: bytes, tmp_path: Path, llm_export: Callable[..., Done]
) -> None:
    end = len(small_gguf) * twentieth // 20 + 4  # just the magic, up to just short of the end
    (tmp_path / "cut.gguf").write_bytes(small_gguf[:end])
    before = everything(tmp_path)
    refused(llm_export(tmp_path / "cut.gguf", "-o", tmp_path / "bundle"), "cut.gguf")
    assert everything(tmp_path) == before


def test_a_gguf_without_its_last_byte_and_one_with_an_absurd_head_count_are_rejected(
    small_gguf: bytes, tmp_path: Path, llm_export: Callable[..., Done]
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small_gguf[:-1])
    refused(llm_export(path, "-o", tmp_path / "bundle"), "model.gguf", "truncated")
    key = b"llama.attention.head_count\x04\x00\x00\x00"  # the key and the type of its value, u32
    assert small_gguf.count(key) == 1
    for heads in (0, 3, 0xFFFFFFFF):
        at = small_gguf.index(key) + len(key)
        path.write_bytes(small_gguf[:at] + struct.pack("<I", heads) + small_gguf[at + 4 :])
        refused(llm_export(path, "-o", tmp_path / "bundle"))
    assert names(tmp_path) == {"model.gguf"}


def test_a_truncated_smollm2_is_rejected(smollm2_file: Path, tmp_path: Path, llm_export: Callable[..., Done]) -> None:
    path = tmp_path / "smollm2.gguf"
    for size in (1_000, 1_000_000, 10_000_000):
        with smollm2_file.open("rb") as file:
            path.write_bytes(file.read(size))
        refused(llm_export(path, "-o", tmp_path / "bundle"), "smollm2.gguf", "truncated")
    assert names(tmp_path) == {"smollm2.gguf"}


# ---- the output


def bundle_in_the_way(target: Path) -> None:
    target.mkdir()
    (target / "manifest.json").write_text('{"format_version": 1, "precisions": {}, "files": {}}')


def files_in_the_way(target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")


OUTPUTS: dict[str, tuple[Change, tuple[str, ...], tuple[str, ...]]] = {
    "a bundle": (bundle_in_the_way, (), ("exists", "--force")),
    "other files": (files_in_the_way, (), ("exists",)),
    "other files, by force": (files_in_the_way, ("--force",), ("thesis.tex", "not part of a bundle")),
    "an empty folder": (Path.mkdir, (), ("exists",)),
    "a file": (Path.touch, (), ("not a folder",)),
    "a file, by force": (Path.touch, ("--force",), ("not a folder",)),
    "a link to a bundle, by force": (lambda t: (bundle_in_the_way(t.with_name("b")), t.symlink_to("b")),
                                     ("--force",), ("not a folder",)),
    "a link to nowhere": (lambda target: target.symlink_to("nowhere"), (), ("not a folder",)),
}  # fmt: skip


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_existing_output_is_rejected(
    case: str, tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., Done]
) -> None:
    make, options, words = OUTPUTS[case]
    make(tmp_path / "taken")
    before = everything(tmp_path)
    refused(llm_export(tiny_checkpoint, "-o", tmp_path / "taken", *options), "taken", *words)
    assert everything(tmp_path) == before


def test_invalid_names_are_rejected(tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., Done]) -> None:
    (tmp_path / "file").touch()
    refused(llm_export("x" * 300, "-o", tmp_path / "bundle"), "too long")
    refused(llm_export(tiny_checkpoint, "-o", tmp_path / ("x" * 300)), "too long")
    refused(llm_export(tmp_path / "line\nfeed", "-o", tmp_path / "bundle"), r"line\nfeed")
    refused(llm_export(tiny_checkpoint, "-o", tmp_path / "file" / "bundle"), "file")
    assert names(tmp_path) == {"file"}


def test_the_current_folder_can_be_replaced(
    source: Path,
    tmp_path: Path,
    llm_export: Callable[..., Done],
    traced_once: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle_in_the_way(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    refused(llm_export(source, "-o", "."), "exists")
    done = llm_export(source, "-o", ".", "--force", "--no-validate", "--precision", "int8")
    monkeypatch.chdir(tmp_path)
    assert done == Done(0, "")
    assert json.loads((tmp_path / "here" / "manifest.json").read_text())["name"] == "source"
    assert names(tmp_path) == {"here", "source"}


# ---- the machine


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts an in-memory file system with these options."""
    place = tmp_path / "disk"
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "llm-edge-test", str(place)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("200k", ("the bundle needs about", "free disk space")),  # known before the export starts
        ("500k", ("cannot write the bundle", "full")),  # the graph's constants add to the weights
    ],
)
def test_a_full_disk_leaves_no_files(
    size: str,
    words: tuple[str, ...],
    tiny_checkpoint: Path,
    disk: Callable[[str], Path],
    llm_export: Callable[..., Done],
    traced_once: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny.shorten_texts(monkeypatch, 2)  # the logits of the validation take more than the bundle
    place = disk(f"size={size}")
    for target in (place / "bundle", place / "in" / "deeper" / "folders"):
        done = llm_export(tiny_checkpoint, "-o", target, "--precision", "fp32")
        refused(done, str(place), *words, code=3)
        assert [path for path in place.rglob("*") if not path.is_dir()] == []
        assert "bundle" not in names(place)


def test_a_read_only_disk_is_reported(
    tiny_checkpoint: Path, disk: Callable[[str], Path], llm_export: Callable[..., Done]
) -> None:
    place = disk("ro")
    refused(llm_export(tiny_checkpoint, "-o", place / "bundle"), str(place), "Read-only", code=3)
    refused(llm_export(tiny_checkpoint, "-o", place / "in" / "bundle"), str(place), "Read-only", code=3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores permissions")
def test_a_folder_without_permission_is_reported(
    tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., Done]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(llm_export(tiny_checkpoint, "-o", tmp_path / "locked" / "bundle"), "locked", "denied", code=3)


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("save", full),
        ("save", broken),
        ("save", MemoryError),
        ("side files", full),
        ("manifest", full),
        ("fsync", full),
    ],
)
def test_a_machine_failure_leaves_no_files_and_loses_none(
    step: str,
    error: Callable[[], Exception],
    tiny_bundle: Path,
    source: Path,
    tmp_path: Path,
    llm_export: Callable[..., Done],
    traced_once: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reached = []

    def fail(*arguments: Any, **_: Any) -> None:
        reached.append(arguments)
        raise error()

    def save_half(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half a graph")
        fail()

    if step == "save":
        monkeypatch.setattr(graphs_module.ir, "save", save_half)
    elif step == "side files":
        monkeypatch.setattr(export_module, "write_side_files", fail)
    elif step == "manifest":
        monkeypatch.setattr(manifest_module, "write_json", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    shutil.copytree(tiny_bundle, tmp_path / "old")
    before = everything(tmp_path)
    options = ("--no-validate", "--precision", "int8")
    refused(llm_export(source, "-o", tmp_path / "new", *options), str(tmp_path), code=3)
    refused(llm_export(source, "-o", tmp_path / "old", "--force", *options), str(tmp_path), code=3)
    assert len(reached) == 2
    assert everything(tmp_path) == before


def test_a_bundle_is_restored_if_its_replacement_cannot_be_renamed(
    tiny_bundle: Path,
    source: Path,
    tmp_path: Path,
    llm_export: Callable[..., Done],
    traced_once: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "old")
    before = everything(tmp_path)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(staging_module, "exchange", lambda first, second: False)  # as on other systems
    options = ("--force", "--no-validate", "--precision", "int8")
    refused(llm_export(source, "-o", tmp_path / "old", *options), str(tmp_path), code=3)
    assert everything(tmp_path) == before


# ---- arguments


@pytest.mark.parametrize("precision", ["int3", "fp32,int3", "INT8", "int8;int4", "", " ", ",", "int8 int4"])
def test_unknown_precisions_are_rejected(
    precision: str, tiny_checkpoint: Path, tmp_path: Path, llm_export: Callable[..., Done]
) -> None:
    done = llm_export(tiny_checkpoint, "-o", tmp_path / "bundle", "--precision", precision)
    refused(done, "--precision", ", ".join(RECIPES))
    assert names(tmp_path) == set()


USAGE: dict[str, tuple[Callable[[], None], tuple[str, ...], str]] = {
    "no source": (export_cli.main, (), "source"),
    "unknown option": (export_cli.main, ("x", "--fast"), "--fast"),
    "unknown graph": (export_cli.main, ("x", "--graph", "pretty"), "pretty"),
    "unknown progress": (export_cli.main, ("x", "--progress", "loud"), "loud"),
    "two sources": (export_cli.main, ("x", "y"), "y"),
    "an option without its value": (export_cli.main, ("x", "-o"), "-o"),
    "chat: temperature of text": (chat_cli.main, ("x", "--temperature", "hot"), "--temperature"),
    "chat: part of a token": (chat_cli.main, ("x", "--max-tokens", "1.5"), "--max-tokens"),
    "chat: unknown option": (chat_cli.main, ("x", "--loud"), "--loud"),
    "bench: no bundle": (bench_cli.main, (), "bundle"),
    "bench: no rounds": (bench_cli.main, ("x", "--rounds", "0"), "rounds"),
    "bench: no threads": (bench_cli.main, ("x", "--threads", "0"), "threads"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors_are_rejected(case: str, command: Callable[..., Done]) -> None:
    main, arguments, word = USAGE[case]
    done = command(main, *arguments)
    assert done.code == 2
    assert word in done.err
    assert "Error: " in done.err
    assert "Traceback" not in done.err


# ---- llm-chat and llm-bench


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_bundle` to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def flipped(name: str) -> Change:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


BUNDLES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing": (shutil.rmtree, ("no such bundle folder", "llm-export")),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.touch()), ("no such bundle folder",)),
    "no manifest": (gone("manifest.json"), ("manifest.json", "llm-export")),
    "manifest garbage": (text("manifest.json", "{"), ("manifest.json", "not JSON")),
    "another version": (fields("manifest.json", format_version=2), ("format version 2", "again")),
    "a file missing": (gone("tokenizer.json"), ("tokenizer.json", "missing", "again")),
    "weights cut": (cut("onnx/model_quantized.onnx_data", lambda n: n - 1), ("model_quantized.onnx_data", "bytes")),
    "weights changed": (flipped("onnx/model_quantized.onnx_data"), ("model_quantized.onnx_data", "checksum")),
    "graph changed": (flipped("onnx/model_quantized.onnx"), ("model_quantized.onnx", "checksum")),
}


@pytest.mark.parametrize("case", BUNDLES)
def test_a_bad_bundle_is_rejected(case: str, bundle: Path, command: Callable[..., Done]) -> None:
    change, words = BUNDLES[case]
    change(bundle)
    before = everything(bundle.parent)
    refused(command(chat_cli.main, bundle, "--ask", "hi"), "bundle", *words)
    refused(command(bench_cli.main, bundle), "bundle", *words)
    assert everything(bundle.parent) == before


CHATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown precision": (("--precision", "int2"), ("'int2'", "fp32, int8, int4")),
    "no precision": (("--precision", ""), ("precision",)),
    "nothing asked": (("--ask", ""), ("--ask",)),
    "spaces asked": (("--ask", " \n\t"), ("--ask",)),
    "temperature below zero": (("--temperature", "-0.1"), ("temperature", "-0.1")),
    "temperature not a number": (("--temperature", "nan"), ("temperature", "nan")),
    "temperature without end": (("--temperature", "inf"), ("temperature", "inf")),
    "top_p above one": (("--top-p", "1.1"), ("top_p", "1.1")),
    "top_k below zero": (("--top-k", "-1"), ("top_k", "-1")),
    "min_p above one": (("--min-p", "2"), ("min_p", "2")),
    "no penalty": (("--repetition-penalty", "0"), ("repetition_penalty", "0")),
    "no tokens": (("--max-tokens", "0"), ("max_tokens", "0")),
    "seed below zero": (("--seed", "-1"), ("seed", "-1")),
    "stop at nothing": (("--stop", ""), ("stop",)),
    "unknown provider": (("--provider", "tpu"), ("'tpu'", "cpu")),
    "no threads": (("--threads", "0"), ("threads", "0")),
    "absurdly many threads": (("--threads", "1000000"), ("threads", "1000000")),
    "more than the context holds": (("--ask", "word " * 2000), ("tokens", "1024", "shorten")),
}


@pytest.mark.parametrize("case", CHATS)
def test_a_bad_chat_parameter_is_rejected(case: str, tiny_bundle: Path, command: Callable[..., Done]) -> None:
    arguments, words = CHATS[case]
    question = () if "--ask" in arguments else ("--ask", "hi")
    refused(command(chat_cli.main, tiny_bundle, *question, *arguments), *words)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="CUDA is there")
def test_an_unavailable_provider_is_rejected(tiny_bundle: Path, command: Callable[..., Done]) -> None:
    refused(
        command(chat_cli.main, tiny_bundle, "--ask", "hi", "--provider", "cuda"), "cuda", "onnxruntime-gpu[cuda,cudnn]"
    )


def test_a_missing_default_bundle_names_the_export_command(tmp_path: Path) -> None:
    done = script("llm-chat", "--ask", "hi", cwd=tmp_path)
    refused(done, "artifacts/smollm2-135m", "llm-export smollm2")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("precision", ["int2", "int8,int2", ","])
def test_a_bad_benchmark_precision_is_rejected(precision: str, tiny_bundle: Path, command: Callable[..., Done]) -> None:
    refused(command(bench_cli.main, tiny_bundle, "--precision", precision), "precision", "fp32, int8, int4")


def test_invalid_bundle_names_are_rejected(command: Callable[..., Done]) -> None:
    for main in (chat_cli.main, bench_cli.main):
        refused(command(main, "x" * 300), "no such bundle folder")


# ---- the installed commands in separate processes


def test_the_installed_command_prints_its_stages_and_one_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    files_in_the_way(tmp_path / "taken")
    cases = [
        ("cut.gguf", "-o", "new"),
        (tiny_checkpoint, "-o", "taken", "--force"),
        (tiny_checkpoint, "-o", "new", "--precision", "int3"),
    ]
    before = everything(tmp_path)
    for arguments in cases:
        done = script("llm-export", *arguments, cwd=tmp_path)
        *progress, last = done.err.splitlines()
        refused(Done(done.code, last))
        assert all(line.split()[0] in STAGES for line in progress)
        assert everything(tmp_path) == before


def test_the_installed_command_prints_errors_on_stderr_with_json_progress(tmp_path: Path) -> None:
    words = [str(SCRIPTS / "llm-export"), str(tmp_path / "missing"), "--progress", "json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    refused(Done(done.returncode, done.stderr), "missing")
    assert [json.loads(line)["stage"] for line in done.stdout.splitlines()] in (["reading"], ["reading"] * 2)


def test_the_installed_chat_and_benchmark_reject_a_changed_bundle(bundle: Path) -> None:
    flipped("onnx/model_quantized.onnx_data")(bundle)
    refused(script("llm-chat", bundle, "--ask", "hi"), "model_quantized.onnx_data", "checksum")
    refused(script("llm-bench", bundle, "--rounds", "1"), "model_quantized.onnx_data", "checksum")
    # a precision with intact files still works
    assert script("llm-chat", bundle, "--ask", "hi", "--precision", "int4", "--max-tokens", "2").code == 0


def test_a_bundle_with_a_wrong_manifest_fails_in_one_line(bundle: Path) -> None:
    """The checksums match, so the damage is detected only when the file is used."""
    name = "onnx/model_quantized.onnx"
    (bundle / name).write_bytes(b"not a graph")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = manifest_entry(bundle / name)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    refused(script("llm-chat", bundle, "--ask", "hi"), name, "not a graph that llm-export writes")


def test_weights_that_compute_no_numbers_fail_in_one_line(bundle: Path) -> None:
    name = "onnx/model.onnx_data"
    (bundle / name).write_bytes(b"\xff" * (bundle / name).stat().st_size)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = manifest_entry(bundle / name)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    refused(script("llm-chat", bundle, "--ask", "hi", "--precision", "fp32"), "nan", "export it again")


def test_checkpoint_errors_name_their_file_for_library_callers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        open_checkpoint(str(tmp_path / "nowhere"), SourceOptions(), lambda _: None)
