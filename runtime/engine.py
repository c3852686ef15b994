"""`Engine`: one model, many callers, from threads and from asyncio. Knows no wire protocol.

One thread makes all steps; `scheduler.py` has their order. What an answer says depends on its own prompt, parameters
and seed alone; see docs/embedding.md for what that rests on and where it ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from llm_edge.runtime.backend.session import Session, tries_cuda
from llm_edge.runtime.base_model import BaseModel
from llm_edge.runtime.bundle import Bundle, PrecisionInfo
from llm_edge.runtime.errors import BundleError, BusyError, InputError, MachineError, ParameterError
from llm_edge.runtime.generation import AsyncGeneration
from llm_edge.runtime.loading import open_bundle
from llm_edge.runtime.results import FinishReason
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.scheduling import cache_file
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.counters import Counters
from llm_edge.runtime.scheduling.scheduler import Request, Scheduler
from llm_edge.runtime.scheduling.slots import SlotManager
from llm_edge.runtime.scheduling.watchdog import Watchdog
from llm_edge.runtime.speculative.draft_model import DraftModel, proposer_for
from llm_edge.runtime.text.tokenizer import Tokenizer


class Engine(BaseModel[AsyncGeneration]):
    """A model for many callers at once.

    Args:
        bundle: what was loaded, and
        session: of its graph: a fused one, and
        tokenizer: its own, and
        precision: which of its graphs.
        active: answers made at the same time; others wait.
        kept: rows beyond those, for what earlier answers computed.
        waiting: requests that may wait.
        cache_bytes: of memory for keys and values that no answer uses now.
        guess: draft tokens may be verified, several in one step (`runtime/speculative/`), each answer in steps of its
            own; None enables this where one answer is generated at a time, because batching gains more than drafting.
        step_seconds: a step that takes longer is ended, and its answers fail with MachineError; None for any time.
        draft: a smaller model that guesses, where one answer is made at a time (`active=1`), without `step_seconds`.

    Attributes:
        guess: for the requests to come; may be set.
        provider: `cpu` or `cuda`, where the steps are made.

    Raises:
        ParameterError: a number that cannot be.
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
        guess: bool | None = None,
        step_seconds: float | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        for name, value, least in (("active", active, 1), ("kept", kept, 1), ("waiting", waiting, 0)):
            if type(value) is not int or not least <= value <= 1024:
                raise ParameterError(f"{name} is {value!r}; {least} to 1024 are possible")
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise ParameterError(f"cache_bytes is {cache_bytes!r}; 0 and more are possible")
        if draft is not None and (active != 1 or step_seconds is not None):
            raise ParameterError("draft: it guesses for an engine of active=1 and without step_seconds, or for a Model")
        super().__init__(bundle, tokenizer, precision, session.limit)
        self.guess = active == 1 if guess is None else guess
        self.provider = session.provider
        self._draft = draft
        self._most_active, self._most_waiting = active, waiting
        self._counters = Counters()
        self._batch = Batch(session, active + kept)
        self._rows = SlotManager(self._batch, cache_bytes)
        self._watchdog = Watchdog(step_seconds, self._batch.terminate, self._batch.resume)
        self._scheduler = Scheduler(self._batch, self._rows, self._counters, self._watchdog.watched)
        self._waiting: deque[Request] = deque()
        self._closed = False
        self._changed = threading.Condition()  # who waits, and who sits down
        self._stepping = threading.Lock()  # the rows
        self._thread = threading.Thread(target=self._run, name="llm-edge-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        path: str | Path,
        precision: str | None = None,
        threads: int | None = None,
        *,
        provider: str = "cpu",
        verify: bool = True,
        draft: str | Path | None = None,
        draft_precision: str | None = None,
        **options: Any,
    ) -> Engine:
        """Load a bundle; `options` are those of `Engine`, the others those of `Model.load`.

        On CUDA answers are not free of each other's trace: see docs/embedding.md.

        Raises:
            BundleError: the folder is missing, damaged or changed, or holds no fused graphs.
            ProviderError: CUDA was asked for and is not there.
        """
        half = precision is None and tries_cuda(provider)
        bundle, info, tokenizer = open_bundle(path, precision, verify=verify, half=half)
        if not info.share_buffer:
            raise BundleError(
                f"{bundle.path}: an engine needs a fused ONNX graph: export with --graph fused, or use runtime.Model"
            )
        guesser = DraftModel.load(draft, draft_precision, bundle, info, tokenizer, provider, threads, verify=verify)
        in_turns = guesser is not None
        graph, width = bundle.file(info.model), info.hidden_size
        session = Session(graph, bundle.shape, True, provider, threads, in_turns=in_turns, hidden_size=width)
        if info.name == "fp16" and half and session.provider == "cpu":  # as in `Model.load`
            options |= {"draft": draft, "draft_precision": draft_precision}
            return cls.load(path, None, threads, verify=verify, **options)
        return cls(bundle, session, tokenizer, info, draft=guesser, **options)

    @property
    def run_seconds(self) -> float:
        """Time spent inside onnxruntime."""
        return self._batch.run_seconds + (self._draft.run_seconds if self._draft is not None else 0.0)

    def answers(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, count: int = 1
    ) -> list[AsyncGeneration]:
        """Several answers to one prompt, which is computed once; of a seed, each takes one more than the one before it.

        All are taken or none is. Raises what `generate` does.
        """
        began = time.perf_counter()
        if type(count) is not int or not 1 <= count <= 128:
            raise ParameterError(f"count is {count!r}; 1 to 128 are possible")
        return self._submit(self._text.encode_prompt(prompt), params, began, count)

    def _begin(self, tokens: list[int], params: SamplingParams | None, began: float) -> AsyncGeneration:
        return self._submit(tokens, params, began, 1)[0]

    def _submit(
        self, tokens: list[int], params: SamplingParams | None, began: float, count: int
    ) -> list[AsyncGeneration]:
        self._text.check(tokens, self.context_length)
        given = params if params is not None else self.default_params
        requests = []
        for number in range(count):
            own = given if given.seed is None else replace(given, seed=(given.seed + number) % 2**64)
            guesses = proposer_for(self._draft) if self.guess else None
            requests.append(Request(self._text.lane(tokens, own, self.context_length, began, guesses)))
        with self._changed:
            if self._closed:
                raise MachineError("the engine is closed")
            waiting = len(self._waiting)
            if waiting + count > self._most_waiting + self._most_active - len(self._scheduler.active):
                self._counters.refused += count
                raise BusyError(waiting)
            self._counters.requests += count
            self._waiting.extend(requests)
            self._changed.notify_all()
        return [request.answer for request in requests]

    def counters(self) -> Counters:
        """A copy of the counters as they are now."""
        with self._changed:
            found = replace(self._counters, waiting=len(self._waiting), active=len(self._scheduler.active))
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
        try:
            self._text.check(tokens, self.context_length + 1)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
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
        self._watchdog.close()

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
        scheduler = self._scheduler
        while not self._closed:
            with self._changed:
                while not (self._waiting or scheduler.active or self._closed):
                    self._changed.wait()
            with self._stepping:
                self._forget(lambda request: request.answer.cancelled)
                self._admit()
                scheduler.round()
        with self._stepping:
            scheduler.end(lambda _: True)
            self._forget(lambda _: True)

    def _admit(self) -> None:
        """Let those who wait sit down, first come first served."""
        while self._waiting and len(self._scheduler.active) < self._most_active:
            request = self._waiting[0]
            if not self._scheduler.seat(request):
                return
            with self._changed:
                self._waiting.popleft()
                if request.row >= 0:
                    self._scheduler.active.append(request)

    def _forget(self, which: Callable[[Request], bool]) -> None:
        """End some of those who wait."""
        with self._changed:
            gone = [request for request in self._waiting if which(request)]
            for request in gone:
                self._waiting.remove(request)
                self._counters.cancelled += 1
        for request in gone:
            request.answer.put(request.lane.end(FinishReason.CANCELLED))
