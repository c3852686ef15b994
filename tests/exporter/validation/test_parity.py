"""Validation within a memory limit, and reproducible bundles."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter import cli as export_cli
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.exporter.results import Report
from llm_edge.exporter.validation.parity import memory_for
from llm_edge.model.decoder import Decoder
from llm_edge.runtime import Model, SamplingParams
from llm_edge.runtime.errors import ParityError

LAYERS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("prove") / "three", num_hidden_layers=LAYERS)


def exported(checkpoint: Path, output: Path, memory: float, precisions: str = "int8") -> Report:
    return export(str(checkpoint), ExportOptions(output, precision=precisions, validation_memory=memory / 1e9))


def validated_layers(report: Report) -> int:
    assert report.validation is not None
    return report.validation.layers


def manifest(bundle: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return read


def test_a_model_that_does_not_fit_is_validated_in_part(checkpoint: Path, tmp_path: Path) -> None:
    config = read_folder(checkpoint).config
    report = exported(checkpoint, tmp_path / "bundle", memory_for(config, 2) + 1)
    assert report.validation is not None
    assert (report.validation.layers, report.layers) == (2, LAYERS)
    assert report.validation.required_bytes == memory_for(config, LAYERS)
    found = manifest(tmp_path / "bundle")
    assert found["validation"] == {"layers": 2, "of": LAYERS}
    assert found["proof"]["fp32"]["prefill"]["max"] < 1e-4
    assert {path.name for path in (tmp_path / "bundle").iterdir()}.isdisjoint({"check"})
    answer = Model.load(tmp_path / "bundle").generate("The quick", SamplingParams(temperature=0, max_tokens=4)).result()
    assert len(answer.tokens) == 4  # the bundle itself is complete


def test_at_least_one_layer_is_validated(checkpoint: Path, tmp_path: Path) -> None:
    assert validated_layers(exported(checkpoint, tmp_path / "bundle", 1.0)) == 1


def differing_layer(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    """Give the reference another weight than the graph in one layer."""
    load = Decoder.load_weights

    def wrong(decoder: Decoder, weights: Mapping[str, torch.Tensor]) -> None:
        load(decoder, weights)
        if layer < len(decoder.layers):
            decoder.layers[layer].mlp_norm.weight.data.mul_(1.05)

    monkeypatch.setattr(Decoder, "load_weights", wrong)


def test_errors_are_found_in_validated_layers_only(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = memory_for(read_folder(checkpoint).config, 1) + 1
    differing_layer(monkeypatch, 0)
    with pytest.raises(ParityError, match="Nothing was written"):
        exported(checkpoint, tmp_path / "bundle", one)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    differing_layer(monkeypatch, LAYERS - 1)
    assert validated_layers(exported(checkpoint, tmp_path / "bundle", one)) == 1
    with pytest.raises(ParityError):
        exported(checkpoint, tmp_path / "another", 1e12)


def test_the_command_reports_which_layers_were_not_validated(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_edge.exporter.validation.parity.memory_for", lambda _, layers: layers * 1e9)
    arguments = [str(checkpoint), "-o", str(tmp_path / "bundle"), "--precision", "int8", "--validation-memory", "2"]
    monkeypatch.setattr("sys.argv", ["llm-export", *arguments])
    with pytest.raises(SystemExit) as end:
        export_cli.main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "Compared only the first 2 of 3 layers, with embedding and head." in printed
    assert "about 3 GB: --validation-memory" in printed


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "options",
    [(), ("--no-validate", "--graph", "portable"), ("--no-validate", "--format", "torchscript")],
    ids=" ".join,
)
def test_exports_of_the_same_source_are_identical(
    options: tuple[str, ...],
    checkpoint: Path,
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    """All files including the manifest; the second export reads a renamed copy of the source, a year later."""
    precision = ("--precision", "fp32" if "torchscript" in options else "fp32,int8,int4")
    copy = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere" / checkpoint.name))
    assert command(checkpoint, "-o", tmp_path / "first", *precision, *options)[0] == 0
    assert command(copy, "-o", tmp_path / "deep" / "second", *precision, *options, year=2031)[0] == 0
    first, second = sums(tmp_path / "first"), sums(tmp_path / "deep" / "second")
    assert "manifest.json" in first
    assert first == second


YEARS_LATER = """
import datetime, sys, time
year = int(sys.argv.pop())
seconds = (year - 2026) * 365 * 86400
now = time.time
time.time = lambda: now() + seconds
class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=seconds)
datetime.datetime = Later
from llm_edge.exporter.cli import main
main()
"""


@pytest.fixture
def command() -> Callable[..., tuple[int, str, str]]:
    import subprocess
    import sys

    def run(*arguments: object, year: int = 2026) -> tuple[int, str, str]:
        words = [sys.executable, "-c", YEARS_LATER, *map(str, arguments), str(year)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.returncode, done.stdout, done.stderr

    return run
