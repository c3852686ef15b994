"""TorchScript: the file run with plain torch matches transformers, and the runtime runs the bundle with it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny
import torch
from project import ROOT
from torch import Tensor

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter import cli
from llm_edge.exporter.bundle import torchscript_writer
from llm_edge.exporter.bundle.torchscript_writer import write_torchscript
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions, FileFormat
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.results import Report
from llm_edge.model.config import Activation
from llm_edge.model.decoder import count_parameters, rotary_tables
from llm_edge.runtime import Bundle, Model, SamplingParams
from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.limits import MAX_STEP_TOKENS
from llm_edge.runtime.backend.torchscript_check import check_program
from llm_edge.runtime.backend.torchscript_session import TorchScriptSession
from llm_edge.runtime.errors import (
    BundleError,
    ContextLengthError,
    LlmEdgeError,
    MachineError,
    ParameterError,
    ParityError,
    ProviderError,
)

BOUND = 1e-4
CHUNKS = (20, 20, 1, 1, 28)  # after the first, every chunk is longer than, or extends beyond, a sliding window
LENGTH = sum(CHUNKS)
SHORT = 41  # tokens of the second row of a batch
PHI3 = "phi3, longrope on a part of each head"
NAMES = ("llama with biases, tied", "mistral", "qwen3", "smollm3", PHI3, "gemma3_text", "gpt2", "gpt_neo", "gpt_neox")
NAMES += ("llama, longrope", "olmo2", "granite", "cohere2", "olmo", "ministral3", "gemma2", "phi")
MODEL = "torchscript/model.pt"

# Uses the file in a process that cannot import llm_edge.
ALONE = """
import sys, warnings
sys.modules["llm_edge"] = None
warnings.simplefilter("ignore")
import torch

chunks, found = CHUNKS, {}
for path in sys.argv[2:]:
    module = torch.jit.load(path)
    ids = torch.load(path + ".ids")

    def run(ids, mask, lengths):
        past, logits, start = module.empty_past(len(ids)), [], 0
        for length in lengths:
            start += length
            part, past = module(ids[:, start - length : start], mask[:, :start], past)
            logits.append(part)
        return torch.cat(logits, 1)

    ones = torch.ones_like(ids)
    ones[1, SHORT:] = 0
    whole = ids.shape[1]
    found[path] = {
        "at once": run(ids[:1], ones[:1], [whole])[0],
        "in chunks": run(ids[:1], ones[:1], chunks)[0],
        "batch": run(ids, ones, [whole]),
        "batch in chunks": run(ids, ones, chunks),
        "last": module(ids[:1], ones[:1], module.empty_past(), num_logits_to_keep=2)[0],
    }
    assert not any(tensor.requires_grad for tensor in found[path].values())
assert not any(name.startswith("llm_edge.") for name in sys.modules)
torch.save(found, sys.argv[1])
"""


def silent(*_: object) -> None:
    """No progress."""


def files(folder: Path) -> dict[str, str]:
    """sha256 of every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@torch.inference_mode()
