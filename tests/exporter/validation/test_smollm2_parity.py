"""The default model end to end: transformers reading the GGUF, our reference and the fp32 bundle agree.

transformers reads, dequantizes and un-permutes the GGUF itself, so the comparison is independent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from project import DATA
from sessions import open_file
from torch import Tensor

from llm_edge.checkpoint.gguf.checkpoint import read_gguf
from llm_edge.model.decoder import Decoder
from llm_edge.runtime import Bundle, FinishReason, Model, SamplingParams
from llm_edge.runtime.backend.limits import MAX_STEP_TOKENS
from llm_edge.runtime.backend.session import Session

pytestmark = pytest.mark.slow

TEXT = DATA / "validation" / "prose.txt"
LENGTHS = (1, 2, 17, 512, 2000)
NEW_TOKENS = 128
QUESTIONS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain step by step how a bicycle stays upright.",
    "def fibonacci(n):",
    "List ten things to pack for a week in the mountains, with a reason for each.",
)
PROMPTS = tuple(f"question {number}" for number in range(5)) + tuple(f"text {number}" for number in range(15))

Prompt = Callable[[int], list[int]]
Reference = Callable[[tuple[int, ...]], Tensor]


@pytest.fixture(scope="module")
def model(smollm2_bundle: Path) -> Model:
    return Model.load(
        smollm2_bundle, "fp32", provider="cpu", threads=1
    )  # other tests run in parallel, and idle threads spin


@pytest.fixture(scope="module")
def text(model: Model) -> list[int]:
    return model.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)


@pytest.fixture(scope="module")
def prompt(text: list[int]) -> Prompt:
    """A part of the text; each length starts at another position."""
    return lambda length: text[37 * length % (len(text) - length) :][:length]


@pytest.fixture(scope="module")
def decoder(smollm2_file: Path) -> Decoder:
    checkpoint = read_gguf(smollm2_file)
    with torch.device("meta"):
        made = Decoder(checkpoint.config).eval()
    made.load_weights(checkpoint.weights)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def reference(decoder: Decoder) -> Reference:
    """Logits [S, V] of our reference in a single step; results are cached."""

    @functools.cache
    def logits(tokens: tuple[int, ...]) -> Tensor:
        return in_chunks(decoder, tokens, [len(tokens)])

    return logits


@pytest.fixture(scope="module")
def theirs(smollm2_file: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32)
    return loaded.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def session(smollm2_bundle: Path) -> Session:
    bundle = Bundle.open(smollm2_bundle)
    info = bundle.precision("fp32")
    return open_file(bundle.file(info.model), bundle.shape, info.share_buffer, provider="cpu", spinning=False)


def in_chunks(decoder: Decoder, tokens: Sequence[int], chunks: Sequence[int]) -> Tensor:
    """Logits [S, V] of our reference, computed in chunks."""
    past, done, logits = decoder.empty_past(), 0, []
    for size in chunks:
        ids = torch.tensor([tokens[done : done + size]])
        done += size
        chunk_logits, past = decoder(ids, torch.ones(1, done, dtype=torch.int64), past)
        logits.append(chunk_logits[0])
    assert done == len(tokens)
    return torch.cat(logits)


def expect(theirs: Any, tokens: Sequence[int], chunks: Sequence[int] | None = None) -> Tensor:
    """transformers' logits [S, V]: in a single step without a cache, or in chunks with its own cache."""
    if chunks is None:
        whole: Tensor = theirs(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return whole
    cache, done, logits = None, 0, []
    for size in chunks:
        made = theirs(input_ids=torch.tensor([tokens[done : done + size]]), past_key_values=cache, use_cache=True)
        cache, done = made.past_key_values, done + size
        logits.append(made.logits[0])
    return torch.cat(logits)


def assert_close(found: Any, wanted: Tensor, largest: float, mean: float) -> None:
    """Fail if logits differ by more than the bounds."""
    found = torch.as_tensor(found)
    assert found.shape == wanted.shape
    difference = (found - wanted).abs()
    assert difference.max() <= largest  # False for NaN
    assert difference.mean() <= mean


# ---- our reference matches transformers reading the same file


@pytest.mark.parametrize("length", LENGTHS)
def test_the_reference_matches_transformers(reference: Reference, theirs: Any, prompt: Prompt, length: int) -> None:
    tokens = prompt(length)
    assert_close(reference(tuple(tokens)), expect(theirs, tokens), 1e-4, 1e-5)


@pytest.mark.parametrize(
    "chunks", [[1] * 17, [9, 8], [300, 1, 1, 210], [512, 88]], ids=["steps", "two", "mixed", "chunks"]
)
def test_the_reference_in_chunks_matches_transformers(
    decoder: Decoder, theirs: Any, prompt: Prompt, chunks: list[int]
) -> None:
    tokens = prompt(sum(chunks))
    assert_close(in_chunks(decoder, tokens, chunks), expect(theirs, tokens, chunks), 1e-4, 1e-5)


# ---- the fp32 graph matches the reference


def assert_session(session: Session, reference: Reference, tokens: list[int], chunks: Sequence[int]) -> None:
    wanted = reference(tuple(tokens))
    session.clear_cache()
    done = 0
    for size in chunks:
        logits = session.step(tokens[done : done + size], num_logits=0)
        assert_close(logits, wanted[done : done + size], 1e-3, 1e-4)
        done += size
    assert done == len(tokens)


@pytest.mark.parametrize("length", [1, 2, 17, MAX_STEP_TOKENS])
def test_a_single_step_matches_the_reference(
    session: Session, reference: Reference, prompt: Prompt, length: int
) -> None:
    assert_session(session, reference, prompt(length), [length])


@pytest.mark.parametrize(
    "chunks",
    [[1, 1], [5, 12], [100, 1, 255, 156], [MAX_STEP_TOKENS, MAX_STEP_TOKENS, MAX_STEP_TOKENS, 464]],
    ids=["1+1", "5+12", "uneven", "2000 by 512"],
)
def test_chunks_match_the_reference(session: Session, reference: Reference, prompt: Prompt, chunks: list[int]) -> None:
    assert_session(session, reference, prompt(sum(chunks)), chunks)


@pytest.mark.parametrize(
    "chunks",
    [[1] * 17, [416] + [1] * 96, [MAX_STEP_TOKENS, MAX_STEP_TOKENS, MAX_STEP_TOKENS, 440] + [1] * 24],
    ids=["17 from the start", "96 after 416", "24 after 1976"],
)
def test_single_tokens_match_the_reference(
    session: Session, reference: Reference, prompt: Prompt, chunks: list[int]
) -> None:
    assert_session(session, reference, prompt(sum(chunks)), chunks)


def test_the_last_logits_match_the_reference(session: Session, reference: Reference, prompt: Prompt) -> None:
    tokens = prompt(512)
    session.clear_cache()
    assert_close(session.step(tokens), reference(tuple(tokens))[-1:], 1e-3, 1e-4)


# ---- the same file in bare onnxruntime, with separate past and present


class Plain:
    """The fp32 graph in a bare onnxruntime session."""

    def __init__(self, bundle: Bundle) -> None:
        shape = bundle.shape
        path = bundle.file(bundle.precision("fp32").model)
        self._session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._names = [f"{i}.{part}" for i in range(shape.num_hidden_layers) for part in ("key", "value")]
        self._empty = shape.caches[0].sized(0)

    def empty(self, batch: int) -> list[Any]:
        return [np.zeros((batch, *self._empty), dtype=np.float32) for _ in self._names]

    def run(self, ids: Tensor, mask: Tensor, past: list[Any]) -> tuple[Any, list[Any]]:
        feeds = {f"past_key_values.{name}": value for name, value in zip(self._names, past, strict=True)}
        feeds |= {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        logits, *presents = self._session.run(["logits", *(f"present.{name}" for name in self._names)], feeds)
        return logits, presents


@pytest.fixture(scope="module")
def plain(smollm2_bundle: Path) -> Plain:
    return Plain(Bundle.open(smollm2_bundle))


def test_2000_tokens_in_a_single_step(plain: Plain, reference: Reference, prompt: Prompt) -> None:
    tokens = prompt(2000)
    ids = torch.tensor([tokens])
    logits, _ = plain.run(ids, torch.ones_like(ids), plain.empty(1))
    assert_close(logits[0], reference(tuple(tokens)), 1e-3, 1e-4)


def test_a_padded_batch_matches_its_sequences_alone(plain: Plain, reference: Reference, prompt: Prompt) -> None:
    """Padded on the right; then every sequence is decoded further from its own length."""
    prompts, steps = [5, 64, 1, 17, 33], 6
    rows = [prompt(length + steps) for length in prompts]
    wanted = [reference(tuple(row)) for row in rows]
    ids, mask = (torch.zeros(len(rows), max(prompts), dtype=torch.int64) for _ in range(2))
    for number, (row, length) in enumerate(zip(rows, prompts, strict=True)):
        ids[number, :length], mask[number, :length] = torch.tensor(row[:length]), 1
    logits, past = plain.run(ids, mask, plain.empty(len(rows)))
    for number, length in enumerate(prompts):
        assert_close(logits[number, :length], wanted[number][:length], 1e-3, 1e-4)
    for step in range(steps):
        ids = torch.tensor([[row[length + step]] for row, length in zip(rows, prompts, strict=True)])
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.int64)], dim=1)
        logits, past = plain.run(ids, mask, past)
        for number, length in enumerate(prompts):
            assert_close(logits[number], wanted[number][length + step][None], 1e-3, 1e-4)


# ---- greedy answers


@pytest.fixture(scope="module")
def greedy_prompts(model: Model, text: list[int]) -> dict[str, list[int]]:
    """Questions in the chat format, which the model ends itself, and text prefixes, which it continues."""
    chats = [model.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    begins = [text[200 * number :][: 3 + 7 * number] for number in range(15)]
    return dict(zip(PROMPTS, chats + begins, strict=True))


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_answers_match_transformers(
    model: Model, theirs: Any, greedy_prompts: dict[str, list[int]], name: str
) -> None:
    """One pass of transformers over prompt and answer: it would choose the same token at every position.

    If the chosen token is not its first choice, the two logits must be equal up to rounding (1e-3).
    """
    prompt = greedy_prompts[name]
    answer = model.generate(prompt, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)).result()
    stopped = answer.finish_reason is FinishReason.STOP
    assert answer.tokens[-1] == model.tokenizer.token_id("<|im_end|>") if stopped else len(answer.tokens) == NEW_TOKENS
    logits = expect(theirs, [*prompt, *answer.tokens[:-1]])[len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    assert (logits.amax(-1) - chosen).max() <= 1e-3
