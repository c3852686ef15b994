"""`Engine`: one model for many callers, from threads and from asyncio.

A single thread runs all steps, in the order that `Scheduler` decides. An answer depends only on its prompt, parameters
and seed; docs/embedding.md says what this rests on and where it ends. Whatever ends the thread fails every request.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.backend.watchdog import check_running_steps
from llm_edge.runtime.base_model import BaseModel
from llm_edge.runtime.errors import (
    BusyError,
    InputError,
    LlmEdgeError,
    MachineError,
    ParameterError,
    as_llm_edge_error,
)
from llm_edge.runtime.generation import AsyncGeneration
from llm_edge.runtime.load_options import LoadOptions
from llm_edge.runtime.loading import LoadedBundle, load
from llm_edge.runtime.results import FinishReason, GenerationChunk
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.scheduling import cache_file
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.counters import Counters
from llm_edge.runtime.scheduling.scheduler import Request, Scheduler
from llm_edge.runtime.scheduling.slots import SlotManager
from llm_edge.runtime.speculative.draft_model import DraftModel, load_draft_model


class Engine(BaseModel[AsyncGeneration]):
    """A model for many callers at once.

    Args:
        loaded: a bundle with a fused graph.
        draft: a draft model; requires `active=1`.
        active: number of generations that run at the same time; further ones wait.
        kept: number of additional slots that cache prefixes of earlier generations.
        waiting: number of requests that may wait.
        cache_bytes: memory for what idle slots hold: keys, values and states.
        speculative: verify draft tokens, each sequence in separate steps; None = only if `active` is 1, because
            batching gains more than drafting.

    Raises:
        ParameterError: an argument is out of range.
    """

    def __init__(
        self,
        loaded: LoadedBundle,
        draft: DraftModel | None = None,
        *,
        active: int = 8,
        kept: int = 8,
        waiting: int = 64,
        cache_bytes: int = 1 << 30,
        speculative: bool | None = None,
    ) -> None:
        for name, value, low in (("active", active, 1), ("kept", kept, 1), ("waiting", waiting, 0)):
            if type(value) is not int or not low <= value <= 1024:
                raise ParameterError(f"{name} is {value!r}; use {low} to 1024")
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise ParameterError(f"cache_bytes is {cache_bytes!r}; use 0 or more")
        if draft is not None and active != 1:
            raise ParameterError("draft: it needs an engine with active=1, or a Model")
        super().__init__(loaded, draft, active == 1 if speculative is None else speculative)
        assert isinstance(loaded.session, Session)
        self._max_active, self._max_waiting = active, waiting
        self._counters = Counters()
        self._batch = Batch(loaded.session.graph, active + kept)
        self._slots = SlotManager(self._batch, cache_bytes)
        self._scheduler = Scheduler(self._batch, self._slots, self._counters)
        self._waiting: deque[Request] = deque()
        self._closed = False
        self._failure: LlmEdgeError | None = None  # what ended the thread
        self._changed = threading.Condition()  # guards waiting and active requests, and counters
        self._stepping = threading.Lock()  # guards the slots
        self._thread = threading.Thread(target=self._run, name="llm-edge-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, path: str | Path, precision: str | None = None, **options: Any) -> Engine:
        """Load a bundle, on the CPU unless `provider` says otherwise.

        `options` are further fields of `LoadOptions` and keyword arguments of `Engine`. On CUDA an answer may depend on
        other requests in its last bits: see docs/embedding.md.

        Raises:
            BundleError: the folder is missing, damaged or modified, or contains no fused graph.
            ParameterError, ProviderError: as in `Model.load`.
        """
        names = {field.name for field in fields(LoadOptions)}
        loading = {"provider": "cpu", **{name: value for name, value in options.items() if name in names}}
        limits = {name: value for name, value in options.items() if name not in names}
        return cls.open(path, LoadOptions(precision, **loading), **limits)

    @classmethod
    def open(cls, path: str | Path, options: LoadOptions, **limits: Any) -> Engine:
        """Like `load`, but with the options in a `LoadOptions`."""
        loaded = load(path, options, fused=True, interleaved=options.draft is not None)
        return cls(loaded, load_draft_model(options, loaded), **limits)

    @property
    def run_seconds(self) -> float:
        """Time spent inside onnxruntime."""
        return self._batch.run_seconds + (self._draft.run_seconds if self._draft is not None else 0.0)

    def generate_many(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, count: int = 1
    ) -> list[AsyncGeneration]:
        """Several generations from one prompt, which is computed once. With a seed, generation i uses seed + i.

        Either all are accepted or none. Raises what `generate` does.
        """
        self.check_process()
        began = time.perf_counter()
        if type(count) is not int or not 1 <= count <= 128:
            raise ParameterError(f"count is {count!r}; use 1 to 128")
        return self._submit(self._prompts.encode_prompt(prompt), params, began, count)

    def _start(self, tokens: list[int], params: SamplingParams | None, began: float) -> AsyncGeneration:
        return self._submit(tokens, params, began, 1)[0]

    def _submit(
        self, tokens: list[int], params: SamplingParams | None, began: float, count: int
    ) -> list[AsyncGeneration]:
        shared = params if params is not None else self.default_params
        requests = []
        for number in range(count):
            own = shared if shared.seed is None else replace(shared, seed=(shared.seed + number) % 2**64)
            requests.append(Request(self._sequence(tokens, own, began, speculative=self.speculative)))
        with self._changed:
            if self._failure is not None:
                raise MachineError(f"the engine has failed: load it again ({self._failure})") from self._failure
            if self._closed:
                raise MachineError("the engine is closed")
            waiting = len(self._waiting)
            if waiting + count > self._max_waiting + self._max_active - len(self._scheduler.active):
                self._counters.refused += count
                raise BusyError(waiting)
            self._counters.requests += count
            self._waiting.extend(requests)
            self._changed.notify_all()
        return [request.generation for request in requests]

    def counters(self) -> Counters:
        """A copy of the current counters."""
        self.check_process()
        with self._changed:
            found = replace(self._counters, waiting=len(self._waiting), active=len(self._scheduler.active))
        found.evictions, found.kept_tokens = self._slots.evictions, self._slots.cached_tokens
        found.kept_bytes = self._slots.cached_bytes
        return found

    def save_cache(self, path: str | Path, prompt: str | Sequence[int]) -> int:
        """Save what is cached of a text's prefix to a file, for this bundle only; see `load_cache`.

        Returns:
            the number of tokens; for 0, no file is written. With states, these are the most of which there are states.
        """
        self.check_process()
        tokens = self._prompts.encode_prompt(prompt)
        with self._stepping:
            slot, length = self._slots.longest_prefix(tokens)
            if length:
                values = self._batch.read(slot, length)
        if length:
            cache_file.save(Path(path), self._identity, tokens[:length], values)
        return length

    def load_cache(self, path: str | Path) -> int:
        """Load what `save_cache` wrote, so that prompts with this prefix need not compute it.

        Returns:
            the number of tokens.

        Raises:
            InputError: the file is missing, damaged, or from another bundle.
        """
        self.check_process()
        tokens, values = cache_file.load(Path(path), self._identity, self.bundle.shape, self._batch.dtypes)
        try:
            self._prompts.check(tokens, self.context_length + 1)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        with self._stepping:
            self._batch.write(self._slots.reserve(tokens), values, len(tokens))
            self._slots.enforce_budget()
        return len(tokens)

    def close(self) -> None:
        """Stop the engine, whose running step is terminated; unfinished generations end with `CANCELLED`."""
        if not self.in_own_process:  # a forked process has no thread to stop
            return
        with self._changed:
            self._closed = self._scheduler.closing = True
            self._changed.notify_all()
        check_running_steps()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _identity(self) -> str:
        return cache_file.identity(self.bundle, self.precision)

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            while self._wait():
                with self._stepping:
                    self._cancel_waiting()
                    self._admit()
                    self._scheduler.step()
            with self._stepping:
                self._scheduler.cancel(lambda _: True)
        except BaseException as error:  # noqa: BLE001 (callers get it, and so does each new request)
            self._end(as_llm_edge_error(error, "the engine failed unexpectedly"))
        else:
            self._end(None)

    def _wait(self) -> bool:
        """Wait for a request; returns False once the engine is closed."""
        with self._changed:
            while not (self._waiting or self._scheduler.active or self._closed):
                self._changed.wait()
            return not self._closed

    def _end(self, failure: LlmEdgeError | None) -> None:
        """End all requests, cancelled or failed, and refuse new ones."""
        with self._changed:
            self._failure, self._closed = failure, True
            requests = [*self._scheduler.active, *self._waiting]
            self._scheduler.active.clear()
            self._waiting.clear()
        for request in requests:
            self._end_request(request, failure)

    def _end_request(self, request: Request, failure: LlmEdgeError | None) -> None:
        last: GenerationChunk | LlmEdgeError
        try:
            last = failure or request.sequence.finish(FinishReason.CANCELLED)
        except BaseException as error:  # noqa: BLE001 (as in `_run`)
            last = as_llm_edge_error(error)
        with self._changed:
            if isinstance(last, LlmEdgeError):
                self._counters.failed += 1
            else:
                self._counters.cancelled += 1
        request.generation.put(last)

    def _admit(self) -> None:
        """Activate waiting requests, first come first served."""
        while self._waiting and len(self._scheduler.active) < self._max_active:
            request = self._waiting[0]
            if not self._scheduler.admit(request):
                return
            with self._changed:
                self._waiting.popleft()
                if request.slot >= 0:
                    self._scheduler.active.append(request)

    def _cancel_waiting(self) -> None:
        """End waiting requests that were cancelled."""
        with self._changed:
            cancelled = [request for request in self._waiting if request.generation.cancelled]
            for request in cancelled:
                self._waiting.remove(request)
        for request in cancelled:
            self._end_request(request, None)
