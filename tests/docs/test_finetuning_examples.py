"""The examples of fine-tuning: the data files they write, and the untrained model."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from chat_data import encoder_of, texts_of
from project import ROOT

from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.finetune.data.load import load_samples
from llm_edge.finetune.data.options import DataOptions


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    script = ROOT / "examples" / "arithmetic.py"
    subprocess.run([sys.executable, script, folder, "--rows", "500"], check=True, capture_output=True, timeout=120)
    return folder


def test_the_home_commands_are_what_the_program_writes() -> None:
    rows = example("home_commands").conversations(400, 0)
    text = (ROOT / "examples" / "home_commands.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == rows
    for row in rows:
        assert all(json.loads(message["content"]) for message in row["messages"][1::2])


def test_the_arithmetic_is_right() -> None:
    numbers = r"(\d+) ([+-]) (\d+)"
    for question, answer in example("arithmetic").rows(1000, 1):
        found = re.search(numbers, question)
        assert found is not None
        a, b = int(found[1]), int(found[3])
        result = a + b if found[2] == "+" else a - b
        reasoning, end, written = answer.partition("</think>")
        assert end
        assert int(written) == result
        for step in re.finditer(rf"{numbers} (?:([+-]) (\d+) )?= (\d+)", reasoning):
            terms = [int(step[1])] + [
                int(term) * (1 if sign == "+" else -1)
                for sign, term in ((step[2], step[3]), (step[4] or "+", step[5] or 0))
            ]
            assert sum(terms) == int(step[6])


def test_the_untrained_model_is_of_the_original_family(arithmetic: Path) -> None:
    checkpoint = open_checkpoint(str(arithmetic / "model"), SourceOptions(), lambda _: None)
    assert checkpoint.source.format != "GGUF"
    assert checkpoint.original is None  # Meta's names
    assert checkpoint.reasoning is not None
    assert (checkpoint.reasoning.start, checkpoint.reasoning.end) == (7, 8)
    assert checkpoint.generation["eos_token_id"] == [2]
    assert checkpoint.generation["do_sample"] is False
    encoder = encoder_of(arithmetic / "model")
    ((prompt, answer),) = texts_of(encoder, {"data": ["What is 47 + 85?", "<think>7 + 5 = 12</think>132"]})
    assert prompt == "What is 47 + 85?<|question_end|><|think_start|>"
    assert answer == "7 + 5 = 12<|think_end|>132<|answer_end|>"
    digits = encoder.prompts.tokenizer.encode("132")
    assert len(digits) == 3  # each digit is a token
    dataset = load_samples(arithmetic / "data.jsonl", encoder, DataOptions(max_length=128))
    assert (len(dataset.train), len(dataset.evaluation), dataset.duplicates) == (475, 25, 0)


def test_the_options_in_the_documentation_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from llm_edge.finetune.cli import app, check_app

    shown = ""
    for command in (app, check_app):
        with pytest.raises(SystemExit):
            command(["--help"])
        shown += capsys.readouterr().out
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if "llm-finetune " in line]
    options = {option for line in lines for option in re.findall(r" (--[a-z][a-z-]+)", line)}
    options |= set(re.findall(r"`(--(?!apply)[a-z][a-z-]+)", text))
    assert len(options) > 15
    assert [option for option in sorted(options) if option not in shown] == []
