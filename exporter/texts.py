"""The texts of an export, tokenized: for calibration, for choosing formats, and for validation.

They have no passage in common. Each is a list of windows that start from an empty context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.runtime.backend.limits import MAX_STEP_TOKENS
from llm_edge.runtime.errors import CheckpointError

_CALIBRATION_WINDOW = 512  # tokens
_MIN_CALIBRATION, MAX_CALIBRATION = 2048, 8192
"""Tokens; models between these limits use `_TOKENS_PER_INPUT` times the width of their widest projection."""
_TOKENS_PER_INPUT = 8
_PROBE, _PROBES = 128, 12  # length and number of windows


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a text, which starts from an empty context, and the kind of text it is."""

    tokens: tuple[int, ...]
    kind: str = "text"


@dataclass(frozen=True, slots=True)
class Texts:
    """Windows of texts.

    Attributes:
        calibration: on which errors of rounding are compensated.
        probes: on which formats are compared; short, so that all of them can be.
        validation: on which the exported model is compared with the reference.
    """

    calibration: list[Window]
    probes: list[Window]
    validation: list[Window]


def load_texts(checkpoint: Checkpoint) -> Texts:
    """Tokenize the texts included in this package.

    Raises:
        CheckpointError: the tokenizer cannot be loaded, or does not belong to the weights.
    """
    config, context = checkpoint.config, checkpoint.config.max_position_embeddings
    tokenizer = _load_tokenizer(checkpoint)
    calibration, validation = (_encode(tokenizer, name) for name in ("calibration.txt", "validation.txt"))
    limit = min(max(_TOKENS_PER_INPUT * config.intermediate_size, _MIN_CALIBRATION), MAX_CALIBRATION)
    held_out = min(_PROBE * _PROBES, len(calibration) // 4)
    windows = split_windows(calibration[held_out:][:limit], min(_CALIBRATION_WINDOW, context))
    whole = [window for window in windows if len(window.tokens) == len(windows[0].tokens)]
    return Texts(
        whole,
        split_windows(calibration[:held_out], min(_PROBE, context)),
        split_windows(validation, min(MAX_STEP_TOKENS, context)),
    )


def split_windows(tokens: Sequence[int], length: int, kind: str = "text") -> list[Window]:
    """Split a text into windows of up to `length` tokens; at least one."""
    windows = [Window(tuple(tokens[start : start + length]), kind) for start in range(0, len(tokens), length)]
    return [window for window in windows if len(window.tokens) > 1] or [Window(tuple(tokens[:1]), kind)]


def _load_tokenizer(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json)
    except Exception as error:
        raise CheckpointError(f"tokenizer.json cannot be loaded ({error}): replace it by the model's own") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= checkpoint.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has a token {largest}, but the model's vocabulary has {checkpoint.config.vocab_size} "
            "tokens: use the tokenizer that belongs to the weights"
        )
    return tokenizer


def _encode(tokenizer: tokenizers.Tokenizer, name: str) -> list[int]:
    text = (Path(__file__).parent / "data" / name).read_text(encoding="utf-8")
    tokens = list(tokenizer.encode(text, add_special_tokens=False).ids)
    if len(tokens) < 2:
        raise CheckpointError("tokenizer.json encodes English text to no tokens: replace it by the model's own")
    return tokens
