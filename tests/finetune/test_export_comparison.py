"""`--export`: the bundle of the trained model next to that of the model before training."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
from calling import call
from chat_data import encoder_of, samples_of, write_rows

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.finetune import export_comparison
from llm_edge.finetune.cli import main
from llm_edge.finetune.data.sample import Sample
from llm_edge.finetune.export_comparison import export_and_compare, measure, print_comparison
from llm_edge.runtime import Model, SamplingParams
from llm_edge.runtime.errors import InputError


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bundles of two models with one tokenizer."""
    folder = tmp_path_factory.mktemp("bundles")
    with pytest.MonkeyPatch.context() as patch:
        tiny.shorten_texts(patch, 64)
        other = tiny.save_checkpoint(folder / "model", seed=1)
        export(str(other), ExportOptions(folder / "bundle", precision="int8,int4", validate=False))
    return [tiny_bundle, folder / "bundle"]


@pytest.fixture(scope="module")
def samples(tiny_checkpoint: Path) -> list[Sample]:
    encoder = encoder_of(tiny_checkpoint)
    rows = [["What is the capital?", "Paris"], ["Hello", "world"], ["def", "x" * 60]]
    return [sample for row in rows for sample in samples_of(encoder, {"data": row})]


def exported_as(patch: pytest.MonkeyPatch, bundles: dict[str, Path]) -> None:
    """Replace llm-export by copies of finished bundles, by source."""

    def copy(source: Sequence[str], bundle: Path, _validate: str) -> None:
        shutil.copytree(bundles[source[-1]], bundle)

    patch.setattr(export_comparison, "_export", copy)


def test_loss_is_the_mean_cross_entropy_of_the_answers(bundles: list[Path], samples: list[Sample]) -> None:
    quality = measure(bundles[0], "int8", samples)
    model = Model.load(bundles[0], "int8")
    logprobs = [
        logprob
        for sample in samples
        for logprob in model.score(sample.ids).logprobs[len(sample.prompt) - 1 :]  # of the answer
    ]
    assert len(logprobs) == sum(sample.targets for sample in samples)
    assert math.isclose(quality.loss, -math.fsum(logprobs) / len(logprobs), rel_tol=1e-9)
    assert (quality.matches, quality.short) == (0, 2)
    assert len(quality.answers) == 3


def test_short_answers_that_are_generated_exactly_are_counted(bundles: list[Path], samples: list[Sample]) -> None:
    model = Model.load(bundles[0], "int8")
    sample = samples[0]
    generated = model.generate(sample.prompt, SamplingParams(temperature=0.0, max_tokens=4)).result()
    ids = (*sample.prompt, *generated.tokens, sample.ids[-1])
    learned = Sample(ids, (False,) * len(sample.prompt) + (True,) * (len(ids) - len(sample.prompt)), 1)
    text = model.tokenizer.decode(generated.tokens).strip()
    expected = export_comparison.measure(bundles[0], "int8", [learned])
    assert expected.short == 1
    assert expected.answers[0].startswith(text)
    assert expected.matches == (expected.answers[0] == text)


def test_a_better_bundle_is_kept_and_a_worse_one_set_apart(
    bundles: list[Path],
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    worse, better = sorted(bundles, key=lambda bundle: -sum(measure(bundle, p, samples).loss for p in ("int8", "int4")))
    trained = tmp_path / "trained"
    trained.mkdir()
    exported_as(monkeypatch, {"start": worse, str(trained): better})
    lines: list[str] = []
    found = export_and_compare(["start"], trained, samples, lines.append)
    assert found.worse == ()
    assert found.bundle == trained / "bundle"
    assert (found.bundle / "manifest.json").is_file()
    assert found.after["int8"].loss < found.before["int8"].loss
    assert lines[0] == "exporting and verifying the trained model (int8, int4)"
    print_comparison(found)
    out = capsys.readouterr().out
    assert f"{found.before['int8'].loss:.4f}" in out
    assert "question       <|im_start|>user\\nWhat is the capital?" in out
    assert "expected       Paris" in out
    assert f"Try: llm-chat {found.bundle}" in out

    exported_as(monkeypatch, {"start": better, str(trained): worse})
    found = export_and_compare(["start"], trained, samples, lines.append)
    assert "int8" in found.worse
    assert sorted(path.name for path in trained.iterdir()) == ["bundle", "bundle-worse", "comparison.json"]
    assert (trained / "bundle" / "manifest.json").read_bytes() == (better / "manifest.json").read_bytes()
    content = json.loads((trained / "comparison.json").read_text(encoding="utf-8"))
    assert content["bundle"] == "bundle-worse"
    assert content["after"]["int8"]["loss"] == found.after["int8"].loss
    print_comparison(found)
    assert "Try:" not in capsys.readouterr().out


def test_the_command_compares_what_it_trained(
    bundles: list[Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"data": [f"Q{i}", "A"]} for i in range(6)]
    data, trained = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "trained"
    exported_as(monkeypatch, {str(tiny_checkpoint): bundles[0], str(trained): bundles[1]})
    options = ("-o", trained, "--steps", "1", "--threads", "1", "--export")
    code, out, err = call(main, capsys, "llm-finetune", tiny_checkpoint, data, *options)
    comparison = json.loads((trained / "comparison.json").read_text(encoding="utf-8"))
    worse = " and ".join(comparison["worse"])
    expected = f"error: the trained bundle is worse in {worse}: it is kept in {trained / 'bundle-worse'}"
    assert code == bool(worse)
    assert (expected == err.splitlines()[-1]) == bool(worse)
    assert "comparing on 1 evaluation samples: int4" in err
    assert re.search(r"int8 +\d\.\d{4} +\d\.\d{4} +\d of 1 +\d of 1\n", out)
    assert {"adapter", "comparison.json", "model.safetensors"} < {path.name for path in trained.iterdir()}


def test_a_failed_export_is_one_line_and_leaves_the_earlier_bundle(samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / ".comparison-killed" / "new").mkdir(parents=True)
    with pytest.raises(InputError, match=f"llm-export failed for {tmp_path}: .*has no config.json"):
        export_and_compare(["start"], tmp_path, samples, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
