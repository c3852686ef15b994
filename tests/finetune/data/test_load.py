"""Data files: every problem in one message, duplicates, and the split into training and evaluation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from chat_data import encoder_of, random_rows, write_rows

from llm_edge.finetune.data.encoding import ConversationEncoder
from llm_edge.finetune.data.load import load_samples, read_data
from llm_edge.finetune.data.options import DataOptions, LongConversations
from llm_edge.runtime.errors import InputError

FAULTS = [
    "{",
    "[1]",
    '{"text": "Q"}',
    '{"messages": []}',
    '{"data": ["Q", "A", "Q"]}',
    '{"data": ["Q", ""]}',
    '{"messages": [{"role": "assistant", "content": "A"}]}',
    '{"messages": [{"role": "user", "content": "Q"}]}',
    '{"data": ["Q", "<think>R"]}',
    '{"data": ["Q", "\\ud800"]}',
]


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> ConversationEncoder:
    return encoder_of(tiny_checkpoint)


def test_17_duplicates_are_counted_and_never_in_both_splits(encoder: ConversationEncoder, tmp_path: Path) -> None:
    rows = [{"data": [f"question {i % 10}", f"answer {i % 10}"]} for i in range(1050)]
    data = write_rows(tmp_path / "tech_support.jsonl", rows)
    for seed in range(5):
        dataset = load_samples(data, encoder, DataOptions(evaluation=0.2, split_seed=seed))
        assert (dataset.conversations, dataset.duplicates) == (1050, 1040)
        assert len(dataset.evaluation) == 2
        assert len(dataset.train) == 8 * 105
        assert not {sample.ids for sample in dataset.train} & {sample.ids for sample in dataset.evaluation}


def test_18_one_message_names_every_faulty_line(encoder: ConversationEncoder, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [FAULTS[i % 10] if i else '{"data": ["Q", "A"]}' for i in range(1001)])
    with pytest.raises(InputError) as caught:
        load_samples(data, encoder, DataOptions())
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert "1,000 of 1,001 rows cannot be used" in message
    named = [int(number) for lines in re.findall(r"\(lines ([\d, ]+)\)", message) for number in lines.split(", ")]
    assert sorted(named) == list(range(2, 1002))
    assert message.count(" (lines ") == len(FAULTS)


def test_a_message_names_ranges_of_lines_and_counts_what_it_leaves_out(
    encoder: ConversationEncoder, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "data.jsonl", ["{"] * 3000)
    with pytest.raises(InputError, match=r"3,000 of 3,000 rows .* not valid JSON \(lines 1-2000\); and 1,000 more"):
        load_samples(data, encoder, DataOptions())


def test_lines_count_blank_ones_and_a_byte_order_mark_is_ignored(encoder: ConversationEncoder, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"data": ["Q", "A"]}\r\n\n  \n{"data": ["Q", "B"]}\n\xff\n')
    file = read_data(path, encoder, LongConversations.CUT)
    assert [row.line for row in file.rows] == [1, 4]
    assert [(problem.line, problem.reason) for problem in file.problems] == [(5, "not UTF-8 text")]
    assert file.rows[1].samples[0].line == 4


def test_deep_and_wide_json_are_problems_of_their_rows(encoder: ConversationEncoder, tmp_path: Path) -> None:
    rows = ['{"data": ' + "[" * 100_000, f'{{"data": ["Q", "A"], "n": {"9" * 10_000}}}']
    file = read_data(write_rows(tmp_path / "data.jsonl", rows), encoder, LongConversations.CUT)
    assert [problem.reason for problem in file.problems] == ["JSON nested too deeply", "not valid JSON"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ('[{"data": ["Q", "A"]}]', "is a JSON array: write one object per line"),
    ],
)
def test_a_file_without_rows_is_refused(
    content: str | None, message: str, encoder: ConversationEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_samples(path, encoder, DataOptions())
    with pytest.raises(InputError, match="not a file"):
        load_samples(tmp_path, encoder, DataOptions())


def test_the_split_depends_on_content_and_seed_alone(encoder: ConversationEncoder, tmp_path: Path) -> None:
    rows = random_rows(60, 5, reasoning=False)

    def chosen(name: str, options: DataOptions, *, backwards: bool = False) -> set[tuple[int, ...]]:
        data = write_rows(tmp_path / name, reversed(rows) if backwards else rows)
        dataset = load_samples(data, encoder, options)
        assert len(dataset.train) + len(dataset.evaluation) == 60
        return {sample.ids for sample in dataset.evaluation}

    options = DataOptions(evaluation=0.1)
    assert chosen("a", options) == chosen("b", options, backwards=True)
    assert len(chosen("a", options)) == 6
    assert chosen("a", options) != chosen("a", DataOptions(evaluation=0.1, split_seed=1))
    assert not chosen("a", DataOptions(evaluation=0))
    assert len(chosen("a", DataOptions(evaluation=0.001))) == 1


def test_rows_of_a_separate_evaluation_file_are_not_trained(encoder: ConversationEncoder, tmp_path: Path) -> None:
    rows = [{"data": [f"Q{i}", "A"]} for i in range(8)]
    data, evaluation = write_rows(tmp_path / "a", rows[:6]), write_rows(tmp_path / "b", rows[4:] * 2)
    dataset = load_samples(data, encoder, DataOptions(evaluation_data=evaluation))
    assert (len(dataset.train), len(dataset.evaluation)) == (4, 4)
    assert dataset.notes == (f"2 rows of {data} are not trained, because {evaluation} has them too.",)
    write_rows(evaluation, ["{"])
    with pytest.raises(InputError, match=f"{evaluation}: 1 of 1 rows"):
        load_samples(data, encoder, DataOptions(evaluation_data=evaluation))


def test_long_conversations_are_cut_or_skipped_and_counted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"data": ["Q", "A"]}, {"data": ["Q", "B", "Q" * 30, "B"]}, {"data": ["Q" * 90, "C"]}]
    data, encoder = write_rows(tmp_path / "data.jsonl", rows), encoder_of(tiny_checkpoint, 40)
    cut = load_samples(data, encoder, DataOptions(evaluation=0))
    assert (len(cut.train), cut.cut, cut.skipped) == (2, 1, 1)
    skipped = load_samples(data, encoder, DataOptions(evaluation=0, long=LongConversations.SKIP))
    assert (len(skipped.train), skipped.cut, skipped.skipped) == (1, 0, 2)
    with pytest.raises(
        InputError, match=r"\(3 of 3 have more than 8 tokens, 0 are for evaluation\): raise --max-length"
    ):
        load_samples(data, encoder_of(tiny_checkpoint, 8), DataOptions())


def test_reasoning_that_is_trained_as_text_is_noted(encoder: ConversationEncoder, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"data": ["Q", "<think>R</think>A"]}])
    (note,) = load_samples(data, encoder, DataOptions()).notes
    assert "as text between <think> and </think>" in note
