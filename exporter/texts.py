"""The texts of an export, tokenized: for calibration, for choosing formats, and for validation.

They have no passage in common. Each consists of several kinds of text, as windows that start from an empty context.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from llm_edge.checkpoint.base import AnyCheckpoint, Checkpoint
from llm_edge.exporter.sampled_text import can_sample, sample_text
from llm_edge.model.decoder import count_parameters
from llm_edge.runtime.backend.limits import MAX_STEP_TOKENS
from llm_edge.runtime.errors import CheckpointError, InputError
from llm_edge.runtime.text.chat_template import ChatTemplate
from llm_edge.runtime.text.tokenizer_files import named_tokens

_FOLDER = Path(__file__).parent / "data"
_CALIBRATION_WINDOW = 512  # tokens
_PROBE_WINDOW = 128
_MIN_CALIBRATION, MAX_CALIBRATION, _LARGE_MODEL_CALIBRATION = 2048, 14_336, 8192
"""Tokens; models between these limits use `_TOKENS_PER_INPUT` times the width of their widest projection."""
_TOKENS_PER_INPUT = 10
_LARGE_MODEL = 500_000_000  # weights

PROSE, CODE, CHAT, LANGUAGES, SAMPLED = "prose", "code", "chat", "languages", "sampled"
_Shares = Mapping[str, int]  # tokens by kind
_CALIBRATION: _Shares = {PROSE: 6144, CODE: 4096, CHAT: 2304, LANGUAGES: 1024, SAMPLED: 768}
_PROBES: _Shares = {PROSE: 256, CODE: 256, CHAT: 256, LANGUAGES: 128, SAMPLED: 128}
_VALIDATION: _Shares = {PROSE: 1024, CODE: 512, CHAT: 544, LANGUAGES: 384, SAMPLED: 384}

_SAMPLED_TOKENS = 64  # generated after each prompt
# Templates may write today's date, but the same source is exported to the same bytes on every day.
_FIXED_DATE = "{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro -%}"


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


def load_texts(checkpoint: Checkpoint, *, sampled: bool = False) -> Texts:
    """Tokenize the texts included in this package.

    Args:
        checkpoint: the model.
        sampled: let the model generate a part of each text, if it is small enough (see `can_sample`).

    Raises:
        CheckpointError: the tokenizer cannot be loaded, or does not belong to the weights.
    """
    config = checkpoint.config
    encoder = _Encoder(checkpoint)
    most = MAX_CALIBRATION if count_parameters(config) <= _LARGE_MODEL else _LARGE_MODEL_CALIBRATION
    calibration = _calibration_shares(config.intermediate_size, most)
    generated = _sample(checkpoint, encoder) if sampled and can_sample(config) else {}
    parts = (
        ("calibration", calibration, _CALIBRATION_WINDOW),
        ("probes", _PROBES, _PROBE_WINDOW),
        ("validation", _VALIDATION, MAX_STEP_TOKENS),
    )
    context = config.max_position_embeddings
    return Texts(
        *(
            _windows(encoder, part, shares, generated.get(part, []), min(length, context))
            for part, shares, length in parts
        )
    )


def load_calibration(checkpoint: AnyCheckpoint, width: int) -> list[Window]:
    """Tokenize the calibration text alone, for projections of up to `width` inputs; see `load_texts`."""
    length = min(_CALIBRATION_WINDOW, checkpoint.config.max_position_embeddings)
    shares = _calibration_shares(width, MAX_CALIBRATION)
    return _windows(_Encoder(checkpoint), "calibration", shares, [], length)


def load_validation(checkpoint: AnyCheckpoint) -> list[Window]:
    """Tokenize the validation text alone; see `load_texts`."""
    length = min(MAX_STEP_TOKENS, checkpoint.config.max_position_embeddings)
    return _windows(_Encoder(checkpoint), "validation", _VALIDATION, [], length)


def _calibration_shares(width: int, most: int) -> _Shares:
    """Return the tokens of the calibration text by kind; `most` in total."""
    limit = min(max(_TOKENS_PER_INPUT * width, _MIN_CALIBRATION), most)
    return {kind: tokens * limit // MAX_CALIBRATION for kind, tokens in _CALIBRATION.items()}


def split_windows(
    tokens: Sequence[int], length: int, kind: str = "text", beginning: Sequence[int] = ()
) -> list[Window]:
    """Split a text into windows of up to `length` tokens, each of which starts with `beginning`; at least one."""
    length = max(length - len(beginning), 1)
    parts = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return [Window((*beginning, *part), kind) for part in parts if len(part) > 1 or len(tokens) == 1]


def _windows(
    encoder: _Encoder, part: str, shares: _Shares, sampled: Sequence[Sequence[int]], length: int
) -> list[Window]:
    """Return the windows of a part, of each kind up to its number of tokens; without generated text, more prose."""
    windows = []
    missing = 0 if sampled else shares[SAMPLED]
    for kind, share in shares.items():
        limit = share + missing if kind == PROSE else share
        documents: list[Sequence[int]]
        if kind == CHAT:
            documents = [encoder.conversation(messages) for messages in _read_json(part, "chat.json")]
        elif kind == SAMPLED:
            documents = list(sampled)
        else:
            documents = [encoder.text((_FOLDER / part / f"{kind}.txt").read_text(encoding="utf-8")[: 16 * limit])]
        beginning = encoder.beginning if kind in (PROSE, CODE, LANGUAGES) else ()
        left = limit
        for document in documents:
            tokens = document[:left]
            if len(tokens) > 1:
                windows += split_windows(tokens, length, kind, beginning)
            left -= len(tokens)
        if kind == PROSE and not windows:
            raise CheckpointError("tokenizer.json encodes English text to no tokens: replace it by the model's own")
    return windows


def _sample(checkpoint: Checkpoint, encoder: _Encoder) -> dict[str, list[tuple[int, ...]]]:
    """Return text generated by the model, by part."""
    parts = ("calibration", "probes", "validation")
    prompts = {part: [encoder.prompt(prompt) for prompt in _read_json(part, "prompts.json")] for part in parts}
    context = checkpoint.config.max_position_embeddings
    given = [prompt[: max(context - _SAMPLED_TOKENS, 1)] for part in parts for prompt in prompts[part]]
    if not all(given):
        return {}
    new_tokens = min(_SAMPLED_TOKENS, context - max(map(len, given)))
    sequences = iter(
        sample_text(checkpoint.config, checkpoint.weights, given, new_tokens, checkpoint.tokenizer.eos_token_ids)
    )
    return {part: [next(sequences) for _ in prompts[part]] for part in parts}


def _read_json(part: str, name: str) -> list[Any]:
    found: list[Any] = json.loads((_FOLDER / part / name).read_text(encoding="utf-8"))
    return found


class _Encoder:
    """Tokenizes texts and conversations for one model.

    Attributes:
        beginning: tokens that start each text.
    """

    def __init__(self, checkpoint: AnyCheckpoint) -> None:
        self._tokenizer = _load_tokenizer(checkpoint)
        self.beginning = self._find_beginning()
        assets = checkpoint.tokenizer
        self._template: ChatTemplate | None = None
        if assets.chat_template is not None:
            try:
                named = named_tokens(assets.tokenizer_config, Path("tokenizer_config.json"))
                self._template = ChatTemplate(_FIXED_DATE + assets.chat_template, named)
            except InputError:
                pass  # conversations are written without it

    def text(self, text: str) -> list[int]:
        """Return the tokens of a text without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def conversation(self, messages: Sequence[Mapping[str, str]], *, answer: bool = False) -> list[int]:
        """Return the tokens of a conversation, up to the beginning of the next `answer` if there is one."""
        if self._template is not None:
            try:
                return self.text(self._template.render(messages, add_generation_prompt=answer))
            except InputError:
                pass  # the template does not support such a conversation
        turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
        return [*self.beginning, *self.text("\n\n".join([*turns, "Assistant:"] if answer else turns))]

    def prompt(self, prompt: str | Mapping[str, str]) -> list[int]:
        """Return the tokens of a prompt: the beginning of a text, or a message to be answered."""
        if isinstance(prompt, str):
            return [*self.beginning, *self.text(prompt)]
        return self.conversation([prompt], answer=True)

    def _find_beginning(self) -> list[int]:
        """Return the tokens that the tokenizer adds in front of a text."""
        text = self.text("a")
        ids = list(self._tokenizer.encode("a", add_special_tokens=True).ids)
        starts = [start for start in range(len(ids)) if text and ids[start : start + len(text)] == text]
        return ids[: starts[0]] if starts else []


def _load_tokenizer(checkpoint: AnyCheckpoint) -> tokenizers.Tokenizer:
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
