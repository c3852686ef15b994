"""The texts of an export: their kinds and lengths, chat templates, what the model generates."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from project import DATA

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.texts import MAX_CALIBRATION, Window, load_texts

PARTS = ("calibration", "probes", "validation")
KINDS = ["prose", "code", "chat", "languages"]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return read_folder(tiny_checkpoint)


def with_template(checkpoint: Checkpoint, template: str | None) -> Checkpoint:
    return dataclasses.replace(checkpoint, tokenizer=dataclasses.replace(checkpoint.tokenizer, chat_template=template))


def kinds(windows: list[Window]) -> list[str]:
    return list(dict.fromkeys(window.kind for window in windows))


def chat(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    return [window.tokens for window in load_texts(checkpoint).validation if window.kind == "chat"]


def test_every_part_holds_each_kind_of_text(checkpoint: Checkpoint) -> None:
    texts = load_texts(checkpoint, sampled=True)
    for windows in (texts.calibration, texts.probes, texts.validation):
        assert kinds(windows) == [*KINDS, "sampled"]
    assert kinds(load_texts(checkpoint).validation) == KINDS


def test_texts_have_bounded_lengths(checkpoint: Checkpoint) -> None:
    texts = load_texts(checkpoint)
    limits = ((texts.calibration, 512, MAX_CALIBRATION), (texts.probes, 128, 1600), (texts.validation, 512, 3000))
    for windows, length, total in limits:
        assert all(1 < len(window.tokens) <= length for window in windows)
        assert total / 8 <= sum(len(window.tokens) for window in windows) <= 1.1 * total


def test_windows_fit_a_short_context(checkpoint: Checkpoint) -> None:
    short = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, max_position_embeddings=48))
    texts = load_texts(short, sampled=True)
    for windows in (texts.calibration, texts.probes, texts.validation):
        assert max(len(window.tokens) for window in windows) == 48


def test_windows_of_running_text_start_as_the_tokenizer_starts_a_prompt(checkpoint: Checkpoint) -> None:
    spec = json.loads(checkpoint.tokenizer.tokenizer_json)
    bos = checkpoint.tokenizer.bos_token_id
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "start", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"start": {"id": "start", "ids": [bos], "tokens": ["<s>"]}},
    }
    assets = dataclasses.replace(checkpoint.tokenizer, tokenizer_json=json.dumps(spec))
    added = load_texts(dataclasses.replace(checkpoint, tokenizer=assets)).calibration
    running = [window.tokens for window in added if window.kind != "chat"]
    assert all(tokens[0] == bos and bos not in tokens[1:] for tokens in running)


def test_conversations_are_rendered_with_the_models_template(checkpoint: Checkpoint) -> None:
    marked = chat(with_template(checkpoint, "{% for message in messages %}[{{ message.content }}]{% endfor %}"))
    plain = chat(with_template(checkpoint, None))
    assert marked != plain
    assert chat(checkpoint) not in (marked, plain)


def test_a_template_that_fails_leaves_conversations_plain(checkpoint: Checkpoint) -> None:
    plain = chat(with_template(checkpoint, None))
    assert chat(with_template(checkpoint, "{{ raise_exception('no') }}")) == plain
    assert chat(with_template(checkpoint, "{% if %}")) == plain


def test_the_date_does_not_change_the_texts(checkpoint: Checkpoint) -> None:
    dated = "{{ strftime_now('%H:%M:%S.%f') }}{% for message in messages %}{{ message.content }}{% endfor %}"
    assert chat(with_template(checkpoint, dated)) == chat(with_template(checkpoint, dated))


def test_generated_text_is_the_same_every_time(checkpoint: Checkpoint) -> None:
    first, second = (load_texts(checkpoint, sampled=True) for _ in range(2))
    assert first == second
    generated = [window.tokens for window in first.calibration if window.kind == "sampled"]
    assert len(set(generated)) == len(generated) >= 2


def test_no_two_parts_share_a_passage() -> None:
    passages = []
    for part in PARTS:
        found = set()
        for path in sorted((DATA / part).iterdir()):
            words = re.findall(r"\w+", path.read_text(encoding="utf-8").lower())
            found |= {tuple(words[start : start + 8]) for start in range(len(words) - 7)}
        assert len(found) > 500
        passages.append(found)
    calibration, probes, validation = passages
    assert calibration.isdisjoint(probes | validation)
    assert probes.isdisjoint(validation)
