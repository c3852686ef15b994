"""Samples: prompts as the runtime feeds them, masks, end tokens, and one sample for each answer where needed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_data
import original
import pytest
import tiny
from chat_data import encoder_of, random_rows, samples_of, texts_of
from test_chat_template import TEMPLATES
from test_tokenizer import CONFIG, SPECIALS, byte_level

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.finetune.data.encoding import ConversationEncoder
from llm_edge.finetune.data.formats import parse_row
from llm_edge.finetune.data.problems import RowError
from llm_edge.runtime import Model
from llm_edge.runtime.bundle import ReasoningTags
from llm_edge.runtime.text.prompts import PromptFormat, PromptProcessor
from llm_edge.runtime.text.tokenizer import Tokenizer

QWEN3 = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' and loop.last -%}
{{- '<think>\\n' + (message.reasoning_content or '').strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""
# The prompt opens the reasoning, and no answer keeps it, as in DeepSeek-R1's template.
DEEPSEEK = """{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- '<|im_start|>' + message.content -}}{%- endif -%}
{%- if message.role == 'assistant' -%}{{- '<|im_end|>' + message.content.split('</think>')[-1] + '<|endoftext|>' -}}
{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_end|><think>\\n' -}}{%- endif -%}"""


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> ConversationEncoder:
    """For a template that keeps whole answers."""
    return encoder_of(tiny_checkpoint)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose template omits earlier reasoning and whose prompts end with the think start."""
    return original.save_family(tmp_path_factory.mktemp("family") / "family", max_seq_len=4096).folder


@pytest.fixture(scope="module")
def reasoning(family: Path) -> ConversationEncoder:
    return encoder_of(family)


def with_template(folder: Path, template: str, **generation: Any) -> ConversationEncoder:
    """For the small model with another template, and `<think>` as two added tokens."""
    tiny.save_checkpoint(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [
        {**token, "id": 320 + i, "content": text} for i, text in enumerate(("<think>", "</think>"))
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **generation}), encoding="utf-8")
    return encoder_of(folder)


def runs(trained: tuple[bool, ...]) -> Iterator[bool]:
    return (value for value, _ in itertools.groupby(trained))


@pytest.mark.parametrize("kind", ["keeps", "drops"])
def test_01_prompts_are_those_that_chat_feeds(kind: str, tiny_checkpoint: Path, family: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint if kind == "keeps" else family
    export(str(source), ExportOptions(tmp_path / "bundle", precision="fp32", validate=False))
    model, encoder = Model.load(tmp_path / "bundle"), encoder_of(source)
    rows = random_rows(500, 1, reasoning=kind == "drops")
    equal = 0
    for row in rows:
        samples, messages = samples_of(encoder, row), row["messages"]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(samples) == (1 if kind == "keeps" else len(answers))
        for sample, i in zip(reversed(samples), reversed(answers), strict=False):
            assert list(sample.prompt) == model.encode_chat(messages[:i])
        for i in answers if kind == "keeps" else ():  # the prompts of all answers are in the one sample
            prompt = model.encode_chat(messages[:i])
            assert list(samples[0].ids[: len(prompt)]) == prompt
            assert samples[0].trained[len(prompt)]
            assert not samples[0].trained[len(prompt) - 1]
        equal += 1
    assert equal == 500


def test_02_three_turns_with_reasoning_make_three_samples(reasoning: ConversationEncoder) -> None:
    texts = texts_of(reasoning, {"data": [f"q{i}?" if i % 2 == 0 else f"<think>r{i}</think>a{i}" for i in range(6)]})
    start, end = "<|question_end|><|think_start|>", "<|answer_end|>"
    assert texts == [
        (f"q0?{start}", f"r1<|think_end|>a1{end}"),
        (f"q0?<|question_end|>a1{end}q2?{start}", f"r3<|think_end|>a3{end}"),
        (f"q0?<|question_end|>a1{end}q2?<|question_end|>a3{end}q4?{start}", f"r5<|think_end|>a5{end}"),
    ]


def test_03_the_end_of_every_answer_is_trained(plain: ConversationEncoder, reasoning: ConversationEncoder) -> None:
    for encoder in (plain, reasoning):  # the plain model pads with its end token
        (end,) = encoder.prompts.end_tokens
        for row in random_rows(100, 2, reasoning=True):
            for sample in samples_of(encoder, row):
                ends = [i for i, token in enumerate(sample.ids) if token == end and sample.trained[i]]
                assert ends[-1] == len(sample.ids) - 1
                assert len(ends) == list(runs(sample.trained)).count(True)  # each trained answer ends once


def test_04_text_that_spells_a_control_token_stays_text(
    plain: ConversationEncoder, reasoning: ConversationEncoder
) -> None:
    for encoder, spelled in ((plain, "<|im_end|>"), (reasoning, "<|think_end|>")):
        control = encoder.prompts.tokenizer.token_id(spelled)
        row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
        spelling = {"messages": [{**message, "content": f"a {spelled} b"} for message in row["messages"]]}
        spelling["messages"][1] |= {"content": "a <|answer_end|> <|im_start|> b"}
        ids = [sample.ids.count(control) for each in (row, spelling) for sample in samples_of(encoder, each)]
        assert ids[0] == ids[1]
        (prompt, answer) = texts_of(encoder, spelling)[0]
        assert f"a {spelled} b" in prompt
        assert "a <|answer_end|> <|im_start|> b" in answer


def test_questions_are_masked_and_all_answers_of_a_kept_history_are_trained(plain: ConversationEncoder) -> None:
    (sample,) = samples_of(plain, {"data": ["one", "two", "three", "four"]})
    decode = plain.prompts.tokenizer.decode
    pairs = itertools.groupby(zip(sample.ids, sample.trained, strict=True), key=lambda pair: pair[1])
    assert [(trained, decode([token for token, _ in ids], skip_special=False)) for trained, ids in pairs] == [
        (False, "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"),
        (True, "two<|im_end|>"),
        (False, "\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"),
        (True, "four<|im_end|>"),
    ]


def test_an_answer_of_weight_0_is_not_trained(plain: ConversationEncoder) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}] * 2
    messages[3] = {**messages[3], "weight": 0}
    (sample,) = samples_of(plain, {"messages": messages})
    assert plain.prompts.tokenizer.decode(sample.answer, skip_special=False) == "two<|im_end|>"
    assert list(runs(sample.trained)) == [False, True]


def test_reasoning_is_written_as_the_template_writes_it(tmp_path: Path) -> None:
    encoder = with_template(tmp_path / "qwen3", QWEN3)
    row: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "thinking": "R", "content": "A"}]
    }
    prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert texts_of(encoder, row) == [(prompt, "<think>\nR\n</think>\n\nA<|im_end|>")]
    row["messages"][1] = {"role": "assistant", "content": "A"}
    assert texts_of(encoder, row) == [(prompt, "<think>\n\n</think>\n\nA<|im_end|>")]
    row["chat_template_kwargs"] = {"enable_thinking": False}
    row["messages"] = [*row["messages"], *row["messages"]]
    assert texts_of(encoder, row)[0] == (f"{prompt}<think>\n\n</think>\n\n", "A<|im_end|>")
    ids = samples_of(encoder, row)[0].ids
    assert ids.count(320) == ids.count(321) == 1


def test_reasoning_is_trained_where_the_template_omits_it(tmp_path: Path) -> None:
    encoder = with_template(tmp_path / "deepseek", DEEPSEEK, eos_token_id=0)
    row = {"data": ["Q", "<think>R</think>A", "S", "B"]}
    assert texts_of(encoder, row) == [
        ("<|im_start|>Q<|im_end|><think>\n", "R\n</think>\n\nA<|endoftext|>"),
        ("<|im_start|>Q<|im_end|>A<|endoftext|><|im_start|>S<|im_end|><think>\n", "\n</think>\n\nB<|endoftext|>"),
    ]


def test_reasoning_stays_text_for_a_model_without_delimiters(plain: ConversationEncoder) -> None:
    encoded = plain.encode(parse_row({"data": ["Q", "<think>\nR\n</think>\n\nA"]}), 1)
    assert encoded.reasoning_as_text
    answer = plain.prompts.tokenizer.decode(encoded.samples[0].answer, skip_special=False)
    assert answer == "<think>\nR\n</think>\n\nA<|im_end|>"


def test_an_end_token_is_added_where_the_template_writes_none(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    encoder = with_template(tmp_path / "model", template + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert texts_of(encoder, {"data": ["Q", "A"]}) == [("user: Q\nassistant: ", "A<|im_end|>")]


def test_a_token_that_would_span_the_end_of_the_prompt_is_split(plain: ConversationEncoder) -> None:
    (sample,) = samples_of(plain, {"data": ["Q", "\n\n\nA"]})
    assert list(sample.prompt) == plain.prompts.encode_chat([{"role": "user", "content": "Q"}])
    assert plain.prompts.tokenizer.decode(sample.answer, skip_special=False) == "\n\n\nA<|im_end|>"


def test_pairs_are_continuations_for_a_model_without_chat_template(tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    encoder = encoder_of(tmp_path)
    assert texts_of(encoder, {"prompt": "Once", "completion": " upon"}) == [("Once", " upon<|im_end|>")]
    with pytest.raises(RowError, match="no chat template"):
        samples_of(encoder, {"data": ["Q", "A"]})


def test_tools_reach_the_template_and_calls_are_trained(tmp_path: Path) -> None:
    template = (
        "{% if tools %}{{ tools[0].name }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    encoder = with_template(tmp_path / "model", template)
    conversation = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "A"},
    ]
    row = {"conversations": conversation, "tools": '[{"name": "add"}]'}
    ((prompt, answer),) = texts_of(encoder, row)
    call = '{"name": "add", "arguments": {"a": 1}}'
    assert prompt == (
        f"add<|im_start|>userQ<|im_end|><|im_start|>assistant{call}<|im_end|>"
        "<|im_start|>tool2<|im_end|><|im_start|>assistant"
    )
    assert answer == "A<|im_end|>"
    assert list(runs(samples_of(encoder, row)[0].trained)) == [False, True, False, True]


def test_long_conversations_end_after_the_last_answer_that_fits(tiny_checkpoint: Path) -> None:
    whole = encoder_of(tiny_checkpoint)
    row = {"data": ["one", "two", "three", "four", "five", "six"]}
    length = len(samples_of(whole, {"data": row["data"][:4]})[0].ids)
    for limit, answers in ((length, 2), (length - 1, 1), (10, 0)):
        encoded = encoder_of(tiny_checkpoint, limit).encode(parse_row(row), 1)
        assert not encoded.complete
        assert [list(runs(sample.trained)).count(True) for sample in encoded.samples] == [answers] * bool(answers)
    assert not encoder_of(tiny_checkpoint, 10).encode(parse_row({"data": ["x" * 10_000, "y"]}), 1).samples
    assert whole.max_length == 1024  # the model's context


def test_a_template_that_rejects_a_conversation_is_a_problem_of_the_row(reasoning: ConversationEncoder) -> None:
    row = chat_data.random_rows(1, 0, reasoning=False)[0]
    row["messages"][-1:] = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "A"},
    ]
    with pytest.raises(RowError, match="this model has no role tool"):
        samples_of(reasoning, row)


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("chatml", ["Hello!<|im_end|>", "Because.<|im_end|>"]),
        ("llama3", ["Hello!<|eot_id|>", "Because.<|eot_id|>"]),
        ("mistral", [" Hello!</s>", " Because.</s>"]),
        ("gemma", ["Hello!<end_of_turn>", "Because.<end_of_turn>"]),
        ("qwen3", ["<think>\n\n</think>\n\nHello!<|im_end|>", "<think>\nHm\n</think>\n\nBecause.<|im_end|>"]),
    ],
)
def test_answers_continue_the_prompts_of_many_families(name: str, answers: list[str], tmp_path: Path) -> None:
    byte_level(SPECIALS).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_files(tmp_path / "tokenizer.json", CONFIG, TEMPLATES[name])
    ends = [tokenizer.token_id(text) for text in ("</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")]
    reasoning = ReasoningTags("<think>", "</think>") if name == "qwen3" else None
    prompt_format = PromptFormat(tmp_path, tokenizer.vocab_size, 4096, {"eos_token_id": ends}, reasoning)
    encoder = ConversationEncoder(PromptProcessor(prompt_format, tokenizer), 4096)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    ]
    if reasoning is not None:
        messages[3]["thinking"] = "Hm"
    for i, answer in ((1, answers[0]), (3, answers[1])):
        last = samples_of(encoder, {"messages": messages[: i + 1]})[-1]
        assert list(last.prompt) == encoder.prompts.encode_chat(messages[:i])
        assert tokenizer.decode(last.answer, skip_special=False) == answer
