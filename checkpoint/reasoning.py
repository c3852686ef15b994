"""Finds the marks around a model's reasoning in its tokenizer and chat template. Knows no model."""

from __future__ import annotations

import json

import tokenizers

from llm_edge.runtime.bundle import ReasoningTags, ReasoningTokens

_PAIRS = (
    ("<think>", "</think>"),  # Qwen3, SmolLM3, DeepSeek's distillations, Olmo 3 and those that follow them
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
)
"""How families spell them; where several would fit, the first does."""


def find_reasoning(tokenizer_json: str, chat_template: str | None) -> ReasoningTokens | ReasoningTags | None:
    """What opens and closes a reasoning: two added tokens of a `tokenizer.json`, or else two texts.

    Texts are such where the chat template writes or looks for either of them, and where the end is an added token and
    the start begins with one.
    """
    try:
        entries = json.loads(tokenizer_json).get("added_tokens", [])
        ids = {entry["content"]: entry["id"] for entry in entries}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return None  # not a tokenizer, which another step tells better
    for start, end in _PAIRS:
        first, last = ids.get(start), ids.get(end)
        if isinstance(first, int) and isinstance(last, int) and first != last:
            return ReasoningTokens(first, last)
    for start, end in _PAIRS:
        written = chat_template is not None and (start in chat_template or end in chat_template)
        added = end in ids and any(isinstance(text, str) and text and start.startswith(text) for text in ids)
        if (written or added) and _can_write(tokenizer_json, start, end):
            return ReasoningTags(start, end)
    return None


def _can_write(tokenizer_json: str, *texts: str) -> bool:
    """Whether its tokens spell these; some vocabularies lack characters."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception:  # noqa: BLE001 (the library raises just that; another step tells it better)
        return False
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    decoded = [tokenizer.decode(ids, skip_special_tokens=False) for ids in encoded]
    return all(text in whole for text, whole in zip(texts, decoded, strict=True))
