"""Samples: prompt and answer."""

from __future__ import annotations

from llm_edge.finetune.data.sample import Sample


def test_a_sample_of_two_answers_ends_with_the_second() -> None:
    sample = Sample((1, 2, 3, 4, 5, 6), (False, True, True, False, True, True), line=1)
    assert sample.prompt == (1, 2, 3, 4)
    assert sample.answer == (5, 6)
    assert sample.targets == 4