def logits_of(theirs: Any, ids: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """Logits of transformers, [T, V]."""
    cache, found, start = None, [], 0
    for length in chunks:
        step = theirs(ids[None, start : start + length], past_key_values=cache, use_cache=True)
        cache, start = step.past_key_values, start + length
        found.append(step.logits[0])
    return torch.cat(found)


@torch.inference_mode()
def greedy(theirs: Any, ids: Tensor, count: int) -> list[int]:
    step, tokens = theirs(ids[None], use_cache=True), []
    for _ in range(count):
        tokens.append(int(step.logits[0, -1].argmax()))
        step = theirs(torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True)
    return tokens


class Written:
    """A family's model in transformers, its TorchScript file, and the file's results in a separate process."""

    def __init__(self, name: str, folder: Path) -> None:
        self.theirs = families.model(name)
        self.checkpoint = read_folder(families.save(self.theirs, folder / "source"))
        self.path = folder / "model.pt"
        write_torchscript(self.path, self.checkpoint.config, self.checkpoint.weights, silent)
        self.ids = torch.randint(0, 331, (2, LENGTH), generator=torch.Generator().manual_seed(1))
        torch.save(self.ids, f"{self.path}.ids")
        self.found: dict[str, Tensor] = {}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """All families, run in one process."""
    made = {name: Written(name, tmp_path_factory.mktemp("family")) for name in NAMES}
    results = tmp_path_factory.mktemp("alone") / "results"
    code = ALONE.replace("CHUNKS", repr(CHUNKS)).replace("SHORT", repr(SHORT))
    command = [sys.executable, "-c", code, results, *(case.path for case in made.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=results.parent)
    assert done.returncode == 0, done.stderr
    found = torch.load(results)
    for case in made.values():
        case.found = found[str(case.path)]
    return made


def source_of(case: Written) -> Path:
    return case.path.parent / "source"


# ---- the file


@pytest.mark.parametrize("name", NAMES)
def test_the_file_in_plain_torch_matches_transformers(name: str, written: dict[str, Written]) -> None:
    case = written[name]
    at_once, in_chunks = (logits_of(case.theirs, case.ids[0], chunks) for chunks in ((LENGTH,), CHUNKS))
    assert at_once.std() > 0.5  # otherwise the bound would be meaningless
    assert (case.found["at once"] - at_once).abs().max() < BOUND
    assert (case.found["in chunks"] - in_chunks).abs().max() < BOUND
    assert case.found["last"].shape == (1, 2, 331)
    assert (case.found["last"][0] - at_once[-2:]).abs().max() < BOUND


@pytest.mark.parametrize("name", NAMES)
def test_sequences_of_a_batch_are_independent(name: str, written: dict[str, Written]) -> None:
    """Traced with two sequences of three tokens: other shapes must work too, and sequences of different lengths."""
    case = written[name]
    for way, chunks in (("batch", (LENGTH,)), ("batch in chunks", CHUNKS)):
        if "longrope" in name and len(chunks) > 1:
            continue  # the longest sequence selects the rotary angles for all, and here for each chunk
        for row, length in ((0, LENGTH), (1, SHORT)):
            alone = logits_of(case.theirs, case.ids[row, :length], (length,))
            assert (case.found[way][row, :length] - alone).abs().max() < BOUND


def test_equal_sources_yield_equal_files(written: dict[str, Written], tmp_path: Path) -> None:
    for name in ("llama with biases, tied", "gemma3_text"):
        case = written[name]
        again = tmp_path / "model.pt"
        write_torchscript(again, case.checkpoint.config, case.checkpoint.weights, silent)
        assert again.read_bytes() == case.path.read_bytes()
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]  # and no other file


def test_another_process_writes_the_same_file(written: dict[str, Written], tmp_path: Path) -> None:
    """With another hash seed, so that sets are ordered differently, and after other work."""
    code = """
import sys
from pathlib import Path
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.bundle.torchscript_writer import write_torchscript
for number, source in enumerate(sys.argv[2:]):
    checkpoint = read_folder(Path(source))
    write_torchscript(Path(sys.argv[1], f"{number}.pt"), checkpoint.config, checkpoint.weights, lambda *_: None)
"""
    cases = [written[name] for name in (PHI3, "gemma3_text", "gpt2", "llama with biases, tied", "olmo2")]
    command = [sys.executable, "-c", code, tmp_path, *map(source_of, cases)]
    environment = {**os.environ, "PYTHONHASHSEED": "3"}
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
    for number, case in enumerate(cases):
        assert (tmp_path / f"{number}.pt").read_bytes() == case.path.read_bytes()


def test_a_tied_weight_is_stored_once_and_no_source_file_is_named(written: dict[str, Written]) -> None:
    case = written["llama with biases, tied"]
    config = case.checkpoint.config
    numbers = count_parameters(config) + sum(table.numel() for table in rotary_tables(config).values())
    with zipfile.ZipFile(case.path) as archive:
        records = archive.infolist()
        assert sum(record.file_size for record in records if "/data/" in record.filename) == 4 * numbers
        assert {record.date_time for record in records} == {(1980, 1, 1, 0, 0, 0)}
        text = b"".join(archive.read(record) for record in records if "/data/" not in record.filename)
    assert b"def forward" in text
    assert str(ROOT).encode() not in text
    assert b"site-packages" not in text


def test_torch_reads_archives_larger_than_four_gigabytes(
    written: dict[str, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their records hold 64-bit sizes; the test lowers the limit where they begin."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 5)
    case = written["gpt2"]
    path = tmp_path / "model.pt"
    write_torchscript(path, case.checkpoint.config, case.checkpoint.weights, silent)
    assert b"PK\x06\x06" in path.read_bytes()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.load` is ", DeprecationWarning)
        module: Any = torch.jit.load(path)
    logits, _ = module(case.ids[:1], torch.ones(1, LENGTH, dtype=torch.int64), module.empty_past())
    assert (logits[0] - case.found["at once"]).abs().max() < BOUND


# ---- the bundle


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate on a little of the text."""
    tiny.shorten_texts(monkeypatch, 200)


def exported(source: Path, target: Path, progress: Progress = silent, **options: Any) -> Report:
    return export(str(source), ExportOptions(target, FileFormat.TORCHSCRIPT, **options), progress)


@pytest.fixture(scope="module")
def bundle(written: dict[str, Written], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of smollm3, three layers, validated; not to be written to."""
    target = tmp_path_factory.mktemp("bundle") / "made"
    with pytest.MonkeyPatch.context() as patch:
        tiny.shorten_texts(patch, 200)
        exported(source_of(written["smollm3"]), target)
    return target


@pytest.fixture
def changed(bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the bundle with another model file, or with entries of the manifest replaced; checksums are right."""

    def change(model: bytes | None = None, shape: dict[str, int] | None = None, **entry: Any) -> Path:
        folder = Path(shutil.copytree(bundle, tmp_path / "changed"))
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if model is not None:
            (folder / MODEL).write_bytes(model)
            manifest["files"][MODEL] = {"size": len(model), "sha256": hashlib.sha256(model).hexdigest()}
        manifest["model"].update(shape or {})
        manifest["precisions"]["fp32"].update(entry)
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return folder

    return change


def test_a_bundle_omits_the_files_for_onnx(bundle: Path, written: dict[str, Written]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    names = files(bundle).keys()
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        MODEL,
    }
    assert manifest["files"].keys() == names - {"manifest.json"}
    assert manifest["graph"] == "torchscript"
    assert "transformers.js_config" not in json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    entry = manifest["precisions"]["fp32"]
    assert (entry["format"], entry["model"], entry["share_buffer"]) == ("torchscript", MODEL, False)
    assert all(entry["parity"][way]["max"] < 1e-4 for way in ("prefill", "steps", "chunk"))
    assert entry["quality"]["tokens"] > 100
    assert entry["quality"]["top1"] > 0.99
    info = Bundle.open(bundle).precision()
    assert (info.format, info.size) == ("torchscript", (bundle / MODEL).stat().st_size)
    assert (bundle / MODEL).read_bytes() == written["smollm3"].path.read_bytes()


def test_greedy_text_matches_transformers(bundle: Path, written: dict[str, Written]) -> None:
    case = written["smollm3"]
    model = Model.load(bundle)
    tokens = greedy(case.theirs, case.ids[0], 64)
    assert 2 not in tokens  # the end token
    found = model.generate(case.ids[0].tolist(), SamplingParams(temperature=0.0, max_tokens=64)).result()
    assert [*found.tokens] == tokens
    assert len(set(tokens)) > 30
    assert model.run_seconds > 0
    assert model.provider == "cpu"
    params = SamplingParams(temperature=0.0, max_tokens=5)
    assert model.chat([{"role": "user", "content": "Hi"}], params).result().tokens


def test_unvalidated_and_replacing_exports(written: dict[str, Written], bundle: Path, tmp_path: Path) -> None:
    """No validation and --force work as with ONNX."""
    source = source_of(written["smollm3"])
    target = tmp_path / "made"
    stages: list[str] = []
    report = exported(source, target, lambda stage, *_: stages.append(stage))
    assert report.validation is not None
    assert (report.layers, report.style) == (3, None)
    assert [*dict.fromkeys(stages)] == ["reading", "tracing", "quantizing", "validating", "writing"]
    with pytest.raises(LlmEdgeError, match="exists"):
        exported(source, target)
    report = exported(source, target, validate=False, force=True)
    assert report.validation is None
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (target / MODEL).read_bytes() == (bundle / MODEL).read_bytes()


def test_a_file_with_wrong_logits_makes_no_bundle(
    written: dict[str, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torchscript_writer._add

    def wrong(archive: zipfile.ZipFile, record: str, weight: Tensor) -> None:
        right(archive, record, weight * 1.01 if weight.ndim == 2 else weight)

    monkeypatch.setattr(torchscript_writer, "_add", wrong)
    with pytest.raises(ParityError, match="fp32: logits differ from PyTorch by up to "):
        exported(source_of(written["gpt2"]), tmp_path / "made")
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_leaves_no_files(
    written: dict[str, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torchscript_writer, "_add", full)
    with pytest.raises(MachineError, match="No space left on device"):
        exported(source_of(written["gpt2"]), tmp_path / "made")
    assert [*tmp_path.iterdir()] == []


def test_a_disk_that_fills_up_at_any_point_leaves_no_files(written: dict[str, Written], tmp_path: Path) -> None:
    """A file size limit simulates the disk; torch's own writer would abort the process."""
    case = written["gpt2"]
    code = """
import resource, sys
from llm_edge.exporter.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main()
"""
    size = case.path.stat().st_size
    for limit in (1_000, size // 2, size - 100):
        command = [sys.executable, "-c", code, str(limit), source_of(case), "-o", tmp_path / "made"]
        command += ["--format", "torchscript", "--progress", "none"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert "cannot write the bundle (File too large): free disk space" in done.stderr
        assert done.stderr.count("\n") == 1
        assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "int4,fp32"), "--format torchscript supports fp32 only, not int4"),
        (("--graph", "portable"), "--graph applies to ONNX only"),
    ],
)
def test_options_that_torchscript_does_not_support_are_rejected(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["llm-export", "nowhere", "-o", str(tmp_path / "made"), "--format", "torchscript", "--progress", "none"]
    monkeypatch.setattr(sys, "argv", [*words, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_the_command_exports_fp32_and_reports_it(
    written: dict[str, Written], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = source_of(written["gpt2"]), tmp_path / "made"
    monkeypatch.setattr(sys, "argv", ["llm-export", str(source), "-o", str(target), "--format", "torchscript"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert f"Bundle: {target}" in capsys.readouterr().out
    assert [*Bundle.open(target).precisions] == ["fp32"]


# ---- files that the runtime rejects


def test_a_newer_format_is_rejected(changed: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match=r"fp32 has format 'gguf', but this runtime supports onnx and torchscr"):
        Bundle.open(changed(format="gguf"))


def test_a_changed_file_is_not_loaded(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "changed"))
    content = bytearray((folder / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / MODEL).write_bytes(content)
    with pytest.raises(BundleError, match="does not match its checksum"):
        Model.load(folder)


def test_an_unverified_file_is_not_loaded(bundle: Path) -> None:
    with pytest.raises(ParameterError, match="TorchScript is code and can only be loaded with verify=True"):
        Model.load(bundle, verify=False)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_not_torchscript_is_rejected_in_one_line(content: bytes, changed: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match=r"model\.pt: .*export the bundle again") as raised:
        Model.load(changed(content))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "shape",
    [{"vocab_size": 400}, {"num_hidden_layers": 2, "windows": [0, 10]}, {"num_key_value_heads": 4}, {"head_dim": 16}],
)
def test_a_module_of_another_shape_is_rejected_in_one_line(shape: dict[str, Any], changed: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match="it is not a decoder with the dimensions in the manifest") as raised:
        Model.load(changed(shape=shape))
    assert "\n" not in str(raised.value)


def test_without_torch_the_error_says_what_to_install(bundle: Path) -> None:
    code = "import sys\nsys.modules['torch'] = None\nfrom llm_edge.tui.cli import main\nmain()"
    command = [sys.executable, "-c", code, bundle, "--ask", "Hi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "a TorchScript bundle needs torch: pip install torch" in done.stderr


# ---- programs that do more than arithmetic


def rewritten(path: Path, change: Callable[[str, bytes], tuple[str, bytes]], stored: bool = True) -> bytes:
    """Rewrite an archive, transforming the name and content of every record."""
    made = io.BytesIO()
    kind = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w", kind) as new:
        for record in old.infolist():
            new.writestr(*change(record.filename, old.read(record)))
    return made.getvalue()


def replaced(old: bytes, new: bytes) -> Callable[[str, bytes], tuple[str, bytes]]:
    return lambda name, content: (name, content if "/data/" in name else content.replace(old, new))


LINE = b"    heads = self.heads\n"  # of the method empty_past
HOSTILE: dict[str, tuple[bytes, bytes, str]] = {
    "an operator that writes files": (LINE, LINE + b'    _99 = torch.save(weight, "VICTIM")\n', r"calls torch\.save"),
    "one that maps them": (LINE, LINE + b'    _99 = torch.from_file("VICTIM", True, 9)\n', r"calls torch\.from_file"),
    "one that addresses memory": (
        LINE,
        LINE + b"    _99 = torch.as_strided(weight, [1], [1], 1)\n",
        r"calls torch\.as_strided",
    ),
    "an operator of others": (LINE, LINE + b"    _99 = ops.other.run(weight)\n", r"calls ops\.other\.run"),
    "a method of a tensor": (LINE, LINE + b"    _99 = weight.save()\n", r"calls weight\.save"),
    "a loop without an end": (LINE, LINE + b"    while True:\n      _99 = 1\n", "contains code with While"),
    "what runs while it is loaded": (b"def empty_past(", b"def __setstate__(", "defines __setstate__"),
    "a comment": (LINE, LINE + b"    # hidden\n", "contains code that torch would not write"),
    "no code at all": (LINE, LINE + b"    ((\n", "contains code that cannot be parsed"),
    "a class built into torch": (
        b"__torch__.torch.nn.modules.container",
        b"__torch__.torch.classes.quantized",
        r"refers to __torch__\.torch\.classes\.quantized",
    ),
    "another function of Python": (b"ccollections\nOrderedDict\n", b"cposix\nsystem\n", "refers to posix system"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_program_with_other_operations_is_rejected_before_torch_loads_it(
    name: str, bundle: Path, changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, message = HOSTILE[name]
    model = rewritten(bundle / MODEL, replaced(old, new.replace(b"VICTIM", str(tmp_path / "victim").encode())))
    assert model != rewritten(bundle / MODEL, replaced(b"", b""))
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(BundleError, match=f"it {message}.*do not trust it") as raised:
        Model.load(changed(model))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "victim").exists()


def test_unusual_archive_layouts_are_rejected(bundle: Path, changed: Callable[..., Path], tmp_path: Path) -> None:
    whole = (bundle / MODEL).read_bytes()
    for model, message in (
        (rewritten(bundle / MODEL, lambda name, content: (name, content), stored=False), "contains compressed records"),
        (b"in front" + whole, "has another layout than exported files"),
        (
            rewritten(bundle / MODEL, lambda name, content: (name.replace("/code/", "/CODE/"), content)),
            r"contains 'CODE/",
        ),
        (
            rewritten(bundle / MODEL, lambda name, content: (name.replace("version", "extra/run.py"), content)),
            r"contains 'extra/run\.py'",
        ),
    ):
        with pytest.raises(BundleError, match=message):
            Model.load(changed(model))
        shutil.rmtree(tmp_path / "changed")


def test_every_family_and_activation_passes(written: dict[str, Written], tmp_path: Path) -> None:
    for case in written.values():
        check_program(case.path)
    case, path = written["gpt2"], tmp_path / "model.pt"
    for activation in Activation:
        config = dataclasses.replace(case.checkpoint.config, activation=activation)
        write_torchscript(path, config, case.checkpoint.weights, silent)
        check_program(path)


# ---- the session


@pytest.fixture(scope="module")
def session(bundle: Path) -> TorchScriptSession:
    opened = Bundle.open(bundle)
    return TorchScriptSession(GraphFile(opened.file(MODEL), opened.shape), ExecutionOptions("cpu"))


def test_steps_match_the_onnx_session(session: TorchScriptSession, written: dict[str, Written]) -> None:
    ids, whole = written["smollm3"].ids[0].numpy(), written["smollm3"].found["at once"].numpy()
    session.clear_cache()
    start = 0
    for length, count in ((30, 1), (3, 2), (1, 1), (1, 0), (5, 0), (5, 5)):
        found = session.step(ids[start : start + length].tolist() if length < 5 else ids[start : start + length], count)
        start += length
        rows = count or length
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, whole[start - rows : start], atol=BOUND, rtol=0)
        assert session.length == start
    session.clear_cache()
    np.testing.assert_allclose(session.step(ids[:9]), whole[8:9], atol=BOUND, rtol=0)
    assert session.run_seconds > 0


def test_invalid_steps_are_rejected(session: TorchScriptSession) -> None:
    session.clear_cache()
    for tokens, count in (([], 1), ([1] * (MAX_STEP_TOKENS + 1), 1), ([1], 2), ([1], -1)):
        with pytest.raises(ParameterError):
            session.step(tokens, count)
    session.step([1] * (session.limit - 1))
    session.step([1])
    with pytest.raises(ContextLengthError):
        session.step([1])
    assert session.length == session.limit


def test_provider_and_thread_options_are_checked(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    before = torch.get_num_threads()
    try:
        session = TorchScriptSession(GraphFile(opened.file(MODEL), opened.shape), ExecutionOptions("auto", 1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert session.provider == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in (0, "2", 1.0, True):
        with pytest.raises(ParameterError, match=f"threads is {wrong!r}; use 1 to 1024"):
            Model.load(bundle, threads=wrong)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="provider is 'tpu'"):
        Model.load(bundle, provider="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ProviderError, match="provider cuda: this torch has no CUDA"):
            Model.load(bundle, provider="cuda")
