"""Figures of an answer, such as its speed: `figures_of` to store, `figures_line` to show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_edge.chat.parameters import MAX_SUMMARY_VALUE, summarize, title_of
from llm_edge.chat.text import one_line
from llm_edge.runtime.results import FinishReason, Timings

_ENDS = {
    FinishReason.STOP: "complete",
    FinishReason.LENGTH: "cut off at the limit",
    FinishReason.CANCELLED: "stopped",
}


def figures_of(timings: Timings, reason: FinishReason, detail: str) -> dict[str, Any]:
    """The figures of an answer as JSON values, as they are stored with it."""
    return {
        "tokens": timings.completion_tokens,
        "reasoning_tokens": timings.reasoning_tokens,
        "prompt_tokens": timings.prompt_tokens,
        "cached_tokens": timings.cached_tokens,
        "tokens_per_second": round(timings.decode_tokens_per_second, 1),
        "time_to_first_token": round(timings.time_to_first_token, 3),
        "precision": detail,
        "finish_reason": reason.value,
    }


def figures_line(figures: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> str:
    """The figures as one line, followed by lines with the parameters, their changes, and a note."""
    parts = []
    if "error" in figures:
        parts.append(f"error: {figures['error']}")
    if "tokens" in figures:
        tokens, reasoning = figures["tokens"], figures.get("reasoning_tokens")
        parts.append(f"{tokens} token{'s' * (tokens != 1)}" + (f" ({reasoning} reasoning)" if reasoning else ""))
    if figures.get("tokens_per_second"):
        parts.append(f"{figures['tokens_per_second']:.1f} tok/s")
    if figures.get("time_to_first_token"):
        parts.append(f"first token {figures['time_to_first_token']:.2f} s")
    if figures.get("precision"):
        parts.append(str(figures["precision"]))
    if figures.get("finish_reason"):
        reason = str(figures["finish_reason"])
        parts.append(_ENDS.get(reason, reason))  # type: ignore[call-overload]
    lines = [" · ".join(parts)] if parts else []
    if shown := summarize({name: value for name, value in (params or {}).items() if name != "logprobs"}):
        lines.append(f"with {shown}")
    changes = figures.get("changes") or []
    if changes:
        lines.append(f"changed mid-answer: {', '.join(map(_change, changes))}")
    if "note" in figures:
        lines.append(str(figures["note"]))
    return "\n".join(lines)


def _change(change: Mapping[str, Any]) -> str:
    value = one_line(str(change["value"]), MAX_SUMMARY_VALUE)
    since = "the next answer" if change["at"] is None else f"token {change['at']}"
    return f"{title_of(str(change['name']))} {value} from {since}".replace("  ", " ")
