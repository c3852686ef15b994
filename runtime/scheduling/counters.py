"""`Counters`: what an engine has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What an engine has done since it was created; `Engine.counters` returns a copy.

    Attributes:
        requests: requests accepted; each is finished, cancelled, failed, waiting or active.
        finished: requests that ended with a complete generation.
        cancelled: requests that were cancelled.
        failed: requests that ended with an error.
        refused: requests rejected because too many were waiting.
        waiting: requests waiting for a slot now.
        active: requests that have a slot now.
        prompt_tokens: prompt tokens of requests that got a slot.
        cached_tokens: how many of `prompt_tokens` were cached.
        completion_tokens: tokens generated.
        draft_tokens: draft tokens verified.
        accepted_tokens: how many of `draft_tokens` were accepted.
        prefill_steps: steps over chunks of prompts.
        decode_steps: steps over generated tokens, of one sequence or several.
        prefill_seconds: duration of the prefill steps.
        decode_seconds: duration of the decode steps.
        evictions: how many times the tokens of an idle slot were dropped.
        kept_tokens: tokens cached in idle slots now.
        kept_bytes: memory of idle slots: `kept_tokens`, and states.
    """

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    waiting: int = 0
    active: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    evictions: int = 0
    kept_tokens: int = 0
    kept_bytes: int = 0
