"""Reasoning tags that are not single tokens: detection across token boundaries, budgets, and export."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
from fakes import FakeSession
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_bundle import bundle_with
from sessions import model_over
from test_tokenizer import BACKENDS

from llm_edge.checkpoint.reasoning import find_reasoning
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime import (
    Constraint,
    Engine,
    FinishReason,
    GenerationResult,
    Model,
    ReasoningTags,
    ReasoningTokens,
    SamplingParams,
)
from llm_edge.runtime.bundle import MANIFEST, Bundle
from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.text.reasoning_parser import ReasoningDelimiters, reasoning_parser
from llm_edge.runtime.text.tokenizer import Tokenizer

IM_START, IM_END = 1, 2
LESS, THINK, MORE, MORE_SEMICOLON = 30, 279, 32, 288  # "<", "think", ">" and ">;" of tests/support/tiny.py
CHANNEL, CHANNEL_END = 320, 321
GREEDY = SamplingParams(temperature=0, max_tokens=100)
QUESTION = [{"role": "user", "content": "What is 2+2?"}]
PAIRS = {
    "think": ("<think>", "</think>"),
    "odd": ("⟦denke⟧", "⟦/denke⟧"),
    "channel": ("<|channel>thought", "<channel|>"),
}
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
)


def bundle_of(tiny: Path, folder: Path, *, template: str | None = None, **manifest: Any) -> Path:
    """A copy of the tiny bundle with changed manifest keys and the special tokens of a family."""
    added = {CHANNEL: "<|channel>", CHANNEL_END: "<channel|>"}
    return bundle_with(tiny, folder, added, special=True, template=template, **manifest)


@pytest.fixture(scope="module")
def folders(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tags")
    return {
        name: bundle_of(tiny_bundle, folder / name, template=OPENED, reasoning_tags={"start": start, "end": end})
        for name, (start, end) in PAIRS.items()
    }


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    return {name: Model.load(folder, "fp32", provider="cpu", threads=1) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def model(models: dict[str, Model]) -> Model:
    return models["think"]


def spelled(model: Model, *parts: str | int) -> list[int]:
    """Token ids of the parts; texts are encoded."""
    return [token for part in parts for token in ([part] if isinstance(part, int) else model.tokenizer.encode(part))]


def model_answering(model: Model, tokens: Sequence[int]) -> Model:
    """The same model, but it answers any prompt by repeating the given tokens."""
    session: Any = FakeSession(tokens, model.bundle.shape)
    return model_over(session, model)


def generate(model: Model, *parts: str | int, prompt: str | Sequence[int] = (70,), **params: Any) -> GenerationResult:
    """The result of an answer that consists of these parts."""
    tokens = spelled(model, *parts)
    own = dataclasses.replace(GREEDY, **{"max_tokens": len(tokens), **params})
    return model_answering(model, tokens).generate(prompt, own).result()


def one_by_one(text: str) -> list[str]:
    return list(text)


# ---- streams


CASES = [
    ("x", "<think>hm</think>It is 4.", "hm", "It is 4."),
    ("x", "<think>\nhm\n</think>\n\nIt is 4.\n", "hm\n", "It is 4.\n"),
    ("x", "\n <think>hm</think>It is 4.", "hm", "\n It is 4."),
    ("x", "It is 4.", "", "It is 4."),
    ("x", "It is <think> and </think>.", "", "It is <think> and </think>."),  # quoted
    ("x", "<think>hm</think>It is </think> <think>.", "hm", "It is </think> <think>."),
    ("x", "</think>4", "", "</think>4"),
    ("x", "<thin", "", "<thin"),
    ("x", "<thinner than", "", "<thinner than"),
    ("x", "<think>a <b> </thin </ thi", "a <b> </thin </ thi", ""),
    ("x", "<think>a<think>b</think>c", "a<think>b", "c"),
    ("x", "<think>a</think>\n<think>b</think>c", "ab", "c"),
    ("x", "<think><think>\na</think>c", "a", "c"),
    ("x", "<think></think>c", "", "c"),
    ("x", "<think>a<</think></think>", "a<", "</think>"),
    ("x", "<think>a\n\n</think>  \n  if x:", "a\n\n", "  if x:"),
    ("x<think>", "\nhm</think>4", "hm", "4"),
    ("x<think>\n", "\nhm</think>4", "hm", "4"),
    ("x<think>\n", "<think>hm</think>4", "hm", "4"),
    ("x<think>h", "m</think>4", "m", "4"),
    ("x<think>h</think>\n", "\n4", "", "4"),
    ("x</think><think>", "hm", "hm", ""),
    ("<think>a</think> x", "\n4 <think>", "", "\n4 <think>"),
]


@pytest.mark.parametrize("cut", [lambda text: [text], one_by_one], ids=["whole", "characters"])
@pytest.mark.parametrize("name", ["think", "odd"])
@pytest.mark.parametrize(("prompt", "answer", "reasoning", "text"), CASES)
def test_reasoning_and_answer_are_separated(
    models: dict[str, Model],
    name: str,
    cut: Callable[[str], list[str]],
    prompt: str,
    answer: str,
    reasoning: str,
    text: str,
) -> None:
    def own(part: str) -> str:
        return re.sub("<think>", PAIRS[name][0], re.sub("</think>", PAIRS[name][1], part))

    parts = cut(own(answer))
    for more, params in (([], {}), ([IM_END], {"max_tokens": 100})):
        result = generate(models[name], *parts, *more, prompt=own(prompt), **params)
        assert (result.reasoning, result.text) == (own(reasoning), own(text))
        assert result.tokens == tuple(spelled(models[name], *parts, *more))


def test_tags_may_share_tokens_with_surrounding_text(model: Model) -> None:
    tokens = [271, THINK, MORE_SEMICOLON, *spelled(model, "a"), 271, *spelled(model, "/"), THINK, MORE_SEMICOLON]
    assert model.tokenizer.decode(tokens) == " <think>;a </think>;"
    result = generate(model, *tokens, "b")
    assert (result.reasoning, result.text) == (";a ", " ;b")
    chunks = list(model_answering(model, [*tokens, IM_END]).generate([70], GREEDY))
    assert [chunk.token for chunk in chunks if chunk.token is not None] == [*tokens, IM_END]
    shown = [(chunk.text, chunk.reasoning, chunk.token) for chunk in chunks if chunk.text]
    assert shown == [
        (" ", False, 271), (";", True, MORE_SEMICOLON), ("a", True, 67), (" ", True, 271), (";", False, MORE_SEMICOLON)
    ]  # fmt: skip


def test_a_token_with_reasoning_and_answer_text_yields_two_chunks(tiny_bundle: Path, tmp_path: Path) -> None:
    tags = {"start": "hin", "end": "/thi"}  # the second ends within a token
    own = Model.load(bundle_of(tiny_bundle, tmp_path / "own", reasoning_tags=tags), "fp32", provider="cpu", threads=1)
    tokens = [267, *spelled(own, "a/"), THINK, IM_END]
    chunks = list(model_answering(own, tokens).generate([70], GREEDY))
    assert [(chunk.text, chunk.reasoning, chunk.token) for chunk in chunks[:-1]] == [
        ("", False, 267), ("a", True, 67), ("", True, 17), ("nk", False, THINK)
    ]  # fmt: skip
    tags = {"start": "ain", "end": "hin"}
    own = Model.load(bundle_of(tiny_bundle, tmp_path / "two", reasoning_tags=tags), "fp32", provider="cpu", threads=1)
    generation = model_answering(own, [298, THINK, *spelled(own, "4"), IM_END]).generate([70], GREEDY)
    chunks = list(generation)
    assert [(chunk.text, chunk.reasoning, chunk.token) for chunk in chunks] == [
        ("", False, 298), ("t", True, None), ("k", False, THINK), ("4", False, 22), ("", False, IM_END)
    ]  # fmt: skip
    assert chunks[-1].timings is not None
    assert (chunks[-1].timings.reasoning_tokens, chunks[-1].timings.completion_tokens) == (2, 4)
    for limit in (1, 2):  # both are emitted even if the answer is cut after the token
        result = generate(own, 298, THINK, "4", max_tokens=limit)
        assert (result.reasoning, result.text, len(result.tokens)) == ("t" * (limit - 1), "k" * (limit - 1), limit)


@given(
    parts=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "\n", " ", "a", "é", "👋", "</thi", IM_START])
        | st.integers(3, 319),
        max_size=25,
    ),
    prompt=st.sampled_from(["x", "x<think>", "x<think>\n", "x</think>"]),
    cut=st.integers(1, 60),
)
@settings(max_examples=200, deadline=None)
def test_reasoning_and_answer_add_up_for_any_token_limit(
    model: Model, parts: list[str | int], prompt: str, cut: int
) -> None:
    tokens = [*spelled(model, *parts), IM_END]
    drawn = tokens[:cut]
    wanted = expected(model.tokenizer.decode([token for token in drawn if token != IM_END]), prompt)
    own = model_answering(model, tokens)
    limited = own.generate(prompt, dataclasses.replace(GREEDY, max_tokens=cut)).result()
    assert (limited.reasoning, limited.text) == wanted
    assert limited.tokens == tuple(drawn)
    assert (limited.timings.reasoning_tokens > 0) >= bool(wanted[0])

    generation = own.generate(prompt, GREEDY)
    texts: dict[bool, str] = {True: "", False: ""}
    count = 0
    for chunk in generation:
        texts[chunk.reasoning] += chunk.text
        count += chunk.token is not None
        if count == cut:
            generation.cancel()
    assert (texts[True], texts[False]) == wanted


def expected(text: str, prompt: str) -> tuple[str, str]:
    """Reasoning and answer of a whole text, according to the definition."""
    inside = prompt.rstrip().endswith("<think>")
    sides, bordered, blank = [(inside, prompt.rstrip().endswith(("<think>", "</think>")), "")], False, True
    while text:
        inside, bordered, before = sides[-1]
        blank = not before.strip()
        if blank and text.startswith("<think>"):
            text = text.removeprefix("<think>")
            sides += [(True, True, "")] if not inside else []
        elif inside and text.startswith("</think>"):
            text = text.removeprefix("</think>")
            sides.append((False, True, ""))
        else:
            sides[-1] = (inside, bordered, before + text[0])
            text = text[1:]
    texts = {True: "", False: ""}
    for inside, bordered, own in sides:
        if bordered:
            own = "" if not own.strip() else re.sub(r"\A\s*\n", "", own)
        texts[inside] += own
    return texts[True], texts[False]


def test_tags_may_contain_special_tokens(models: dict[str, Model]) -> None:
    own = models["channel"]
    result = generate(own, CHANNEL, "thought\nhm\n", CHANNEL_END, "It is 4.", CHANNEL, CHANNEL_END, "Yes", IM_END)
    assert (result.reasoning, result.text) == ("hm\n", "It is 4.Yes")
    assert result.timings.reasoning_tokens == len(spelled(own, "thought\nhm\n")) + 2
    other = generate(own, CHANNEL, "though not", IM_END)
    assert (other.reasoning, other.text) == ("", "though not")
    typed = generate(own, *own.tokenizer.encode("<|channel>thought"), "a", IM_END, prompt=[70])
    assert (typed.reasoning, typed.text) == ("a", "")
    assert generate(own, "hm", CHANNEL_END, "4", prompt=[CHANNEL, *spelled(own, "thought\n")]).reasoning == "hm"


@pytest.mark.parametrize(
    ("parts", "count"),
    [
        (["<think>", "hm", "</think>", "yes"], 3 + 2 + 4),
        (["\n", "<think>", "hm", "</think>", "yes"], 3 + 2 + 4),
        (["<", "thin", "ner"], 0),
        (["<think>", "hm"], 3 + 2),
        (["yes", "<think>"], 0),
        (["<think>", "a", "</think>", "<think>", "b", "</think>", "c"], 2 * (3 + 1 + 4)),
    ],
)
def test_reasoning_tokens_are_counted(model: Model, parts: list[str], count: int) -> None:
    assert generate(model, *parts, IM_END).timings.reasoning_tokens == count


@pytest.mark.parametrize("kind", BACKENDS)
def test_any_tokenizer_can_close_reasoning(kind: str) -> None:
    """The tokens of the end tag close the reasoning wherever they appear."""
    tokenizer = Tokenizer(BACKENDS[kind], {}, None)
    marks = ReasoningDelimiters(ReasoningTags("<think>", "</think>"), tokenizer)
    for before in ("", "hm", "hm ", "a <", "a </thi", "é\n"):
        borders = reasoning_parser(marks, tokenizer)
        for token in (*marks.opening, *tokenizer.encode(before)):
            borders.push(token)
        assert borders.inside
        for token in marks.closing[:-1]:
            borders.push(token)
            assert borders.inside
        assert marks.closing[-1] in borders.ending()[0]
        assert marks.closing[-1] not in borders.ending()[1]
        borders.push(marks.closing[-1])
        assert (borders.inside, borders.ended) == (False, True)


def test_stop_strings_apply_only_to_the_answer(model: Model) -> None:
    for parts, stop, reasoning, answer, stopped in (
        (("<think>say 4 now</think>It is 4.",), "4", "say 4 now", "It is ", True),
        (("<think>say 4</think>\n\nIt is.\n\nBut",), "\n\n", "say 4", "It is.", True),
        (("<think>hm I</think>t is",), "It", "hm I", "t is", False),
        (("<think>hm</think>a </think> b",), "</think>", "hm", "a ", True),
        (("a <thin",), "<think", "", "a <thin", False),
    ):
        result = generate(model, *parts, stop=(stop,))
        assert (result.reasoning, result.text) == (reasoning, answer)
        assert result.finish_reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)


def test_template_prompts_open_and_close_reasoning(model: Model) -> None:
    own = model_answering(model, spelled(model, "hm</think>4", IM_END))
    opened = own.chat(QUESTION, GREEDY).result()
    assert (opened.reasoning, opened.text) == ("hm", "4")
    closed = own.chat(QUESTION, GREEDY, template_variables={"enable_thinking": False}).result()
    assert (closed.reasoning, closed.text) == ("", "hm</think>4")


def test_typed_tags_do_not_open_reasoning(folders: dict[str, Path], tmp_path: Path) -> None:
    template = OPENED.partition("{% if")[0]
    path = bundle_of(folders["think"], tmp_path / "own", template=template)
    whole = Model.load(path, "fp32", provider="cpu", threads=1)
    for typed in ("What is <think>?", "<think>"):
        result = model_answering(whole, spelled(whole, "A tag.", IM_END)).chat(
            [{"role": "user", "content": typed}], GREEDY
        )
        assert result.result().text == "A tag."


# ---- budgets and constraints


class Noisy(FakeSession):
    """Random logits, with some tokens more probable than others, and none without text."""

    def __init__(self, model: Model, often: Sequence[int], weight: float, seed: int) -> None:
        super().__init__([0], model.bundle.shape)
        self._often, self._weight, self._chance = [*often], weight, np.random.default_rng(seed)

    def step(self, tokens: Sequence[int], num_logits: int = 1) -> np.ndarray[Any, np.dtype[np.float32]]:
        logits = super().step(tokens, num_logits)
        logits[:] = self._chance.normal(size=logits.shape)
        logits[:, self._often] += self._weight
        logits[:, [*range(3), *range(320, 331)]] = -30
        return logits


def noisy(model: Model, *often: str | int, weight: float = 4.0, seed: int = 0) -> Model:
    session: Any = Noisy(model, spelled(model, *often), weight, seed)
    return model_over(session, model)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("budget", [0, 1, 7, 40])
def test_a_budget_ends_reasoning_with_the_whole_tag(models: dict[str, Model], name: str, budget: int) -> None:
    start, end = PAIRS[name]
    whole = models[name]
    prompt = [70, *whole.tokenizer.encode(start, parse_special=True)]
    params = SamplingParams(max_tokens=60, seed=budget, reasoning_budget=budget)
    result = noisy(whole, *"abc", weight=9).generate(prompt, params).result()
    closing = tuple(whole.tokenizer.encode(end, parse_special=True))
    assert result.tokens[budget : budget + len(closing)] == closing
    assert result.timings.reasoning_tokens == budget + len(closing)
    assert result.reasoning == whole.tokenizer.decode(result.tokens[:budget])
    assert result.text == whole.tokenizer.decode(result.tokens[budget + len(closing) :])


def test_a_budget_completes_a_partial_end_tag(model: Model) -> None:
    tokens = [*spelled(model, "ab"), LESS, *spelled(model, "xxxx4", IM_END)]
    result = (
        model_answering(model, tokens).generate("x<think>", dataclasses.replace(GREEDY, reasoning_budget=3)).result()
    )
    assert result.tokens[:6] == (*spelled(model, "ab"), *spelled(model, "</think>"))
    assert result.reasoning == "ab"
    begun = model_answering(model, spelled(model, "x", IM_END))
    again = begun.generate("x<think><", dataclasses.replace(GREEDY, reasoning_budget=0)).result()
    assert again.tokens[:4] == tuple(spelled(model, "</think>"))  # tokens of the prompt do not count


def test_a_budget_applies_even_if_other_guards_ban_the_end(model: Model) -> None:
    banned = tuple(spelled(model, "</think>"))
    params = dataclasses.replace(GREEDY, reasoning_budget=2, banned_tokens=banned, no_repeat_ngram=2)
    result = model_answering(model, spelled(model, "a")).generate("x<think>", params).result()
    assert result.tokens[2:6] == banned


@pytest.mark.parametrize(
    ("prompt", "parts", "free", "kept"),
    [
        ("x<think>", ["hm</think>a</think>b"], "a</think>b", "a</thinkb"),
        ("x<think>", ["hm</think>a</think", MORE_SEMICOLON, "b"], "a</think>;b", "a</thinkb"),
        ("x", ["a</think>b</think>c"], "a</think>b</think>c", "a</think>b</thinkc"),
        ("x</think>", ["a</think>c"], "a</think>c", "a</thinkc"),
        ("x</think><think>", ["hm</think>c"], "c", "c"),
    ],
)
def test_reasoning_ends_only_once(model: Model, prompt: str, parts: list[str | int], free: str, kept: str) -> None:
    assert generate(model, *parts, prompt=prompt).text == free
    assert generate(model, *parts, prompt=prompt, single_think_end=True).text == kept


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("opened", [True, False])
def test_a_constrained_answer_may_follow_reasoning(model: Model, opened: bool, seed: int) -> None:
    schema = {"properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    rule = Constraint.json_schema({"type": "object", **schema})
    params = SamplingParams(max_tokens=300, seed=seed, constraint=rule, reasoning_budget=100)
    often = noisy(model, "<think>", "</think>", MORE_SEMICOLON, "\n", weight=4, seed=seed)
    result = often.generate("x<think>\n" if opened else "x", params).result()
    assert set(json.loads(result.text)) == {"a"}
    assert result.finish_reason == FinishReason.STOP
    assert (result.timings.reasoning_tokens > 0) >= opened


def test_a_constrained_model_may_start_with_reasoning_or_the_answer(model: Model) -> None:
    for rule, says, reasoning, text in (
        (Constraint.choice(["<a>", "b"]), "<think>hm</think><a>", "hm", "<a>"),
        (Constraint.choice(["<a>", "b"]), "<a>", "", "<a>"),
        (Constraint.choice(["b"]), "<think>hm</think>b", "hm", "b"),
        (Constraint.choice(["b"]), "b", "", "b"),
        (Constraint.choice(["<", "<thin"]), "<think></think><thin", "", "<thin"),
        (Constraint.regex("(?s:.){1,9}"), "<think>hm</think>4 <think>", "hm", "4 <think>"),
    ):
        result = generate(model, says, IM_END, constraint=rule)
        assert (result.reasoning, result.text) == (reasoning, text)


def test_constraints_work_with_single_token_delimiters_too(tiny_bundle: Path, tmp_path: Path) -> None:
    marks = {"start": CHANNEL, "end": CHANNEL_END}
    own = Model.load(bundle_of(tiny_bundle, tmp_path / "own", reasoning=marks), "fp32", provider="cpu", threads=1)
    rule = Constraint.choice(["a", "b"])
    for prompt, parts, reasoning in (
        ([70], [CHANNEL, "hm", CHANNEL_END, "b"], "hm"),
        ([70], ["b"], ""),
        ([70, CHANNEL], ["hm", CHANNEL_END, "b"], "hm"),
    ):
        result = generate(own, *parts, IM_END, prompt=prompt, constraint=rule)
        assert (result.reasoning, result.text) == (reasoning, "b")
        assert result.timings.reasoning_tokens == len(spelled(own, *parts[:-1]))
    opened = generate(own, "hmmm", prompt=[70, CHANNEL], max_tokens=20, constraint=rule, reasoning_budget=3)
    assert (opened.reasoning, opened.tokens[3]) == ("hmm", CHANNEL_END)
    assert opened.text in ("a", "b")


def test_a_constrained_answer_starts_after_the_tag(model: Model) -> None:
    """A token with the end of the tag and further text would add text that the grammar did not check."""
    script = [*spelled(model, "hm</think"), MORE_SEMICOLON]
    result = generate(model, *script, prompt="x<think>", max_tokens=20, constraint=Constraint.choice(["a", "b"]))
    assert MORE_SEMICOLON not in result.tokens
    free = generate(model, *script, prompt="x<think>", max_tokens=len(script))
    assert free.text == ";"


# ---- the real model, alone and in a batch


def test_engine_answers_equal_those_of_a_model(folders: dict[str, Path]) -> None:
    params = [
        SamplingParams(temperature=1.5, max_tokens=40, seed=seed, reasoning_budget=seed, single_think_end=True)
        for seed in range(8)
    ]
    own = Model.load(folders["think"], "fp32", provider="cpu", threads=1)
    wanted = [own.chat(QUESTION, each).result() for each in params]
    assert all(each.reasoning or not number for number, each in enumerate(wanted))
    with Engine.load(folders["think"], "fp32", threads=1) as engine:
        answers = [engine.chat(QUESTION, each) for each in params]
        found = [answer.result() for answer in answers]
    assert [(each.reasoning, each.text, each.tokens) for each in found] == [
        (each.reasoning, each.text, each.tokens) for each in wanted
    ]
    assert [each.timings.reasoning_tokens for each in found] == [4 + number for number in range(8)]


# ---- bundles


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *(({"reasoning_tags": value}, "'reasoning_tags'") for value in (None, [], "think")),
        ({"reasoning_tags": {"start": "<think>"}}, "'end'"),
        ({"reasoning_tags": {"end": "</think>"}}, "'start'"),
    ]
    + [
        ({"reasoning_tags": {"start": value, "end": "</think>"}}, "start")
        for value in (None, 7, "", "ab", " <think>", "<think>\n", "<th\x00k>", "x" * 65, "\ud800abc")
    ]
    + [
        ({"reasoning_tags": {"start": "<think>", "end": "<think>"}}, "contains the other"),
        ({"reasoning_tags": {"start": "think", "end": "</think>"}}, "contains the other"),
        (
            {"reasoning_tags": {"start": "<think>", "end": "</think>"}, "reasoning": {"start": 7, "end": 8}},
            "exclude each other",
        ),
    ],
)
def test_invalid_tags_are_rejected(tiny_bundle: Path, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = bundle_of(tiny_bundle, tmp_path / "own", **change)
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    message = str(caught.value)
    assert "\n" not in message
    assert MANIFEST in message
    assert reason in message


def test_tags_and_guards_are_read_from_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    tags = {"start": "<think>", "end": "</think>"}
    guards = {"max_newlines": 2, "single_think_end": True}
    opened = Bundle.open(bundle_of(tiny_bundle, tmp_path / "own", reasoning_tags=tags, guards=guards))
    assert opened.reasoning == ReasoningTags("<think>", "</think>")
    assert Model.load(opened.path, "fp32").default_params.single_think_end


def test_tags_that_the_tokenizer_cannot_encode_are_rejected() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot write '<think>' of 'reasoning_tags'"):
        ReasoningDelimiters(ReasoningTags("<think>", "</think>"), Tokenizer(words, {}, None))


# ---- export


@pytest.mark.parametrize(
    ("added", "template", "found"),
    [
        ((), None, None),
        ((), "{{ messages }}", None),
        ((), "<think>\n", ReasoningTags("<think>", "</think>")),
        ((), "{{ content.split('</think>')[-1] }}", ReasoningTags("<think>", "</think>")),
        ((), "Answer in <reasoning>", ReasoningTags("<reasoning>", "</reasoning>")),
        ((), "<thought>\n", ReasoningTags("<thought>", "</thought>")),
        (("<think>",), None, None),
        (("<think>",), "<think>", ReasoningTags("<think>", "</think>")),
        (("[THINK]", "[/THINK]"), None, ReasoningTokens(320, 321)),
        (("<thought>", "</thought>"), "<think>", ReasoningTokens(320, 321)),
        (("<|channel>", "<channel|>"), None, ReasoningTags("<|channel>thought", "<channel|>")),
        (("<|channel>",), None, None),
        (("<|channel>",), "<|channel>thought", ReasoningTags("<|channel>thought", "<channel|>")),
    ],
)
def test_tags_are_found_in_the_chat_template(added: Sequence[str], template: str | None, found: object) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in added])
    assert find_reasoning(tokenizer.to_str(), template) == found


def test_tags_that_the_tokenizer_cannot_encode_are_ignored() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    for text in (words.to_str(), "{}", '{"added_tokens": []}', "", "[]"):
        assert find_reasoning(text, "<think>") is None


def test_an_export_records_the_tags_of_the_chat_template(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    (source / "chat_template.jinja").write_text(OPENED, encoding="utf-8")
    path = tmp_path / "bundle"
    export(str(source), ExportOptions(path, precision="fp32", validate=False))
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["reasoning_tags"] == {"start": "<think>", "end": "</think>"}
    assert "reasoning" not in manifest
    result = (
        Model.load(path, "fp32", provider="cpu", threads=1)
        .chat(QUESTION, SamplingParams(seed=1, max_tokens=20, reasoning_budget=5))
        .result()
    )
    assert (result.timings.reasoning_tokens, len(result.tokens)) == (9, 20)
    assert result.reasoning
    assert result.text
