"""`Model.score`: log-probabilities match transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_edge.runtime import FinishReason, Model, SamplingParams
from llm_edge.runtime.backend.limits import PREFILL_CHUNK
from llm_edge.runtime.errors import ContextLengthError, LogitsError, ParameterError
from llm_edge.runtime.score import scored

TEXT = "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris, of course! "
GREEDY = SamplingParams(temperature=0, repetition_penalty=10, repetition_window=-1, max_tokens=20)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return Model.load(tiny_bundle, "fp32", provider="cpu", threads=1)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")


@pytest.mark.parametrize(
    "length", [2, 3, 17, PREFILL_CHUNK, PREFILL_CHUNK + 1, PREFILL_CHUNK + 2, 2 * PREFILL_CHUNK + 1, 700, 1024]
)
def test_log_probabilities_match_transformers(model: Model, reference: Any, length: int) -> None:
    import torch

    ids = (model.tokenizer.encode(TEXT) * 40)[:length]
    assert len(ids) == length
    with torch.no_grad():
        rows = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), dim=-1)
    wanted = rows[torch.arange(length - 1), ids[1:]].numpy()
    score = model.score(ids)
    assert score.tokens == tuple(ids)
    np.testing.assert_allclose(score.logprobs, wanted, atol=2e-5)
    assert score.total == pytest.approx(wanted.sum(), abs=1e-2)
    assert score.perplexity == pytest.approx(math.exp(-wanted.mean()), rel=1e-4)


def test_a_text_and_its_tokens_have_the_same_score(model: Model) -> None:
    score = model.score(TEXT)
    assert score.tokens == tuple(model.tokenizer.encode(TEXT))
    assert score == model.score(list(score.tokens))
    spelled = "Hi<|im_end|>"  # stays text
    assert 2 not in model.score(spelled).tokens


def test_the_greedy_token_has_the_highest_score(model: Model) -> None:
    prompt = model.tokenizer.encode(TEXT)
    (taken,) = model.generate(prompt, SamplingParams(temperature=0, max_tokens=1)).result().tokens
    found = {token: model.score([*prompt, token]).logprobs[-1] for token in range(0, 331, 3)} | {
        taken: model.score([*prompt, taken]).logprobs[-1]
    }
    assert max(found, key=found.__getitem__) == taken


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_other_precisions_score_similarly(tiny_bundle: Path, model: Model, precision: str) -> None:
    score = Model.load(tiny_bundle, precision, provider="cpu", threads=1).score(TEXT)
    assert score.logprobs != model.score(TEXT).logprobs
    assert score.perplexity == pytest.approx(model.score(TEXT).perplexity, rel=0.05)


def test_scoring_and_generating_do_not_affect_each_other(model: Model) -> None:
    wanted, score = model.generate(TEXT, GREEDY).result(), model.score(TEXT)
    running = model.generate(TEXT, GREEDY)
    next(iter(running))
    assert model.score(TEXT) == score
    assert running.result().finish_reason is FinishReason.CANCELLED
    again = model.generate(TEXT, GREEDY).result()
    assert (again.tokens, again.timings.cached_tokens) == (wanted.tokens, 0)


@pytest.mark.parametrize("text", ["", [], [5], "a"])
def test_texts_too_short_to_score_are_rejected(model: Model, text: Any) -> None:
    with pytest.raises(ParameterError, match=r"^[^\n]*(empty|fewer than two tokens)[^\n]*$"):
        model.score(text)


def test_invalid_inputs_are_rejected(model: Model) -> None:
    with pytest.raises(ParameterError, match="outside the vocabulary"):
        model.score([5, 331])
    with pytest.raises(ContextLengthError) as refused:
        model.score([5] * 1025)
    assert (refused.value.prompt_tokens, "1025" in str(refused.value)) == (1025, True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_logits_are_an_error(value: float) -> None:
    with pytest.raises(LogitsError, match=r"^[^\n]+$"), np.errstate(all="ignore"):
        scored([1, 2, 3], lambda part: np.full((len(part), 9), value, np.float32))


def test_an_extremely_improbable_text_has_a_finite_perplexity() -> None:
    def step(part: Any) -> Any:
        logits = np.zeros((len(part), 4), np.float32)
        logits[:, 0] = 3000
        return logits

    score = scored([1, 2, 3], step)
    assert score.logprobs == (-3000.0, -3000.0)
    assert math.isfinite(score.perplexity)
