"""What an engine counts. Knows nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What an engine has done since it was made, in requests, tokens and seconds; `Engine.counters` copies them.

    Attributes:
        requests: that were taken; each is finished, cancelled, failed, waiting or active.
        refused: because too many were waiting.
        prompt_tokens: of requests that have begun, and how many of them were
        cached_tokens: computed for an earlier request.
        completion_tokens: drawn.
        guessed_tokens: computed on a guess, and how many of them were
        accepted_tokens: right.
        prefill_steps: of prompts, and
        decode_steps: of answers, one or many at a time.
        prefill_seconds: in onnxruntime, for prompts, and
        decode_seconds: for answers.
        evictions: times that tokens of an idle row were let go.
        kept_tokens: in idle rows now, and
        kept_bytes: their memory.
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
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    evictions: int = 0
    kept_tokens: int = 0
    kept_bytes: int = 0
