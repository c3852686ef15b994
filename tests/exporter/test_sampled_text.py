"""Text that a model generates: it follows the prompts, ends at end tokens, and has the model's distribution."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.sampled_text import can_sample, sample_text
from llm_edge.exporter.validation.reference import reference_logits


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return read_folder(tiny_checkpoint)


def test_prompts_of_unequal_length_are_continued(checkpoint: Checkpoint) -> None:
    prompts = [(5,), (7, 8, 9), (4, 6)]
    found = sample_text(checkpoint.config, checkpoint.weights, prompts, 6)
    assert [tokens[: len(prompt)] for tokens, prompt in zip(found, prompts, strict=True)] == prompts
    assert [len(tokens) for tokens in found] == [7, 9, 8]


def test_tokens_have_the_models_distribution(checkpoint: Checkpoint) -> None:
    prompts = [(5,), (7, 8, 9)] * 600  # unequal, so that the shorter is padded
    found = sample_text(checkpoint.config, checkpoint.weights, prompts, 2)
    for prompt in prompts[:2]:
        drawn = Counter(tokens[len(prompt)] for tokens in found if tokens[: len(prompt)] == prompt)
        expected = reference_logits(checkpoint.config, checkpoint.weights, prompt)[-1].softmax(-1)
        best = expected.topk(5)
        for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            assert drawn[token] / 600 == pytest.approx(probability, abs=0.08)
    second = [tokens for tokens in found if len(tokens) == 5]
    likely = [
        reference_logits(checkpoint.config, checkpoint.weights, tokens[:4])[-1].softmax(-1)[tokens[4]]
        for tokens in second[:50]
    ]
    assert torch.stack(likely).mean() > 1 / checkpoint.config.vocab_size


def test_a_sequence_ends_after_an_end_token(checkpoint: Checkpoint) -> None:
    ((*_, end),) = sample_text(checkpoint.config, checkpoint.weights, [(5,)], 3)
    (whole,) = sample_text(checkpoint.config, checkpoint.weights, [(5,)], 10)
    (cut,) = sample_text(checkpoint.config, checkpoint.weights, [(5,)], 10, {end})
    assert cut == whole[: whole.index(end, 1) + 1]


def test_the_number_of_cores_does_not_change_the_tokens(checkpoint: Checkpoint) -> None:
    prompts = [(number,) for number in range(3, 33)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(sample_text(checkpoint.config, checkpoint.weights, prompts, 5))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_only_small_models_generate_text(checkpoint: Checkpoint) -> None:
    assert can_sample(checkpoint.config)
    assert not can_sample(dataclasses.replace(checkpoint.config, vocab_size=1 << 21, hidden_size=512))
