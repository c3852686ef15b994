"""How many tokens a step computes."""

from __future__ import annotations

MAX_STEP_TOKENS = 512
"""Maximum number of tokens in a step, so that memory and the time to a cancel stay bounded."""
PREFILL_CHUNK = 256
"""Prompt tokens per step: their activations stay in the processor's caches; see bench/RESULTS.md."""

CHUNK_ALIGNMENT = 8
"""Prompts are split at multiples of this many tokens, so that splits do not affect results; see docs/decisions.md."""
