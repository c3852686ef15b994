"""Data files of conversations, and small models of both kinds of chat template to encode them for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.finetune.data.encoding import ConversationEncoder, prompt_processor
from llm_edge.finetune.data.formats import parse_row
from llm_edge.finetune.data.sample import Sample

WORDS = [
    *("what", "is", "the", "capital", "of", "France", "Paris", "2+2", "=", "4.", "Why?", "\n", "\n\n", "  ", "naïve"),
    *("你好", "🙂", "def f(x):", "<|im_end|>", "<|answer_end|>", "<|think_start|>", "<|im_start|>user", "</s>", "<b>"),
]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Write a data file; texts are written as they are, other rows as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def random_text(rng: random.Random) -> str:
    return "x" + " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))


def random_rows(count: int, seed: int, *, reasoning: bool) -> list[dict[str, Any]]:
    """Conversations of one to three turns, some with a system message, as `messages`."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": random_text(rng)})
        for _ in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": random_text(rng)})
            answer = {"role": "assistant", "content": random_text(rng)}
            if reasoning and rng.random() < 0.6:
                answer["thinking"] = random_text(rng)
            messages.append(answer)
        rows.append({"messages": messages})
    return rows


def encoder_of(folder: Path, max_length: int = 4096) -> ConversationEncoder:
    """The encoder of a checkpoint."""
    checkpoint = open_checkpoint(str(folder), SourceOptions(), lambda _: None)
    return ConversationEncoder(prompt_processor(checkpoint), max_length)


def samples_of(encoder: ConversationEncoder, row: object) -> tuple[Sample, ...]:
    return encoder.encode(parse_row(row), 1).samples


def texts_of(encoder: ConversationEncoder, row: object) -> list[tuple[str, str]]:
    """Text of prompt and last answer of each sample, special tokens included."""
    tokenizer = encoder.prompts.tokenizer
    return [
        (tokenizer.decode(sample.prompt, skip_special=False), tokenizer.decode(sample.answer, skip_special=False))
        for sample in samples_of(encoder, row)
    ]
