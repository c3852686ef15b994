"""`Model`: a bundle that answers. Every front end iterates what this yields and computes nothing itself."""

from __future__ import annotations

import functools
import operator
import reprlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from llm_edge.runtime.bundle import MANIFEST, TORCHSCRIPT, Bundle, PrecisionInfo
from llm_edge.runtime.errors import BundleError, ContextLengthError, ParameterError, TemplateError
from llm_edge.runtime.guards import NewlineLimit, Newlines, SingleThinkEnd
from llm_edge.runtime.reasoning import AnswerStream, apart
from llm_edge.runtime.sampler import LogitsProcessor, Sampler, SamplingParams
from llm_edge.runtime.session import PREFILL, AnySession, Logits, open_session
from llm_edge.runtime.tokenizer import Tokenizer

_GENERATION_CONFIG = "generation_config.json"
_DRAWING_KEYS = ("temperature", "top_k", "top_p", "min_p")
_OTHER_KEYS: Mapping[str, str] = {
    "repetition_penalty": "repetition_penalty",
    "repetition_window": "repetition_window",
    "max_new_tokens": "max_tokens",
}

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
        reasoning_tokens: tokens drawn for the reasoning, those that start and end it included; the rest of
            `completion_tokens` is the answer.
    """

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float
    prefill_seconds: float
    decode_seconds: float
    reasoning_tokens: int = 0

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
        reasoning: the text belongs to the reasoning and not to the answer; see `AnswerStream` for the border.
    """

    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    reasoning: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """A whole generation.

    Attributes:
        text: the answer alone.
        tokens: all that were drawn, those of the reasoning and an end token included.
        finish_reason: why it ended.
        timings: how long it took.
        reasoning: text of the reasoning; empty for models that do not reason, and where `Bundle.reasoning` is None.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    reasoning: str = ""


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
        answer: list[str] = []
        reasoning: list[str] = []
        tokens: list[int] = []
        for piece in self._pieces:
            (reasoning if piece.reasoning else answer).append(piece.text)
            if piece.token is not None:
                tokens.append(piece.token)
            if piece.finish_reason is not None and piece.timings is not None:
                reason, timings = piece.finish_reason, piece.timings
                return Result("".join(answer), tuple(tokens), reason, timings, "".join(reasoning))
        raise ParameterError("this generation has already been read to its end")


class Model:
    """A model for one conversation at a time.

    Beginning a generation, from whatever thread, ends an unfinished one before it.

    Attributes:
        default_params: the model's own sampling, from its generation_config.json and the guards of its manifest.
    """

    def __init__(self, bundle: Bundle, session: AnySession, tokenizer: Tokenizer, precision: PrecisionInfo) -> None:
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.precision = precision
        self._session = session
        source = bundle.file(_GENERATION_CONFIG)
        config = bundle.json(_GENERATION_CONFIG)
        self.default_params = _own_params(config, source, bundle)
        self._end_tokens = frozenset(_end_tokens(config, source))
        self._marks = _marks(bundle, tokenizer)
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
            threads: of onnxruntime inside an operator; None leaves it the physical cores. TorchScript: of torch, for
                the whole process.
            verify: compare the checksums of all that is loaded. TorchScript is a program, and loaded verified only.

        Raises:
            BundleError: the folder is missing, damaged or changed.
            ParameterError: a TorchScript bundle that shall not be verified.
            InputError: a TorchScript bundle where torch is missing.
            ProviderError: CUDA was asked for and is not there.
        """
        bundle = Bundle.open(path)
        info = bundle.precision(precision)
        if info.format == TORCHSCRIPT and not verify:
            raise ParameterError(f"{bundle.path}: TorchScript is a program: it is loaded with verify=True only")
        if verify:
            bundle.verify(info.name)
        config = bundle.json("tokenizer_config.json")
        tokenizer = Tokenizer.from_files(bundle.file("tokenizer.json"), config, bundle.chat_template())
        if tokenizer.vocab_size > bundle.shape.vocab_size:
            raise BundleError(f"{bundle.path}: the tokenizer has more tokens than the model: export the bundle again")
        session = open_session(bundle.file(info.model), bundle.shape, info.format, info.share_buffer, provider, threads)
        return cls(bundle, session, tokenizer, info)

    @property
    def provider(self) -> str:
        """Where the model runs: `cpu` or `cuda`."""
        return self._session.provider

    @property
    def run_seconds(self) -> float:
        """Time spent inside onnxruntime (or torch) since the model was loaded."""
        return self._session.run_seconds

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer hold together at most."""
        return self._session.limit

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Answer a conversation in the model's own chat format; see `encode_chat`.

        Raises:
            ParameterError: `template_variables` is no mapping.
            TemplateError: the model has no chat template, or it refuses these messages or variables.
            ContextLengthError: the conversation does not fit.
        """
        began = time.perf_counter()
        return self._begin(self.encode_chat(messages, template_variables), params, began)

    def encode_chat(
        self, messages: Sequence[Message], template_variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The ids of the prompt that a conversation makes.

        Text inside the messages that spells a special token stays text. One thing is read out of it: an assistant
        message may still hold its reasoning, up to the text of the token that ends it. Where the template does
        not see that token, for it is special, the reasoning becomes the message's `reasoning_content`, which may
        also be given so; most templates leave it out of all turns but the last.

        Args:
            messages: the conversation.
            template_variables: what the chat template knows beyond the messages, as `enable_thinking` or `tools`.

        Raises:
            ParameterError: `template_variables` is no mapping.
            TemplateError: the model has no chat template, or it refuses these messages or variables.
        """
        if not isinstance(template_variables, Mapping | None):
            raise ParameterError(f"template_variables is {reprlib.repr(template_variables)}: give a mapping by name")
        variables = dict(template_variables or {})
        if not all(isinstance(name, str) and name not in ("messages", "self") for name in variables):
            raise TemplateError("template_variables: a mapping by name, without 'messages', was expected")
        if self._marks is not None:
            messages = apart(messages, *self._marks)
        return self.tokenizer.encode_chat(messages, **variables)

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
        ends = self._end_tokens.union(params.stop_token_ids)
        sampler = Sampler(params, prompt, self._processors(params, ends))
        stream = AnswerStream(self.tokenizer, params.stop, self.bundle.reasoning, prompt, self._end_tokens)
        room = min(params.max_tokens, session.limit - len(prompt))
        first = last = prefilled = started = time.perf_counter()
        count = 0

        def end(text: str, token: int | None, reason: FinishReason) -> Piece:
            to_first = first - began if count else 0.0
            seconds = to_first, prefilled - started, last - first
            timings = Timings(len(prompt), count, *seconds, stream.reasoning_tokens)
            return Piece(text, token, reason, timings, stream.reasoning)

        logits = self._step(prompt[:PREFILL], cancelled, fresh=True)
        for start in range(PREFILL, len(prompt), PREFILL):
            logits = self._step(prompt[start : start + PREFILL], cancelled)
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
                yield end(stream.flush(), token, FinishReason.STOP)
                return
            text = stream.push(token)
            if stream.stopped:
                yield end(text, token, FinishReason.STOP)
                return
            if count >= room:
                text += stream.flush()
                yield end(text, token, FinishReason.STOP if stream.stopped else FinishReason.LENGTH)
                return
            yield Piece(text, token, reasoning=stream.reasoning)
            logits = self._step([token], cancelled)
        yield end(stream.flush(), None, FinishReason.CANCELLED)

    def _processors(self, params: SamplingParams, ends: frozenset[int]) -> list[LogitsProcessor]:
        made: list[LogitsProcessor] = []
        if params.max_newlines:
            made.append(NewlineLimit(self._newlines, params.max_newlines, ends))
        if params.single_think_end and self.bundle.reasoning is not None:
            made.append(SingleThinkEnd(self.bundle.reasoning.start, self.bundle.reasoning.end))
        return made

    @functools.cached_property
    def _newlines(self) -> Newlines:
        return Newlines(self.tokenizer.texts_with("\n", range(self._session.shape.vocab_size)))

    def _step(self, tokens: list[int], cancelled: threading.Event, *, fresh: bool = False) -> Logits | None:
        """One step, the only one at a time, over an empty cache if `fresh`; None once it is cancelled."""
        with self._stepping:
            if cancelled.is_set():
                return None
            if fresh:
                self._session.reset()
            return self._session.step(tokens)


def _own_params(config: Mapping[str, Any], source: Path, bundle: Bundle) -> SamplingParams:
    """As transformers reads the file: without `do_sample` the most likely token is taken, whatever else it states.

    Only a file that states how to draw and leaves out `do_sample` is taken at its word.
    """
    given = {key: config[key] for key in _DRAWING_KEYS if config.get(key) is not None}
    if not config.get("do_sample", bool(given)):
        given = {"temperature": 0.0}
    given |= {name: config[key] for key, name in _OTHER_KEYS.items() if config.get(key) is not None}
    if bundle.guards is not None:
        given |= {"max_newlines": bundle.guards.max_newlines or 0, "single_think_end": bundle.guards.single_think_end}
    try:
        return SamplingParams(**given)
    except ParameterError as error:
        raise BundleError(f"{source}: {error}") from error


def _marks(bundle: Bundle, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """How the tokens around a reasoning are written, if templates cannot find them in the text of messages."""
    if bundle.reasoning is None:
        return None
    start, end = tokenizer.token_text(bundle.reasoning.start), tokenizer.token_text(bundle.reasoning.end)
    if start is None or end is None:
        raise BundleError(
            f"{bundle.path / MANIFEST}: tokenizer.json does not have the tokens of 'reasoning': export the bundle again"
        )
    return (start, end) if bundle.reasoning.end in tokenizer.special_ids else None


def _end_tokens(config: Mapping[str, Any], source: Path) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise BundleError(f"{source}: eos_token_id is {value!r}, not a token id")
    return ids
