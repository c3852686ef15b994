"""`Engine`: one model, many callers, from threads and from asyncio. Knows no wire protocol.

One thread makes all steps. A step takes a token of every answer at once where their rows lie side by side; answers come
and go between steps, and a long prompt goes in pieces between them. What an answer says depends on its own prompt,
parameters and seed alone; see docs/embedding.md for what that rests on and where it ends.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from llm_edge.runtime import cache_file
from llm_edge.runtime.answer import STEP, FinishReason, Lane, Piece
from llm_edge.runtime.batch import Batch
from llm_edge.runtime.bundle import Bundle, PrecisionInfo
from llm_edge.runtime.errors import BundleError, BusyError, LlmEdgeError, MachineError, ParameterError
from llm_edge.runtime.handle import Answer
from llm_edge.runtime.prefixes import common_prefix
from llm_edge.runtime.rows import Rows, spans
from llm_edge.runtime.sampling_params import SamplingParams
from llm_edge.runtime.session import PREFILL, Logits, Session, one_line
from llm_edge.runtime.text_side import Message, TextSide, open_bundle
from llm_edge.runtime.tokenizer import Tokenizer

_GAP = 4  # rows computed for nothing rather than one step more
_SHARE = 1.5  # a piece of a prompt takes at most about so many times a step of the others
_WORTH_WAITING = 4 * STEP  # tokens that another prompt is about to compute


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


@dataclass(slots=True, eq=False)
class _Request:
    """An answer, from its prompt to its end."""

    lane: Lane
    answer: Answer = field(default_factory=Answer)
    row: int = -1


class Engine:
    """A model for many callers at once.

    Args:
        bundle: what was loaded, and
        session: of its graph: a fused one, on the CPU, and
        tokenizer: its own, and
        precision: which of its graphs.
        active: answers made at the same time; others wait.
        kept: rows beyond those, for what earlier answers computed.
        waiting: requests that may wait.
        cache_bytes: of memory for keys and values that no answer uses now.
        guess: tokens may be guessed and verified several a step (`runtime/lookup.py`).
        step_seconds: a step that takes longer is ended, and its answers fail with MachineError; None for any time.

    Attributes:
        default_params: the model's own sampling.
        guess: for the requests to come; may be set.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        tokenizer: Tokenizer,
        precision: PrecisionInfo,
        *,
        active: int = 8,
        kept: int = 8,
        waiting: int = 64,
        cache_bytes: int = 1 << 30,
        guess: bool = True,
        step_seconds: float | None = None,
    ) -> None:
        for name, value, least in (("active", active, 1), ("kept", kept, 1), ("waiting", waiting, 0)):
            if type(value) is not int or not least <= value <= 1024:
                raise ParameterError(f"{name} is {value!r}; {least} to 1024 are possible")
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise ParameterError(f"cache_bytes is {cache_bytes!r}; 0 and more are possible")
        if step_seconds is not None and not 0 < step_seconds < math.inf:
            raise ParameterError(f"step_seconds is {step_seconds!r}; numbers above 0, or None, are possible")
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.precision = precision
        self._text = TextSide(bundle, tokenizer)
        self.default_params = self._text.default_params
        self.encode_chat = self._text.encode_chat
        self._batch = Batch(session, active + kept)
        self._rows = Rows(self._batch, cache_bytes)
        self._most_active, self._most_waiting = active, waiting
        self.guess = guess
        self._counters = Counters()
        self._waiting: deque[_Request] = deque()
        self._active: list[_Request] = []
        self._changed = threading.Condition()
        self._stepping = threading.Lock()
        self._closed = False
        self._turn = 0
        self._step_began: float | None = None
        self._watching = threading.Lock()
        self._decode_step = self._prefill_token = 0.0  # seconds, of late
        self._thread = threading.Thread(target=self._run, name="llm-edge-engine", daemon=True)
        self._thread.start()
        if step_seconds is not None:
            threading.Thread(target=self._watch, args=(step_seconds,), name="llm-edge-watch", daemon=True).start()

    @classmethod
    def load(
        cls,
        path: str | Path,
        precision: str | None = None,
        threads: int | None = None,
        *,
        verify: bool = True,
        **options: Any,
    ) -> Engine:
        """Load a bundle; `options` are those of `Engine`, the others those of `Model.load`.

        Raises:
            BundleError: the folder is missing, damaged or changed, or holds no fused graphs.
        """
        bundle, info, tokenizer = open_bundle(path, precision, verify=verify)
        if not info.share_buffer:
            raise BundleError(
                f"{bundle.path}: an engine needs a fused ONNX graph: export with --graph fused, or use runtime.Model"
            )
        session = Session(bundle.file(info.model), bundle.shape, info.share_buffer, "cpu", threads)
        return cls(bundle, session, tokenizer, info, **options)

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer hold together at most."""
        return self._batch.limit

    @property
    def run_seconds(self) -> float:
        """Time spent inside onnxruntime."""
        return self._batch.run_seconds

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Answer a conversation; see `Model.chat`.

        Raises:
            BusyError: too many requests are waiting.
            ParameterError, TemplateError, ContextLengthError: as `Model.chat`.
        """
        return self.answers(self.encode_chat(messages, template_variables), params)[0]

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Answer:
        """Continue a text or a list of token ids; see `Model.generate` and `chat`."""
        return self.answers(prompt, params)[0]

    def answers(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, count: int = 1
    ) -> list[Answer]:
        """Several answers to one prompt, which is computed once; of a seed, each takes one more than the one before it.

        All are taken or none is.
        """
        began = time.perf_counter()
        tokens = self._text.encode_prompt(prompt)
        self._text.check(tokens, self.context_length)
        if type(count) is not int or not 1 <= count <= 128:
            raise ParameterError(f"count is {count!r}; 1 to 128 are possible")
        given = params if params is not None else self.default_params
        requests = []
        for number in range(count):
            own = given if given.seed is None else replace(given, seed=(given.seed + number) % 2**64)
            lane = self._text.lane(tokens, own, self.context_length, began, guess=self.guess)
            requests.append(_Request(lane))
        with self._changed:
            if self._closed:
                raise MachineError("the engine is closed")
            waiting = len(self._waiting)
            if waiting + count > self._most_waiting + max(self._most_active - len(self._active), 0):
                self._counters.refused += count
                raise BusyError(waiting)
            self._counters.requests += count
            self._waiting.extend(requests)
            self._changed.notify_all()
        return [request.answer for request in requests]

    def counters(self) -> Counters:
        """A copy of the counters as they are now."""
        with self._changed:
            found = replace(self._counters, waiting=len(self._waiting), active=len(self._active))
        found.evictions, found.kept_tokens = self._rows.evicted, self._rows.kept
        found.kept_bytes = found.kept_tokens * self._batch.token_bytes
        return found

    def save_cache(self, path: str | Path, prompt: str | Sequence[int]) -> int:
        """Write what is computed of a text's beginning to a file, for this bundle alone; see `load_cache`.

        Returns:
            how many tokens that is; for none, no file is written.
        """
        tokens = self._text.encode_prompt(prompt)
        with self._stepping:
            row, length = self._rows.longest(tokens)
            if length:
                values = self._batch.read(row, length)
        if length:
            cache_file.save(Path(path), self._identity, tokens[:length], values)
        return length

    def load_cache(self, path: str | Path) -> int:
        """Read what `save_cache` wrote: prompts that begin so need not compute it.

        Returns:
            how many tokens that is.

        Raises:
            InputError: the file is missing, damaged, or of another bundle.
        """
        shape = self.bundle.shape
        heads, width = shape.num_key_value_heads, shape.head_dim
        tokens, values = cache_file.load(
            Path(path), self._identity, 2 * shape.num_hidden_layers, heads, width, self._batch.limit, self._batch.dtype
        )
        self._text.check(tokens, self.context_length + 1)
        with self._stepping:
            self._batch.write(self._rows.put(tokens), values)
            self._rows.shrink()
        return len(tokens)

    def close(self) -> None:
        """End everything; answers on their way end with `FinishReason.CANCELLED`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _identity(self) -> str:
        return cache_file.identity(self.bundle, self.precision)

    # ---- the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._active or self._closed):
                    self._changed.wait()
                closed = self._closed
            with self._stepping:
                self._drop_cancelled(everything=closed)
                if closed:
                    return
                self._admit()
                self._prefill()
                self._decode()

    def _admit(self) -> None:
        """Let those who wait sit down, first come first served."""
        while self._waiting and len(self._active) < self._most_active:
            request = self._waiting[0]
            tokens = request.lane.tokens
            source, length = self._rows.longest(tokens)
            coming = max(
                (common_prefix(each.lane.tokens, tokens) for each in self._active if each.lane.prefilling), default=0
            )
            if coming >= length + _WORTH_WAITING:
                return  # another prompt begins so: in a moment this one need not compute it
            length = request.lane.reuse(length)
            with self._changed:
                self._waiting.popleft()
            try:
                request.row = self._rows.take(tokens, source, length)
            except Exception as error:  # noqa: BLE001 (nothing may end the thread)
                self._counters.failed += 1
                request.answer.put(_known(error))
                continue
            with self._changed:
                self._active.append(request)
                self._counters.prompt_tokens += len(tokens)
                self._counters.cached_tokens += length

    def _prefill(self) -> None:
        """One piece of one prompt, each of them in turn."""
        prompts = [request for request in self._active if request.lane.prefilling]
        if not prompts:
            return
        self._turn += 1
        request = prompts[self._turn % len(prompts)]
        asked = request.lane.pending(self._piece(len(prompts) < len(self._active)))
        began = time.perf_counter()
        if self._extend(request, asked, 1):
            took = time.perf_counter() - began
            self._counters.prefill_steps += 1
            self._counters.prefill_seconds += took
            self._prefill_token = _mean(self._prefill_token, took / len(asked))

    def _piece(self, others: bool) -> int:
        """Tokens of a prompt to compute at once: few, where others wait for their next token meanwhile."""
        if not others or not self._prefill_token:
            return PREFILL if not others else STEP
        return max(STEP, min(int(_SHARE * self._decode_step / self._prefill_token), PREFILL))

    def _decode(self) -> None:
        """The next token of every answer; several of those that guess."""
        single: dict[int, _Request] = {}
        began = time.perf_counter()
        steps = 0
        for request in [each for each in self._active if not each.lane.prefilling]:
            asked = request.lane.pending(1)
            if len(asked) > 1:
                self._extend(request, asked, 0)
                steps += 1
            else:
                single[request.row] = request
        for span in spans(list(single), _GAP):
            steps += 1
            self._decode_span(span, single)
        if steps:
            took = time.perf_counter() - began
            self._counters.decode_steps += steps
            self._counters.decode_seconds += took
            self._decode_step = _mean(self._decode_step, took)

    def _decode_span(self, span: range, single: Mapping[int, _Request]) -> None:
        """One token more for the answers in rows that lie side by side, others among them."""
        going = [row in single for row in span]
        tokens = [single[row].lane.tokens[-1] if row in single else 0 for row in span]
        requests = [single[row] for row in span if row in single]
        logits = self._step(requests, lambda: self._batch.decode(span.start, tokens, going))
        if logits is not None:
            for request in requests:
                self._take(request, logits[request.row - span.start][None])

    def _extend(self, request: _Request, asked: Sequence[int], num_logits: int) -> bool:
        logits = self._step([request], lambda: self._batch.extend(request.row, asked, num_logits))
        if logits is None:
            return False
        self._take(request, logits)
        return True

    def _step(self, requests: Sequence[_Request], step: Callable[[], Logits]) -> Logits | None:
        """A step; where it fails, so do the answers it was for."""
        self._step_began = time.monotonic()
        try:
            return step()
        except Exception as error:  # noqa: BLE001 (the others' answers go on, whatever it is)
            for request in requests:
                self._fail(request, error)
            return None
        finally:
            with self._watching:  # the next step is not ended for this one's time
                self._step_began = None
                self._batch.resume()

    def _take(self, request: _Request, logits: Logits) -> None:
        """Hand on what the logits make; sit up where the answer is done."""
        lane = request.lane
        last: Piece | None = None
        try:
            for last in lane.take(logits):
                if last.timings is None:
                    request.answer.put(last)
        except Exception as error:  # noqa: BLE001 (as in `_step`)
            self._fail(request, error)
            return
        self._batch.lengths[request.row] = lane.computed  # wrong guesses go
        if last is not None and last.timings is not None:
            self._counters.finished += 1
            self._leave(request, last)
            request.answer.put(last)  # whoever asks again now finds room, and counters that know of it

    def _leave(self, request: _Request, last: Piece) -> None:
        if last.timings is not None:
            self._counters.completion_tokens += last.timings.completion_tokens
            self._counters.guessed_tokens += last.timings.guessed_tokens
            self._counters.accepted_tokens += last.timings.accepted_tokens
        self._rows.leave(request.row)
        with self._changed:
            self._active.remove(request)

    def _fail(self, request: _Request, error: Exception) -> None:
        if not isinstance(error, LlmEdgeError):
            cause, error = error, MachineError(f"an answer failed unexpectedly ({one_line(error)})")
            error.__cause__ = cause
        self._counters.failed += 1
        self._rows.leave(request.row, keep=False)
        with self._changed:
            self._active.remove(request)
        request.answer.put(_known(error))

    def _drop_cancelled(self, *, everything: bool) -> None:
        for request in [each for each in self._active if everything or each.answer.cancelled]:
            last = request.lane.end(FinishReason.CANCELLED)
            self._counters.cancelled += 1
            self._leave(request, last)
            request.answer.put(last)
        with self._changed:
            gone = [each for each in self._waiting if everything or each.answer.cancelled]
            for request in gone:
                self._waiting.remove(request)
        for request in gone:
            self._counters.cancelled += 1
            request.answer.put(request.lane.end(FinishReason.CANCELLED))

    def _watch(self, most: float) -> None:
        """End steps that take too long."""
        while self._thread.is_alive():
            time.sleep(min(most / 4, 1.0))
            with self._watching:
                if self._step_began is not None and time.monotonic() - self._step_began > most:
                    self._batch.terminate()


def _known(error: Exception) -> LlmEdgeError:
    """An error of ours, which says what happened."""
    if isinstance(error, LlmEdgeError):
        return error
    if isinstance(error, MemoryError):
        return MachineError("not enough memory for this answer: take fewer at once, or shorter ones")
    return MachineError(f"the answer failed ({type(error).__name__}: {one_line(error)})")


def _mean(before: float, now: float) -> float:
    """A mean of late values."""
    return now if not before else 0.8 * before + 0.2 * now
