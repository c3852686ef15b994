"""Reasoning separated from answers: in streams split anywhere, in conversations, and the guards of reasoning models."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeSession
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_bundle import bundle_with
from sessions import model_over
from test_chat_template import TEMPLATES
from test_tokenizer import BACKENDS, SPECIALS
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from llm_edge.runtime import FinishReason, GenerationResult, Model, SamplingParams
from llm_edge.runtime.bundle import ReasoningTokens
from llm_edge.runtime.errors import BundleError, ParameterError, TemplateError
from llm_edge.runtime.sampling.processors import NewlineCounter, NewlineLimit, SingleThinkEnd
from llm_edge.runtime.text.answer_stream import AnswerStream, separate_reasoning
from llm_edge.runtime.text.reasoning_parser import ReasoningDelimiters, opens_reasoning, reasoning_parser
from llm_edge.runtime.text.tokenizer import Tokenizer

START, END, LACKING = 320, 321, 325  # after the tokens of tests/support/tiny.py; the last has a logit but no text
IM_START, IM_END = 1, 2
GREEDY = SamplingParams(temperature=0, max_tokens=100)
QUESTION = [{"role": "user", "content": "What is 2+2?"}]
# A template of the kind that keeps only the text after the reasoning in earlier turns.
FAMILY = (
    "{% for m in messages %}{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    "<|im_end|>{% endfor %}{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
)


def bundle_of(tiny: Path, folder: Path, *, special: bool, template: str | None = None, **manifest: Any) -> Path:
    """A copy of the tiny bundle with the tokens of a reasoning model."""
    added = {START: "<think>", END: "</think>"}
    manifest = {"reasoning": {"start": START, "end": END}} | manifest
    return bundle_with(tiny, folder, added, special=special, template=template, **manifest)


@pytest.fixture(scope="module")
def whole(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Model]:
    """Reasoning models whose two tokens are special (True) or ordinary (False)."""
    folder = tmp_path_factory.mktemp("reasoning")
    return {
        special: Model.load(
            bundle_of(tiny_bundle, folder / str(special), special=special), "fp32", provider="cpu", threads=1
        )
        for special in (True, False)
    }


ModelAnswering = Callable[..., Model]


@pytest.fixture(scope="module", params=[True, False], ids=["special", "ordinary"])
def model_answering(request: pytest.FixtureRequest, whole: dict[bool, Model]) -> ModelAnswering:
    """Creates reasoning models that answer any prompt by repeating the given tokens."""

    def make(tokens: Sequence[int]) -> Model:
        own = whole[request.param]
        session: Any = FakeSession(tokens, own.bundle.shape)
        return model_over(session, own)

    return make


def spelled(model: Model, *parts: str | int) -> list[int]:
    """Token ids of the parts; texts are encoded."""
    return [token for part in parts for token in ([part] if isinstance(part, int) else model.tokenizer.encode(part))]


def generate(
    model_answering: ModelAnswering, *parts: str | int, prompt: Sequence[int] = (70,), **params: Any
) -> GenerationResult:
    """The result of an answer that consists of these parts."""
    tokens = spelled(model_answering([0]), *parts)
    return (
        model_answering(tokens)
        .generate(prompt, dataclasses.replace(GREEDY, **{"max_tokens": len(tokens), **params}))
        .result()
    )


# Streams


@pytest.mark.parametrize(
    ("prompt", "parts", "reasoning", "answer"),
    [
        ([70], [START, "hm", END, "It is 4."], "hm", "It is 4."),
        ([START], ["hm", END, "It is 4."], "hm", "It is 4."),
        ([70, START, 71], ["hm", END, "It is 4."], "hm", "It is 4."),
        ([START, 70, END], ["It is 4."], "", "It is 4."),
        ([END, START], ["hm"], "hm", ""),
        ([START, END, START, START, 71], ["hm"], "hm", ""),
        ([START, 70, IM_END, 71], ["It is 4."], "", "It is 4."),  # typed by a user, before the end of the turn
        ([70], ["It is 4."], "", "It is 4."),
        ([70], [START, "\nhm\n", END, "\n\nIt is 4.\n"], "hm\n", "It is 4.\n"),
        ([START], ["\n \t\n  hm", END, " \r\n    if x:\n"], "  hm", "    if x:\n"),  # indentation is preserved
        ([START], ["\n", "\n", END, "\n", " ", "\n", " a"], "", " a"),
        ([START], [" \n ", END, "\n  "], "", ""),
        ([70], ["\n\nIt is 4."], "", "\n\nIt is 4."),  # no delimiter, so nothing is stripped
        ([START, 70], ["\nhm"], "\nhm", ""),
        ([START, END], ["\nIt is 4."], "", "It is 4."),
        ([START], ["hm", END, "It ", END, "is 4."], "hm", "It is 4."),
        ([START], ["h", START, "m", END, END, "It is 4."], "hm", "It is 4."),
        ([70], ["It ", START, "hm", END, "is 4."], "hm", "It is 4."),
        ([70], ["It ", START, "hm", END, "is ", START, "hm", END, "4."], "hmhm", "It is 4."),
        ([70], [END, "It is 4."], "", "It is 4."),
        ([70], ["👋 a", START, "👋"], "👋", "👋 a"),
    ],
)
def test_reasoning_and_answer_are_separated(
    model_answering: ModelAnswering, prompt: list[int], parts: list[str | int], reasoning: str, answer: str
) -> None:
    result = generate(model_answering, *parts, prompt=prompt)
    assert (result.reasoning, result.text) == (reasoning, answer)
    assert result.tokens == tuple(spelled(model_answering([0]), *parts))
    ended = generate(model_answering, *parts, IM_END, prompt=prompt, max_tokens=100)
    assert (ended.reasoning, ended.text, ended.finish_reason) == (reasoning, answer, FinishReason.STOP)


def test_a_delimiter_flushes_an_incomplete_character(model_answering: ModelAnswering) -> None:
    wave = spelled(model_answering([0]), "👋")
    assert len(wave) == 4
    result = generate(model_answering, START, *wave[:2], END, *wave[2:], "a")
    assert result.reasoning == model_answering([0]).tokenizer.decode(wave[:2])
    assert result.text == model_answering([0]).tokenizer.decode([*wave[2:], *spelled(model_answering([0]), "a")])
    assert "👋" not in result.reasoning + result.text


def test_a_model_without_reasoning_tokens_yields_only_answers(tiny_bundle: Path) -> None:
    model = Model.load(tiny_bundle, "fp32", provider="cpu", threads=1)
    text = "<think>\nhm\n</think>\n\n4"
    session: Any = FakeSession(model.tokenizer.encode(text), model.bundle.shape)
    own = model_over(session, model)
    result = own.generate("x", dataclasses.replace(GREEDY, max_tokens=len(model.tokenizer.encode(text)))).result()
    assert (result.text, result.reasoning, result.timings.reasoning_tokens) == (text, "", 0)


def test_chunks_are_marked_as_reasoning_or_answer(model_answering: ModelAnswering) -> None:
    tokens = [START, *spelled(model_answering([0]), "hm"), END, *spelled(model_answering([0]), "yo"), IM_END]
    chunks = list(model_answering(tokens).generate([70], GREEDY))
    assert [chunk.token for chunk in chunks] == tokens
    assert [(chunk.text, chunk.reasoning) for chunk in chunks if chunk.text] == [
        ("h", True), ("m", True), ("y", False), ("o", False)
    ]  # fmt: skip


WORDS = st.lists(
    st.sampled_from([START, START, END, END, IM_START, LACKING])
    | st.sampled_from(["\n", "\n\n", " ", "  \n", "a", " the", "é", "👋", "</", "stop", "\t"])
    | st.integers(3, 319),
    max_size=25,
)


def expected(model: Model, tokens: Sequence[int], inside: bool, bordered: bool) -> tuple[str, str, int]:
    """Reasoning, answer and number of reasoning tokens, according to the definition."""
    sides: list[tuple[bool, bool, list[int]]] = [(inside, bordered, [])]
    count = 0
    for token in tokens:
        inside = sides[-1][0]
        count += inside or token == START
        if token in (START, END):
            if inside != (token == START):
                sides.append((not inside, True, []))
        else:
            sides[-1][2].append(token)
    texts: dict[bool, str] = {True: "", False: ""}
    for inside, bordered, ids in sides:
        text = model.tokenizer.decode(ids)
        if bordered:
            text = "" if text.isspace() else re.sub(r"\A\s*\n", "", text)
        texts[inside] += text
    return texts[True], texts[False], count


@given(parts=WORDS, prompt=st.lists(st.sampled_from([START, END, 70, 71]), max_size=4), cut=st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_reasoning_and_answer_add_up_for_any_token_limit(
    model_answering: ModelAnswering, parts: list[str | int], prompt: list[int], cut: int
) -> None:
    model = model_answering([0])
    tokens = [*spelled(model, *parts), IM_END]
    own, prompt = model_answering(tokens), [70, *prompt]
    marks = [token for token in prompt if token in (START, END)]
    opened, bordered = marks[-1:] == [START], prompt[-1] in (START, END)
    drawn = tokens[:cut]
    wanted = expected(model, [token for token in drawn if token != IM_END], opened, bordered)

    limited = own.generate(prompt, dataclasses.replace(GREEDY, max_tokens=cut)).result()
    assert limited.tokens == tuple(drawn)
    assert (limited.reasoning, limited.text, limited.timings.reasoning_tokens) == wanted
    assert limited.finish_reason == (FinishReason.STOP if drawn[-1] == IM_END else FinishReason.LENGTH)

    generation = own.generate(prompt, GREEDY)
    texts: dict[bool, str] = {True: "", False: ""}
    for number, chunk in enumerate(generation, 1):
        texts[chunk.reasoning] += chunk.text
        if number == cut:
            generation.cancel()
    assert (texts[True], texts[False]) == wanted[:2]
    assert chunk.timings is not None
    assert chunk.timings.reasoning_tokens == wanted[2]
    assert chunk.finish_reason == (FinishReason.STOP if drawn[-1] == IM_END else FinishReason.CANCELLED)


@pytest.mark.parametrize(
    ("parts", "stop", "reasoning", "answer", "stopped"),
    [
        ([START, "say 4 now", END, "It is 4."], ("4",), "say 4 now", "It is ", True),
        ([START, "say 4 now", END, "It is 5."], ("4",), "say 4 now", "It is 5.", False),
        ([START, "hm ", END, "\n\nIt is 4.\n\nBut"], ("\n\n",), "hm ", "It is 4.", True),
        ([START, "hm I", END, "t is"], ("It",), "hm I", "t is", False),  # not across the delimiter
        (["It", START, " hm", END, " is"], ("It is",), " hm", "It is", False),
        (["It is", START, "hm", END, " 4"], ("is 4",), "hm", "It is 4", False),
        (["st", START, "op", END, "op"], ("stop",), "op", "stop", False),
    ],
)
def test_stop_strings_apply_only_to_the_answer(
    model_answering: ModelAnswering,
    parts: list[str | int],
    stop: tuple[str, ...],
    reasoning: str,
    answer: str,
    stopped: bool,
) -> None:
    result = generate(model_answering, *parts, stop=stop)
    assert (result.reasoning, result.text) == (reasoning, answer)
    assert result.finish_reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)


def test_stop_tokens_apply_to_the_reasoning_too(model_answering: ModelAnswering) -> None:
    result = generate(model_answering, START, "hm", END, "4", stop_token_ids=(END,))
    assert (result.reasoning, result.text, result.tokens[-1]) == ("hm", "", END)
    assert result.finish_reason == FinishReason.STOP


def test_reasoning_tokens_are_counted(model_answering: ModelAnswering) -> None:
    result = generate(model_answering, START, "hm", END, "yes", IM_END)
    assert (result.timings.completion_tokens, result.timings.reasoning_tokens) == (len(result.tokens), 4)
    assert generate(model_answering, "yes", END, "no", IM_END).timings.reasoning_tokens == 0


def test_typed_delimiters_do_not_open_reasoning(model_answering: ModelAnswering) -> None:
    model = model_answering(spelled(model_answering([0]), "A tag.", IM_END))
    result = model.chat([{"role": "user", "content": "What is <think>?"}], GREEDY).result()
    assert (result.reasoning, result.text) == ("", "A tag.")


def test_the_prompt_may_open_and_close_reasoning() -> None:
    tokens = ReasoningTokens(7, 8)
    assert opens_reasoning([5, 7], tokens)
    assert opens_reasoning([7, 8, 7, 5], tokens)
    assert not opens_reasoning([7, 5, 8, 5], tokens)
    assert not opens_reasoning([5], tokens)
    assert not opens_reasoning([], tokens)
    assert not opens_reasoning([7, 2, 5], tokens, {2, 7})
    assert opens_reasoning([2, 7, 5], tokens, {2, 7})


def test_a_long_run_of_blank_lines_is_fast(model_answering: ModelAnswering) -> None:
    model = model_answering([0])
    (newline,) = model.tokenizer.encode("\n")
    marks = ReasoningDelimiters(ReasoningTokens(START, END), model.tokenizer)
    stream = AnswerStream(reasoning_parser(marks, model.tokenizer, [START]), ())
    began = time.process_time()
    assert not any(text for _ in range(20_000) for text, _ in stream.push(newline))
    assert stream.flush().text == ""
    assert time.process_time() - began < 3


def test_a_vocabulary_without_newlines_needs_no_limit() -> None:
    logits = np.zeros(20, np.float32)
    assert not NewlineLimit(NewlineCounter({}), 1)(logits, [1, 2]).any()


def test_reasoning_tokens_unknown_to_the_tokenizer_are_rejected(tiny_bundle: Path, tmp_path: Path) -> None:
    for number, tokens in enumerate(({"start": START, "end": LACKING}, {"start": LACKING, "end": END})):
        path = bundle_of(tiny_bundle, tmp_path / str(number), special=True, reasoning=tokens)
        with pytest.raises(BundleError, match=r"tokenizer\.json lacks the tokens of 'reasoning'"):
            Model.load(path, "fp32", provider="cpu", threads=1)


# Conversations


def reference(path: Path) -> Any:
    """The same tokenizer loaded by transformers."""
    template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), chat_template=template)


REPLIES = [
    "4",
    "<think>\nhm\n</think>\n\nIt is 4.",
    "<think>hm</think>It is 4.",
    "hm\n</think>\n\nIt is 4.\n",
    "<think>\n\n</think>\n\n4",
    "</think>4",
    "<think>hm",
    "a</think>",
]


@pytest.mark.parametrize("special", [True, False], ids=["special", "ordinary"])
@pytest.mark.parametrize("name", ["qwen3", "family"])
def test_earlier_turns_match_transformers(tiny_bundle: Path, tmp_path: Path, name: str, special: bool) -> None:
    template = {"qwen3": TEMPLATES["qwen3"], "family": FAMILY}[name]
    path = bundle_of(tiny_bundle, tmp_path / "own", special=special, template=template)
    model, theirs = Model.load(path, "fp32", provider="cpu", threads=1), reference(path)
    for reply in REPLIES:
        for more in ({}, {"reasoning_content": "2+2"}, {"reasoning_content": None}):
            for rest in ([], QUESTION):
                if special and ("think" in reply) and (more.get("reasoning_content") or "</think>" not in reply):
                    continue  # spelled by the message, so the runtime does not treat it as a token
                if special and name == "family" and "\n\n" in reply:
                    continue  # the runtime strips the blank lines, see below
                messages: list[dict[str, Any]] = [*QUESTION, {"role": "assistant", "content": reply, **more}, *rest]
                kept = [{key: value for key, value in m.items() if value is not None} for m in messages]
                variables = {"enable_thinking": False} if rest else {}
                wanted = theirs.apply_chat_template(kept, add_generation_prompt=True, return_dict=False, **variables)
                assert model.encode_chat(messages, variables) == wanted, (reply, more)


def test_a_special_end_is_recognized_only_in_earlier_assistant_turns(tiny_bundle: Path, tmp_path: Path) -> None:
    model = Model.load(
        bundle_of(tiny_bundle, tmp_path / "own", special=True, template=FAMILY), "fp32", provider="cpu", threads=1
    )
    text = "a</think>b"
    ids = model.encode_chat(
        [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}\n\n</think>\n\n4"}]
    )
    assert ids == [*model.tokenizer.encode(text), IM_END, *model.tokenizer.encode("4"), IM_END, START]
    assert (ids.count(START), ids.count(END)) == (1, 0)


def test_a_streamed_turn_is_split_like_its_text(model_answering: ModelAnswering) -> None:
    result = generate(model_answering, START, "\nhm\n", END, "\n\n  It is 4.", prompt=[70])
    raw = f"<think>\nhm\n</think>\n\n{result.text}"
    (message,) = separate_reasoning([{"role": "assistant", "content": raw}], "<think>", "</think>")
    assert message == {"role": "assistant", "reasoning_content": result.reasoning.strip(), "content": result.text}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a</think>b"}],
        [{"role": "assistant", "content": "a</think>b", "reasoning_content": "c"}],
        [{"role": "assistant", "content": "a</think>b", "thinking": "c"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "a</think>b"}]}],
        [{"role": "assistant"}, {"role": "assistant", "content": None}, "a</think>b", None],
        "a</think>b",
        None,
    ],
)
def test_other_messages_are_unchanged(messages: Any) -> None:
    assert separate_reasoning(messages, "<think>", "</think>") == messages


def test_the_callers_messages_are_not_modified() -> None:
    messages = [{"role": "assistant", "content": "a</think>b", "name": "x"}]
    assert separate_reasoning(messages, "<think>", "</think>") == [
        {"role": "assistant", "content": "b", "name": "x", "reasoning_content": "a"}
    ]
    assert messages == [{"role": "assistant", "content": "a</think>b", "name": "x"}]


def test_template_variables_are_passed_to_the_template(tiny_bundle: Path, tmp_path: Path) -> None:
    path = bundle_of(tiny_bundle, tmp_path / "own", special=True, template=FAMILY)
    own = Model.load(path, "fp32", provider="cpu", threads=1)
    session: Any = FakeSession([70, IM_END], own.bundle.shape)
    model = model_over(session, own)
    text = own.tokenizer.decode([70])
    thought = model.chat(QUESTION, GREEDY).result()
    assert (thought.reasoning, thought.text) == (text, "")
    answered = model.chat(QUESTION, GREEDY, template_variables={"enable_thinking": False}).result()
    assert (answered.reasoning, answered.text) == ("", text)
    assert answered.timings.prompt_tokens == thought.timings.prompt_tokens - 1
    for wrong in ({"messages": []}, {"self": 1}, {1: 2}, {"x": object()}):
        with pytest.raises(TemplateError) as caught:
            model.chat(QUESTION, GREEDY, template_variables=wrong)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    for odd in ("x", "", 5, ["ab"], [("enable_thinking", False)]):
        with pytest.raises(ParameterError, match=r"template_variables is .*: give a mapping by name"):
            model.chat(QUESTION, GREEDY, template_variables=odd)  # type: ignore[arg-type]


def test_invalid_thread_counts_are_rejected(tiny_bundle: Path) -> None:
    for wrong in ("2", 1.0, True):
        with pytest.raises(ParameterError, match=f"threads is {wrong!r}; use 1 to 1024"):
            Model.load(tiny_bundle, "fp32", provider="cpu", threads=wrong)  # type: ignore[arg-type]


# Guards


class NoisySession(FakeSession):
    """Random logits, with some tokens much more probable than others."""

    def __init__(self, model: Model, often: Sequence[int], seed: int) -> None:
        super().__init__([0], model.bundle.shape)
        self._often, self._chance = [*often], np.random.default_rng(seed)

    def step(self, tokens: Sequence[int], num_logits: int = 1) -> np.ndarray[Any, np.dtype[np.float32]]:
        logits = super().step(tokens, num_logits)
        logits[:] = self._chance.normal(size=logits.shape)
        logits[:, [0, IM_START, IM_END, *range(START, 331)]] = -30  # tokens without text
        logits[:, self._often] = 6 + self._chance.normal(size=len(self._often))
        return logits


def noisy(whole: Model, *often: str | int, seed: int = 0) -> Model:
    session: Any = NoisySession(whole, spelled(whole, *often), seed)
    return model_over(session, whole)


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_consecutive_newlines_are_counted(whole: dict[bool, Model], limit: int, temperature: float) -> None:
    model = noisy(whole[True], "\n", "\n\n", "a")
    for prompt in ("x", "x\n", "x\n\n\n\n\n"):
        params = SamplingParams(temperature=temperature, max_tokens=200, seed=1)
        free = model.generate(prompt, params).result().text
        assert "\n" * (limit + 1) in free
        kept = model.generate(prompt, dataclasses.replace(params, max_newlines=limit)).result().text
        assert not re.search(rf"\n{{{limit + 1}}}", prompt.rstrip("\n")[-1:] + kept)
        before = len(prompt) - len(prompt.rstrip("\n"))
        after = len(kept) - len(kept.lstrip("\n"))
        assert after <= max(0, limit - before)
        assert re.search(rf"\n{{{limit}}}", kept)


NEWLINES = NewlineCounter(
    {5: "\n", 6: "\n\n", 7: "a\n", 8: "\nb", 9: "\n\n\nc", 10: "c\n\n\n", 11: "d\n\n\ne", 12: "\n\n\n"}
)


@pytest.mark.parametrize(
    ("tokens", "limit", "banned"),
    [
        ([], 2, {9, 10, 11, 12}),
        ([], 3, set()),
        ([5], 2, {6, 9, 10, 11, 12}),
        ([5], 3, {9, 12}),
        ([5, 5], 2, {5, 6, 8, 9, 10, 11, 12}),
        ([7], 2, {6, 9, 10, 11, 12}),
        ([7, 5], 2, {5, 6, 8, 9, 10, 11, 12}),
        ([8], 2, {9, 10, 11, 12}),
        ([10], 3, {5, 6, 8, 9, 12}),
        ([6, 5], 4, {6, 9, 12}),
        ([6, 6, 6, 6], 2, {5, 6, 8, 9, 10, 11, 12}),  # those of a prompt
        ([5, 5, 1], 2, {9, 10, 11, 12}),
        ([12, 5, 5], 3, {5, 6, 8, 9, 12}),
        ([5], 1, {5, 6, 8, 9, 10, 11, 12}),
    ],
)
def test_a_newline_limit_bans_tokens_that_would_exceed_it(tokens: list[int], limit: int, banned: set[int]) -> None:
    logits = np.zeros(20, np.float32)
    row = NewlineLimit(NEWLINES, limit)(logits, tokens)
    assert set(np.flatnonzero(np.isneginf(row))) == banned
    assert not logits.any()
    free = NewlineLimit(NEWLINES, limit, allowed=[6, 12])(logits, tokens)
    assert set(np.flatnonzero(np.isneginf(free))) == banned - {6, 12}
    narrow = NewlineLimit(NEWLINES, limit)(logits[:7], tokens)
    assert set(np.flatnonzero(np.isneginf(narrow))) == {n for n in banned if n < 7}


def test_end_tokens_are_never_banned(whole: dict[bool, Model]) -> None:
    (newline,) = whole[True].tokenizer.encode("\n")
    model = noisy(whole[True], "\n")
    params = SamplingParams(temperature=0, max_tokens=50, max_newlines=1, stop_token_ids=(newline, 10**30))
    result = model.generate("x\n", params).result()
    assert (result.tokens, result.finish_reason) == ((newline,), FinishReason.STOP)


def test_reasoning_ends_only_once(whole: dict[bool, Model]) -> None:
    model = noisy(whole[True], START, END, "a")
    for prompt, ends in (([70, START], 1), ([START, 70, END], 0), ([70], 1), ([START, 70, END, 70, START], 1)):
        params = SamplingParams(max_tokens=60, seed=1)
        assert model.generate(prompt, params).result().tokens.count(END) > 5
        kept = model.generate(prompt, dataclasses.replace(params, single_think_end=True)).result().tokens
        starts = kept.count(START)
        assert ends <= kept.count(END) <= ends + starts


def test_a_second_reasoning_section_may_end_too(model_answering: ModelAnswering) -> None:
    tokenizer, logits = model_answering([0]).tokenizer, np.zeros(331, np.float32)
    borders = reasoning_parser(ReasoningDelimiters(ReasoningTokens(START, END), tokenizer), tokenizer)
    guard = SingleThinkEnd(borders)
    free = []
    for token in (5, END, END, START, 5, END, 5):
        borders.push(token)
        free.append(bool(np.isfinite(guard(logits, [])[END])))
    assert free == [True, False, False, True, True, False, False]
    assert not logits.any()


def test_the_guard_is_ignored_without_reasoning(tiny_bundle: Path) -> None:
    model = Model.load(tiny_bundle, "fp32", provider="cpu", threads=1)
    params = SamplingParams(max_tokens=20, seed=1)
    guarded = dataclasses.replace(params, single_think_end=True)
    assert model.generate("x", guarded).result().tokens == model.generate("x", params).result().tokens


def test_guards_become_default_parameters(tiny_bundle: Path, tmp_path: Path) -> None:
    guards = {"max_newlines": 1, "single_think_end": True}
    path = bundle_of(tiny_bundle, tmp_path / "own", special=True, guards=guards)
    model = noisy(Model.load(path, "fp32", provider="cpu", threads=1), "\n", END)
    assert model.default_params == SamplingParams(temperature=0, max_newlines=1, single_think_end=True)
    result = model.generate([70, START]).result()
    assert result.tokens.count(END) == 1
    assert "\n\n" not in result.text
    assert "\n\n" not in result.reasoning


@pytest.mark.parametrize("kind", BACKENDS)
def test_vocabulary_texts_match_decoding(kind: str) -> None:
    tokenizer = Tokenizer(BACKENDS[kind], {}, None)
    for char in ("\n", "e", "é", "☃"):
        found = tokenizer.texts_with(char, range(tokenizer.vocab_size + 70))
        before = tokenizer.token_id("<|im_start|>")
        for number in range(tokenizer.vocab_size + 70):
            text = "" if number in tokenizer.special_ids else tokenizer.decode([before, number], skip_special=False)
            text = text.removeprefix("<|im_start|>")  # removes the token itself at the start
            assert found.get(number, "") == (text if char in text else ""), (number, text)
    assert len(SPECIALS) < tokenizer.vocab_size


def test_a_large_vocabulary_is_searched_quickly() -> None:
    words = {f"w{number:x}": number for number in range(262_143)} | {"a\n\nb": 262_143}
    tokenizer = Tokenizer(Backend(models.WordLevel(words, unk_token="w0")), {}, None)
    began = time.process_time()
    assert tokenizer.texts_with("\n", range(262_144)).keys() == {262_143}
    assert time.process_time() - began < 1
