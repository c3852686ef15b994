"""`--target-size`, `--target-bpw` and `--target-kl`: the precision `mixed`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.shorten_texts(monkeypatch, 300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for weights to outweigh the graph."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny.save_checkpoint(tmp_path_factory.mktemp("targets") / "model", **shape)


def precision(bundle: Path, name: str = "mixed") -> Any:
    return json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["precisions"][name]


HADAMARD_BYTES = 4 * 64 * 64  # shared by all layers; not counted, because only a tiny model notices


def size(bundle: Path) -> int:
    return sum(path.stat().st_size for path in (bundle / "onnx").glob("model_mixed.onnx*"))


def estimated(entry: Any) -> float:
    return sum(float(it.get("divergence", 0)) for it in entry["projections"].values())


def test_a_size_is_kept_and_a_larger_one_is_more_faithful(checkpoint: Path, tmp_path: Path, llm_export: Run) -> None:
    found = []
    for megabytes in (0.42, 0.55):
        out = tmp_path / str(megabytes)
        code, text, _ = llm_export(checkpoint, "-o", out, "--target-size", megabytes, "--no-validate")
        assert code == 0
        assert "mixed" in text
        assert size(out) <= 1.02 * megabytes * 1e6 + HADAMARD_BYTES
        found.append(precision(out))
    assert found[0]["recipe"] == "the most faithful mix of 0.42 MB; rotated and calibrated"
    assert estimated(found[1]) < estimated(found[0])


def test_bits_per_weight_count_all_files(checkpoint: Path, tmp_path: Path, llm_export: Run) -> None:
    out = tmp_path / "out"
    assert llm_export(checkpoint, "-o", out, "--target-bpw", 7, "--precision", "fp32", "--no-validate")[0] == 0
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert list(manifest["precisions"]) == ["fp32", "mixed"]
    assert 8 * (size(out) - HADAMARD_BYTES) <= 1.02 * 7 * manifest["model"]["parameters"]


def test_a_divergence_is_reached_in_the_smallest_size(checkpoint: Path, tmp_path: Path, llm_export: Run) -> None:
    assert llm_export(checkpoint, "-o", tmp_path / "first", "--target-kl", 1, "--no-validate")[0] == 0
    largest, *_, least = [point["divergence"] for point in precision(tmp_path / "first")["frontier"]]
    entries = []
    for divergence in (largest / 3, least * 2):
        out = tmp_path / str(divergence)
        assert llm_export(checkpoint, "-o", out, "--target-kl", divergence, "--no-validate")[0] == 0
        entries.append((size(out), precision(out)))
        assert estimated(entries[-1][1]) <= divergence
    assert entries[0][0] < entries[1][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-size", 1, "--target-kl", 0.1), "--target-size and --target-kl exclude each other"),
        (("--target-bpw", 0), "--target-bpw 0 is not a positive number"),
        (("--target-kl", "nan"), "--target-kl nan is not a positive number"),
        (("--target-size", "nan"), "--target-size nan is not a positive number"),
        (("--target-size", "inf"), "--target-size inf is not a positive number"),
        (("--target-size", 0.01), "--target-size is too small: the smallest mix of formats takes"),
        (("--target-bpw", 2), "--target-bpw is too small: the smallest mix of formats takes"),
        (("--target-bpw", 4.6), "--target-bpw is too small: the smallest mix of formats takes"),
        (("--target-kl", 1e-15), "--target-kl is too small: the most faithful mix of formats has"),
        (("--target-size", 1, "--format", "torchscript"), "--format torchscript supports fp32 only, not mixed"),
    ],
)
def test_targets_that_cannot_be_reached_are_refused_in_one_line(
    options: tuple[object, ...], message: str, checkpoint: Path, tmp_path: Path, llm_export: Run
) -> None:
    code, _, errors = llm_export(checkpoint, "-o", tmp_path / "out", *options, "--no-validate")
    assert code == 2
    assert message in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
