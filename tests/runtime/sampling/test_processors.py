"""`ReasoningBudget`: the logits processor that limits the number of reasoning tokens."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from llm_edge.runtime.bundle import ReasoningTokens
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.processors import ReasoningBudget
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.sampling.transforms import Row
from llm_edge.runtime.text.reasoning_parser import ReasoningDelimiters, ReasoningParser, reasoning_parser
from llm_edge.runtime.text.tokenizer import Tokenizer

START, END, EOS, SIZE = 3, 4, 5, 40


def make_parser(prompt: list[int]) -> ReasoningParser:
    """The parser of an answer whose reasoning is delimited by two tokens."""
    tokenizer = Tokenizer(tiny.tokenizer(), {}, None)
    return reasoning_parser(ReasoningDelimiters(ReasoningTokens(START, END), tokenizer), tokenizer, prompt)


def answer(budget: int, prompt: list[int], *, weights: dict[int, float], count: int = 60) -> list[int]:
    """Sample from random logits with a bias for some tokens."""
    random, parser = np.random.default_rng(1), make_parser(prompt)
    sampler = Sampler(SamplingParams(seed=1), prompt, [ReasoningBudget(parser, [END], budget)])
    for _ in range(count):
        row = random.standard_normal(SIZE).astype(np.float32)
        for token, weight in weights.items():
            row[token] += weight
        parser.push(sampler.sample(row))
    return list(sampler.generated)


@pytest.mark.parametrize("budget", [0, 1, 7, 59])
def test_reasoning_opened_by_the_prompt_ends_after_its_budget(budget: int) -> None:
    tokens = answer(budget, [1, START, 9, 9, 9], weights={END: -99, START: -99, EOS: -99})
    assert tokens.index(END) == budget
    assert tokens.count(END) == 1  # afterwards all tokens are allowed again


def test_the_budget_covers_all_reasoning_sections_of_an_answer() -> None:
    tokens = answer(5, [1, 2], weights={START: 3, END: -99, EOS: -99}, count=300)
    spent, reasoning = 0, False
    for token in tokens:
        if token in (START, END):
            assert token == START or spent == 5
            reasoning = token == START
        elif reasoning:
            spent += 1
    assert spent == 5
    assert tokens.count(END) > 5
    assert all(tokens[i + 1] == END for i, token in enumerate(tokens[:-1]) if token == START and END in tokens[:i])


def test_reasoning_may_end_before_its_budget() -> None:
    rows = [np.random.default_rng(n).standard_normal(SIZE).astype(np.float32) for n in range(4)]
    parser, tokens = make_parser([START]), [START]
    guard = ReasoningBudget(parser, [END], 3)
    for row, token in zip(rows, (9, END, 9, 9), strict=True):
        assert guard(row, tokens) is row
        tokens.append(token)
        parser.push(token)


def test_tokens_pushed_together_count_like_single_ones() -> None:
    row: Row = np.zeros(SIZE, np.float32)
    for tokens, forced in (([START, 9, 9], True), ([START, 9], False), ([START, START, 9, 9], True)):
        parser = make_parser([1, 2])
        guard = ReasoningBudget(parser, [END], 2)
        assert guard(row, [1, 2]) is row
        for token in tokens:
            parser.push(token)
        after = guard(row, [1, 2, *tokens])
        assert np.flatnonzero(np.isfinite(after)).tolist() == ([END] if forced else list(range(SIZE)))
    assert not row.any()
