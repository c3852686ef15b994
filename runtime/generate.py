"""`Model`: a bundle that answers. Every front end iterates what this yields and computes nothing itself."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from llm_edge.runtime.bundle import Bundle, PrecisionInfo
from llm_edge.runtime.errors import BundleError, ContextLengthError, ParameterError
from llm_edge.runtime.sampler import Sampler, SamplingParams
from llm_edge.runtime.session import CHUNK, Logits, Session
from llm_edge.runtime.tokenizer import StopStrings, TextStream, Tokenizer

_GENERATION_CONFIG = "generation_config.json"
_DRAWING_KEYS = ("temperature", "top_k", "top_p", "min_p")

Message = Mapping[str, Any]
"""`{"role": "user", "content": "…"}` and whatever else the model's chat template knows."""


class FinishReason(StrEnum):
    """Why a generation ended.

    STOP: the model ended its answer, or a stop string or stop token came.
    LENGTH: `max_tokens` or the context was used up.
    CANCELLED: the caller asked for it, or began another generation on the same model.
    """

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a generation took, in seconds and tokens.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens drawn, an end token included.
        time_to_first_token: from the call to the first token.
        prefill_seconds: time of the prompt's steps.
        decode_seconds: time from the first token to the last.
    """

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second; 0 where nothing was computed."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens behind the first one per second; 0 for fewer than two tokens."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of a generation.

    Attributes:
        text: what became readable, maybe nothing (half a character, the possible start of a stop string).
        token: the token drawn; None in a last piece that only ends the generation.
        finish_reason: set in the last piece alone, and so are
        timings: the figures of the whole generation.
    """

    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A whole generation: its text, its tokens (an end token included), why it ended and how long it took."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings


class Generation:
    """An answer on its way: iterate it for `Piece`s, or ask for the `result`.

    `cancel` may be called from any thread; the generation ends within one step.
    """

    def __init__(self, pieces: Iterator[Piece], cancelled: threading.Event) -> None:
        self._pieces = pieces
        self._cancelled = cancelled

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def cancel(self) -> None:
        """End it with `FinishReason.CANCELLED`."""
        self._cancelled.set()

    def result(self) -> Result:
        """Run to the end and return everything from here on."""
        texts: list[str] = []
        tokens: list[int] = []
        for piece in self._pieces:
            texts.append(piece.text)
            if piece.token is not None:
                tokens.append(piece.token)
            if piece.finish_reason is not None and piece.timings is not None:
                return Result("".join(texts), tuple(tokens), piece.finish_reason, piece.timings)
        raise ParameterError("this generation has already been read to its end")


