"""`llm-finetune check`."""

from __future__ import annotations

from pathlib import Path

import original
import pytest
from calling import call
from chat_data import write_rows

from llm_edge.finetune.cli import main


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(original.save_family(tmp_path_factory.mktemp("family") / "family").folder)


def test_check_lists_problems_duplicates_and_lengths(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        '{"data": ["Q", "<think>R</think>A"]}',
        "{",
        '{"data": ["Q", "<think>R</think>A"]}',
        '{"data": ["Q"]}',
        "[2]",
    ]
    data = write_rows(tmp_path / "data.jsonl", rows)
    code, out, err = call(main, capsys, "llm-finetune", "check", data, "--model", family)
    assert code == 2
    assert out.splitlines() == [
        f"{data}: 5 rows",
        "3 problems:",
        "  line 2: not valid JSON",
        "  line 4: data has an odd number of texts: give question and answer in turn",
        "  line 5: not a JSON object",
        "1 duplicate:",
        "  line 1 again: line 3",
        "2 samples, 14 tokens, 8 of them trained",
        "Tokens of a conversation (median 7, maximum 7):",
        f"       5 to      8        2  {'█' * 40}",
    ]
    assert err.startswith(f"error: {data}: 3 of 5 rows cannot be used: not valid JSON (line 2); data has")
    assert err.count("\n") == 1
    write_rows(data, rows[:1])
    assert call(main, capsys, "llm-finetune", "check", data, "--model", family)[0::2] == (0, "")


def test_check_shows_the_loss_mask_of_a_row(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "data.jsonl", ['{"data": ["Q\\u001b[2J", "<think>R</think>A"]}', "{"])
    words = ("llm-finetune", "check", data, "--model", family, "--row")
    code, out, _ = call(main, capsys, *words, 1)
    assert code == 0
    assert out.splitlines() == [
        "line 1, sample 1 of 1: 11 tokens, 4 of them trained",
        "--- not trained",
        "Q\\x1b[2J<|question_end|><|think_start|>",
        "--- trained",
        "R<|think_end|>A<|answer_end|>",
    ]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = call(main, capsys, *words, 1)[1]
    assert "\x1b[2mQ\\x1b[2J<|question_end|><|think_start|>\x1b[0m" in out
    assert "\x1b[32mR<|think_end|>A<|answer_end|>\x1b[0m" in out
    assert call(main, capsys, *words, 2)[0::2] == (2, f"error: {data}: line 2: not valid JSON\n")
    assert call(main, capsys, *words, 3)[0::2] == (2, f"error: {data}: line 3: no row there\n")


def test_check_counts_long_conversations_and_reads_the_evaluation_file(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = '{"data": ["Q", "<think>R</think>A", "' + "Q" * 30 + '", "A"]}'
    data, other = write_rows(tmp_path / "a.jsonl", [row]), write_rows(tmp_path / "b.jsonl", ["{"])
    words = ("llm-finetune", "check", data, "--model", family, "--max-length", "20")
    assert "1 cut after the last answer within 20 tokens" in call(main, capsys, *words)[1]
    assert "1 skipped, because they have more than 20 tokens" in call(main, capsys, *words, "--long", "skip")[1]
    code, out, err = call(main, capsys, *words, "--evaluation-data", other)
    assert code == 2
    assert f"{other}: 1 row\n1 problem:\n  line 1: not valid JSON\n" in out
    assert err == f"error: {other}: 1 of 1 rows cannot be used: not valid JSON (line 1)\n"


def test_a_model_that_cannot_be_opened_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "data.jsonl", ['{"data": ["Q", "A"]}'])
    code, _, err = call(main, capsys, "llm-finetune", "check", data, "--model", tmp_path / "none")
    assert code == 2
    assert err.count("\n") == 1
    assert "no such file or folder" in err
