"""Windows of the validation text, and the runs over them."""

from __future__ import annotations

import pytest
import tiny

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.texts import Window, split_windows
from llm_edge.exporter.validation import windows as windows_module
from llm_edge.exporter.validation.windows import cached_run, scoring_runs, select_windows
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import count_parameters


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_folder(tiny.save_checkpoint(tmp_path_factory.mktemp("windows") / "model")).config


def text(length: int, kind: str = "text") -> Window:
    return Window(tuple(range(length)), kind)


def test_a_text_is_split_at_the_length_of_a_step_or_of_the_context() -> None:
    tokens = list(range(1100))
    assert [len(window.tokens) for window in split_windows(tokens, 512)] == [512, 512, 76]
    assert [len(window.tokens) for window in split_windows(tokens, 100)] == [100] * 11
    joined = [token for window in split_windows(tokens, 100) for token in window.tokens]
    assert joined == tokens


def test_a_single_token_at_the_end_is_left_out_because_nothing_follows_it() -> None:
    assert [len(window.tokens) for window in split_windows(range(513), 512)] == [512]
    assert [window.tokens for window in split_windows([7], 512)] == [(7,)]


def test_each_kind_of_text_has_its_share_if_not_all_of_it_is_scored(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows_module, "_MAX_PRODUCTS", 0)
    given = [*[text(512, "prose")] * 8, *[text(512, "code")] * 3, text(100, "chat")]
    chosen = select_windows(given, config.vocab_size, count_parameters(config))
    assert [window.kind for window in chosen] == ["prose", "prose", "code", "code", "chat"]


def test_two_windows_are_scored_however_large_the_vocabulary_is() -> None:
    assert select_windows([text(512)] * 3, vocab_size=4_000_000, parameters=1_000_000) == [text(512)] * 2


def test_windows_are_processed_in_steps_with_logits_of_limited_size() -> None:
    runs = scoring_runs([text(512), text(300)], 262_144)
    assert [[len(chunk) for chunk in run.chunks] for run in runs] == [[128] * 4, [128, 128, 44]]
    assert [run.offset for run in runs] == [0, 512]
    assert [start for start, _ in runs[1].starts()] == [512, 640, 768]
    assert [len(run.chunks) for run in scoring_runs([text(512)], 49_152)] == [1]


@pytest.mark.parametrize(
    ("length", "chunks"),
    [(512, [128, *[1] * 16, 112]), (40, [20, *[1] * 16, 4]), (4, [2, 1, 1]), (3, [1, 1, 1]), (2, [1, 1]), (1, [1])],
)
def test_the_cached_run_has_a_prompt_single_tokens_and_the_rest(length: int, chunks: list[int]) -> None:
    run = cached_run(text(length))
    assert [len(chunk) for chunk in run.chunks] == chunks
    assert run.tokens == tuple(range(min(length, 256)))


def test_the_cached_run_stays_within_the_length_at_which_rotary_angles_change() -> None:
    assert len(cached_run(text(512), limits=[24, 100]).tokens) == 24