class Model:
    """A model for one conversation at a time.

    Beginning a generation, from whatever thread, ends an unfinished one before it.

    Attributes:
        default_params: the model's own sampling, from its generation_config.json.
    """

    def __init__(self, bundle: Bundle, session: Session, tokenizer: Tokenizer, precision: PrecisionInfo) -> None:
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.precision = precision
        self._session = session
        source = bundle.file(_GENERATION_CONFIG)
        config = bundle.json(_GENERATION_CONFIG)
        self.default_params = _own_params(config, source)
        self._end_tokens = frozenset(_end_tokens(config, source))
        self._running = threading.Event()
        self._beginning = threading.Lock()
        self._stepping = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        precision: str | None = None,
        provider: str = "auto",
        threads: int | None = None,
        *,
        verify: bool = True,
    ) -> Model:
        """Load a bundle.

        Args:
            path: the folder.
            precision: one that the bundle holds; None takes int8 where there is one.
            provider: `auto`, `cpu` or `cuda`.
            threads: of onnxruntime inside an operator; None leaves it the physical cores.
            verify: compare the checksums of all that is loaded.

        Raises:
            BundleError: the folder is missing, damaged or changed.
            ProviderError: CUDA was asked for and is not there.
        """
        bundle = Bundle.open(path)
        info = bundle.precision(precision)
        if verify:
            bundle.verify(info.name)
        config = bundle.json("tokenizer_config.json")
        tokenizer = Tokenizer.from_files(bundle.file("tokenizer.json"), config, bundle.chat_template())
        if tokenizer.vocab_size > bundle.shape.vocab_size:
            raise BundleError(f"{bundle.path}: the tokenizer has more tokens than the model: export the bundle again")
        session = Session(bundle.file(info.model), bundle.shape, info.share_buffer, provider, threads)
        return cls(bundle, session, tokenizer, info)

    @property
    def provider(self) -> str:
        """Where the model runs: `cpu` or `cuda`."""
        return self._session.provider

    @property
    def run_seconds(self) -> float:
        """Time spent inside onnxruntime since the model was loaded."""
        return self._session.run_seconds

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer hold together at most."""
        return self._session.limit

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Generation:
        """Answer a conversation in the model's own chat format.

        Text inside the messages that spells a special token stays text.

        Raises:
            TemplateError: the model has no chat template, or it refuses these messages.
            ContextLengthError: the conversation does not fit.
        """
        began = time.perf_counter()
        return self._begin(self.tokenizer.encode_chat(messages), params, began)

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Generation:
        """Continue a text (plain text: special tokens spelled in it stay text) or a list of token ids.

        Raises:
            ParameterError: the prompt is empty or holds ids outside of the vocabulary.
            ContextLengthError: the prompt does not fit.
        """
        began = time.perf_counter()
        tokens = (
            self.tokenizer.encode(prompt, add_special_tokens=True)
            if isinstance(prompt, str)
            else [*map(operator.index, prompt)]
        )
        return self._begin(tokens, params, began)

    def _begin(self, tokens: list[int], params: SamplingParams | None, began: float) -> Generation:
        params = params if params is not None else self.default_params
        if not tokens:
            raise ParameterError("the prompt is empty: give at least one token")
        if not all(0 <= token < self._session.shape.vocab_size for token in tokens):
            raise ParameterError(f"the prompt holds ids outside of the vocabulary of {self._session.shape.vocab_size}")
        if len(tokens) >= self._session.limit:
            raise ContextLengthError(len(tokens), self._session.limit)
        cancelled = threading.Event()
        with self._beginning:
            self._running.set()  # ends the generation before this one
            self._running = cancelled
        return Generation(self._pieces(tokens, params, began, cancelled), cancelled)

    def _pieces(
        self, prompt: list[int], params: SamplingParams, began: float, cancelled: threading.Event
    ) -> Iterator[Piece]:
        session = self._session
        sampler = Sampler(params, prompt)
        stream = TextStream(self.tokenizer)
        stops = StopStrings(params.stop)
        ends = self._end_tokens.union(params.stop_token_ids)
        room = min(params.max_tokens, session.limit - len(prompt))
        first = last = prefilled = started = time.perf_counter()
        count = 0

        def end(text: str, token: int | None, reason: FinishReason) -> Piece:
            timings = Timings(len(prompt), count, first - began if count else 0.0, prefilled - started, last - first)
            return Piece(text, token, reason, timings)

        logits = self._step(prompt[:CHUNK], cancelled, fresh=True)
        for start in range(CHUNK, len(prompt), CHUNK):
            logits = self._step(prompt[start : start + CHUNK], cancelled)
        if logits is not None:
            prefilled = time.perf_counter()
        while logits is not None:
            token = sampler.sample(logits[-1])
            if cancelled.is_set():  # perhaps by a generation that has overwritten these logits meanwhile
                break
            last = time.perf_counter()
            first = first if count else last
            count += 1
            if token in ends:
                text, _ = stops.push(stream.flush())
                yield end(text + stops.flush(), token, FinishReason.STOP)
                return
            text, stopped = stops.push(stream.push(token))
            if stopped:
                yield end(text, token, FinishReason.STOP)
                return
            if count >= room:
                rest, stopped = stops.push(stream.flush())
                tail = "" if stopped else stops.flush()
                yield end(text + rest + tail, token, FinishReason.STOP if stopped else FinishReason.LENGTH)
                return
            yield Piece(text, token)
            logits = self._step([token], cancelled)
        yield end(stops.push(stream.flush())[0] + stops.flush(), None, FinishReason.CANCELLED)

    def _step(self, tokens: list[int], cancelled: threading.Event, *, fresh: bool = False) -> Logits | None:
        """One step, the only one at a time, over an empty cache if `fresh`; None once it is cancelled."""
        with self._stepping:
            if cancelled.is_set():
                return None
            if fresh:
                self._session.reset()
            return self._session.step(tokens)


def _own_params(config: Mapping[str, Any], source: Path) -> SamplingParams:
    """As transformers reads the file: without `do_sample` the most likely token is taken, whatever else it states.

    Only a file that states how to draw and leaves out `do_sample` is taken at its word.
    """
    given = {key: config[key] for key in _DRAWING_KEYS if config.get(key) is not None}
    if not config.get("do_sample", bool(given)):
        given = {"temperature": 0.0}
    for key, name in (("repetition_penalty", "repetition_penalty"), ("max_new_tokens", "max_tokens")):
        if config.get(key) is not None:
            given[name] = config[key]
    try:
        return SamplingParams(**given)
    except ParameterError as error:
        raise BundleError(f"{source}: {error}") from error


def _end_tokens(config: Mapping[str, Any], source: Path) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise BundleError(f"{source}: eos_token_id is {value!r}, not a token id")
    return ids
