"""Invalid inputs of `llm-finetune`: one line, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from calling import call
from safetensors.torch import load_file, save_file

from llm_edge.finetune.cli import main
from llm_edge.model.weights import Weights

GOOD = '{"data": ["Q", "A"]}\n'


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def with_nan(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def with_further_tokens(model: Path) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [{**token, "id": 320 + i, "content": f"<{i}>"} for i in range(200)]
    path.write_text(json.dumps(content), encoding="utf-8")


def without_end_token(model: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        edit_json(model / name, eos_token_id=None)
    path = model / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "eos_token"}), encoding="utf-8")


DATA = {
    "empty": ("", "has no rows: give one conversation per line"),
    "blank": ("\n\n", "has no rows"),
    "wrong JSON": (GOOD + '{"data": ["Q", "A"]', "1 of 2 rows cannot be used: not valid JSON (line 2)"),
    "array": ('[{"data": ["Q", "A"]}]', "is a JSON array: write one object per line"),
    "no object": ('"Q"\n', "not a JSON object (line 1)"),
    "unknown format": (
        '{"text": "Q"}\n',
        "unknown format: give messages, conversations, data, or prompt and completion",
    ),
    "roles": (
        '{"messages": [{"role": "assistant", "content": "A"}]}\n',
        "roles out of order: assistant first (line 1)",
    ),
    "no answer": (
        '{"messages": [{"role": "user", "content": "Q"}]}\n',
        "no answer: the last message is of the role user",
    ),
    "odd": ('{"data": ["Q"]}\n', "data has an odd number of texts"),
    "empty answer": ('{"data": ["Q", " "]}\n', "an answer is empty (line 1)"),
    "open reasoning": ('{"data": ["Q", "<think>A"]}\n', "an answer has <think> without </think> (line 1)"),
    "surrogate": ('{"data": ["Q", "\\ud800"]}\n', "a lone surrogate, which is not a character (line 1)"),
    "too long": (json.dumps({"data": ["Q" * 2000, "A"]}), "no conversation is left to train on"),
}


@pytest.mark.parametrize("name", DATA)
def test_an_unusable_data_file_is_one_line_before_any_weight_is_read(
    name: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Weights, "__getitem__", fail)
    content, message = DATA[name]
    data, output = tmp_path / "data.jsonl", tmp_path / "output"
    data.write_text(content, encoding="utf-8")
    code, out, err = call(main, capsys, "llm-finetune", tiny_checkpoint, data, "-o", output)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {data}")
    assert message in err
    assert not output.exists()


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "no such file or folder"),
    "no config": (lambda model: (model / "config.json").unlink(), "give the model's Hugging Face config with --config"),
    "NaN": (with_nan, "model.layers.1.mlp.up_proj.weight contains NaN or infinity: the checkpoint is damaged"),
    "vocabulary": (with_further_tokens, "use the tokenizer that belongs to the weights"),
    "end token": (without_end_token, "no token ends an answer: name it in generation_config.json (eos_token_id)"),
    "quantized": (
        lambda model: edit_json(model / "config.json", quantization_config={"quant_method": "hqq"}),
        "weights quantized by 'hqq' are not supported: give the model before quantization",
    ),
    "template": (
        lambda model: (model / "chat_template.jinja").write_text("{{ raise_exception('no') }}", encoding="utf-8"),
        "chat template: no (lines 1-2)",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_unusable_model_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = MODELS[name]
    model, data, output = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "output"
    tiny.save_checkpoint(model)
    damage(model)
    data.write_text(GOOD + GOOD.replace("A", "B"), encoding="utf-8")
    code, out, err = call(main, capsys, "llm-finetune", model, data, "-o", output)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume",), "has no checkpoint to resume: start without --resume"),
        (("--train-token", "<none>"), "'<none>' is not a token of the model"),
        (("--export", "--evaluation", "0"), "--export compares bundles on evaluation data"),
        (("--export", "--no-merge"), "--export needs the merged model: omit --no-merge"),
        (("--device", "tpu"), "--device is 'tpu'; it must be cpu or cuda"),
        (("--evaluation-data", "none.jsonl"), "none.jsonl: no such file: give a JSONL file"),
    ],
)
def test_an_unusable_option_is_one_line(
    options: tuple[str, ...], message: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "output"
    data.write_text(GOOD + GOOD.replace("A", "B"), encoding="utf-8")
    code, out, err = call(main, capsys, "llm-finetune", tiny_checkpoint, data, "-o", output, *options)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert not output.exists()


def test_an_output_folder_with_other_files_is_not_changed(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "output"
    data.write_text(GOOD + GOOD.replace("A", "B"), encoding="utf-8")
    output.mkdir()
    (output / "thesis.txt").write_text("mine", encoding="utf-8")
    code, _, err = call(main, capsys, "llm-finetune", tiny_checkpoint, data, "-o", output)
    assert (code, err.count("\n")) == (2, 1)
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]
    code, _, err = call(main, capsys, "llm-finetune", tiny_checkpoint, data, "-o", output / "thesis.txt")
    assert (code, err.count("\n")) == (2, 1)
    assert "exists and is not a folder: choose another one with -o" in err
