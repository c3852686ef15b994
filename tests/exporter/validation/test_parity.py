"""Validation of whole models, and reproducible bundles."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.exporter.quantization.rotate import RotatedWeights
from llm_edge.exporter.results import Report
from llm_edge.exporter.validation import parity
from llm_edge.exporter.validation.independent import IndependentCheck
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.errors import ParityError

LAYERS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("prove") / "three", num_hidden_layers=LAYERS)


def exported(checkpoint: Path, output: Path, precisions: str = "int8") -> Report:
    return export(str(checkpoint), ExportOptions(output, precision=precisions))


def manifest(bundle: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return read


@pytest.fixture
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.shorten_texts(monkeypatch, 700)


@pytest.mark.usefixtures("short_text")
def test_a_quantized_bundle_is_compared_as_a_whole(checkpoint: Path, tmp_path: Path) -> None:
    report = exported(checkpoint, tmp_path / "bundle")
    assert report.validation is not None
    assert report.layers == LAYERS
    found = manifest(tmp_path / "bundle")
    assert found["validation"] == {"layers": LAYERS, "of": LAYERS}
    assert found["proof"]["fp32"].keys() == {"prefill", "steps", "chunk"}
    assert max(each["max"] for each in found["proof"]["fp32"].values()) < 1e-4
    assert found["proof"]["rotated"].keys() == {"prefill"}  # only this was compared
    assert {path.name for path in (tmp_path / "bundle").iterdir()}.isdisjoint({"check", "logits"})
    assert {path.name for path in (tmp_path / "bundle" / "onnx").iterdir()} == {
        "model_quantized.onnx",
        "model_quantized.onnx_data",
    }


@pytest.mark.usefixtures("short_text")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_an_error_in_any_layer_is_found(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int, precision: str
) -> None:
    """The reference has another weight than the graph in one layer."""
    load = Decoder.load_parameters
    name = f"layers.{layer}.mlp_norm.weight"

    def wrong(decoder: Decoder, weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        load(decoder, weights, names)
        if name in names and not isinstance(weights, RotatedWeights):
            decoder.get_parameter(name).data.mul_(1.05)

    monkeypatch.setattr(Decoder, "load_parameters", wrong)
    monkeypatch.setattr(parity, "compare_with_transformers", lambda *_: IndependentCheck(reason="not tested here"))
    with pytest.raises(ParityError, match="Nothing was written"):
        exported(checkpoint, tmp_path / "bundle", precision)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("short_text")
def test_a_large_unquantized_graph_runs_part_by_part_with_the_same_result(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exported(checkpoint, tmp_path / "whole", "fp32").validation
    monkeypatch.setattr(parity, "_WHOLE_BYTES", 0)
    parts = exported(checkpoint, tmp_path / "parts", "fp32").validation
    assert whole is not None
    assert parts is not None
    assert parts.parities["fp32"].within_bounds
    assert parts.qualities["fp32"].tokens == whole.qualities["fp32"].tokens
    assert parts.qualities["fp32"].perplexity == pytest.approx(whole.qualities["fp32"].perplexity, rel=1e-5)


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
