"""`find_reasoning`: detects the tags around a model's reasoning from its tokenizer and chat template."""

from __future__ import annotations

import json

import tokenizers

from llm_edge.runtime.bundle import ReasoningTags, ReasoningTokens

_TAG_PAIRS = (  # in order of preference
    ("<think>", "</think>"),  # Qwen3, SmolLM3, DeepSeek's distilled models, Olmo 3 and others
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
)


def find_reasoning(tokenizer_json: str, chat_template: str | None) -> ReasoningTokens | ReasoningTags | None:
    """Return what opens and closes the reasoning: two added tokens of the tokenizer, else two text tags, else None.

    Text tags are detected if the chat template contains one of them, or if the end tag is an added token and the
    start tag begins with an added token.
    """
    try:
        entries = json.loads(tokenizer_json).get("added_tokens", [])
        ids = {entry["content"]: entry["id"] for entry in entries}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return None  # not a valid tokenizer, which the export reports with a better message
    for start, end in _TAG_PAIRS:
        first, last = ids.get(start), ids.get(end)
        if isinstance(first, int) and isinstance(last, int) and first != last:
            return ReasoningTokens(first, last)
    for start, end in _TAG_PAIRS:
        in_template = chat_template is not None and (start in chat_template or end in chat_template)
        in_added = end in ids and any(isinstance(text, str) and text and start.startswith(text) for text in ids)
        if (in_template or in_added) and _can_encode(tokenizer_json, start, end):
            return ReasoningTags(start, end)
    return None


def _can_encode(tokenizer_json: str, *texts: str) -> bool:
    """Whether the vocabulary can represent these texts; some vocabularies lack characters."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception:  # noqa: BLE001 (the library raises only this; the export reports it with a better message)
        return False
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    decoded = [tokenizer.decode(ids, skip_special_tokens=False) for ids in encoded]
    return all(text in whole for text, whole in zip(texts, decoded, strict=True))
