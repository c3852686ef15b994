"""Finds the tokens around a model's reasoning in its tokenizer. Knows no model."""

from __future__ import annotations

import json

from llm_edge.runtime.bundle import ReasoningTokens

_START, _END = "<think>", "</think>"
"""How Qwen3, SmolLM3, DeepSeek's distillations and those that follow them spell these."""


def find_reasoning(tokenizer_json: str) -> ReasoningTokens | None:
    """The tokens that open and close a reasoning, where a `tokenizer.json` has both as added tokens."""
    try:
        entries = json.loads(tokenizer_json).get("added_tokens", [])
        ids = {entry["content"]: entry["id"] for entry in entries}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return None  # not a tokenizer, which another step tells better
    start, end = ids.get(_START), ids.get(_END)
    return ReasoningTokens(start, end) if isinstance(start, int) and isinstance(end, int) and start != end else None
