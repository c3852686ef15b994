"""`ModelPool`: the bundles of a folder, loaded on demand within a memory budget.

Requests for a model that is being loaded wait for that one load. If the budget is exhausted, the least recently used
idle model is unloaded; if all are answering, the least recently used one takes no new requests and is unloaded once its
answers have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from llm_edge.runtime.bundle import MANIFEST, Bundle
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.load_options import LoadOptions
from llm_edge.runtime.loading import LoadedBundle, load
from llm_edge.runtime.model import Model
from llm_edge.runtime.scheduling import cache_file
from llm_edge.runtime.text.tool_format import GENERIC, ToolFormat
from llm_edge.runtime.text.tool_format_finder import tool_format_of
from llm_edge.server.config import ModelConfig
from llm_edge.server.errors import ApiError
from llm_edge.server.prefix_cache import SharedPrefixes, load_prefixes, save_prefixes
from llm_edge.server.upstream import Upstreams

_log = logging.getLogger("llm_edge.server")
_OVERHEAD = 1.25  # memory of a loaded graph, relative to its file
_MAX_FOLDERS = 500


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A bundle that can be served.

    Attributes:
        name: its folder's name.
        bundle: the folder, opened but not loaded.
        created: Unix time of its manifest.
    """

    name: str
    bundle: Bundle
    created: int


class LoadedModel:
    """A model in memory.

    Attributes:
        name: `folder` or `folder:precision`, as requested.
        engine: answers requests.
        fingerprint: identifies the weights; changes with the bundle.
        generation: sampling parameters where a request gives none; others are the model's.
        prefixes: what the prompts have in common.
        embedding: held while `embedder` computes.
    """

    def __init__(
        self, name: str, loaded: LoadedBundle, engine: Engine, generation: Mapping[str, Any] | None = None
    ) -> None:
        self.name = name
        self.generation = dict(generation or {})
        self.prefixes = SharedPrefixes()
        self.engine = engine
        self.fingerprint = f"fp_{cache_file.identity(loaded.bundle, loaded.precision)[:16]}"
        self.embedding = threading.Lock()
        self._loaded = loaded

    @functools.cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls of tools: as the export recorded it, or else found by rendering its template."""
        bundle, tokenizer = self.engine.bundle, self.engine.tokenizer
        chat = tokenizer.tool_chat or tokenizer.chat
        recorded = bundle.manifest.get("tool_calls")
        if recorded is not None:
            return ToolFormat.from_json(recorded, str(bundle.path / MANIFEST))
        return (tool_format_of(chat.render) if chat is not None else None) or GENERIC

    @functools.cached_property
    def embedder(self) -> Model:
        """Computes hidden states on the same graph."""
        return Model(self._loaded)


@dataclass
class _Place:
    """A model that is loaded or being loaded."""

    name: str
    memory: int
    ready: LoadedModel | None = None
    error: Exception | None = None
    users: int = 0
    used: float = field(default_factory=time.monotonic)
    draining: bool = False
    loaded_at: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelState:
    """Whether a model is loaded, and how busy it is."""

    name: str
    memory: int
    loaded: bool
    users: int
    used: float


class ModelPool:
    """Serves models by name; all methods are called on the event loop."""

    def __init__(self, config: ModelConfig, upstreams: Upstreams | None = None) -> None:
        self.config = config
        self.upstreams = upstreams or Upstreams()
        self._places: dict[str, _Place] = {}
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    # ---- what there is

    def entries(self) -> list[ModelEntry]:
        """The bundles in the folder, by name; unusable ones are left out."""
        found = []
        with contextlib.suppress(OSError):
            for path in sorted(self.config.folder.iterdir())[:_MAX_FOLDERS]:
                if not path.name.startswith(".") and (path / MANIFEST).is_file():
                    with contextlib.suppress(BundleError, OSError):
                        found.append(self._entry(path))
        return found

    def _entry(self, path: Path) -> ModelEntry:
        return ModelEntry(path.name, Bundle.open(path), int((path / MANIFEST).stat().st_mtime))

    def find(self, name: str) -> tuple[ModelEntry, str]:
        """A bundle and a precision by `name` or `name:precision`; "" = the default model.

        Raises:
            ApiError: there is none of this name.
        """
        if self.upstreams.find(name) is not None:
            raise ApiError(400, f"{name} is behind an upstream, which offers chats only", "not_supported", "model")
        folder, _, precision = name.partition(":")
        folder = folder.rpartition("/")[2] or self.config.default or ""
        entries = {entry.name: entry for entry in self.entries()}
        if not folder and entries:
            folder = next(iter(entries))
        entry = entries.get(folder)
        if not entries:
            raise ApiError(404, "there are no models: create one with llm-export", "model_not_found", "model")
        if entry is None:
            known = ", ".join(list(entries)[:10])
            raise ApiError(404, f"there is no model {folder[:100]!r}; available: {known}", "model_not_found", "model")
        wanted = None if precision in ("", "latest") else precision
        try:
            return entry, entry.bundle.precision(wanted or self.config.precision).name
        except BundleError:
            names = ", ".join(entry.bundle.precisions)
            message = f"model {folder!r} has no precision {precision[:100]!r}; available: {names}"
            raise ApiError(404, message, "model_not_found", "model") from None

    def states(self) -> list[ModelState]:
        """The models in memory."""
        return [
            ModelState(place.name, place.memory, place.ready is not None, place.users, place.used)
            for place in self._places.values()
        ]

    def engines(self) -> dict[str, Engine]:
        """The engines in memory, by name."""
        return {place.name: place.ready.engine for place in self._places.values() if place.ready is not None}

    # ---- using one

    @contextlib.asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[LoadedModel]:
        """A loaded model, which is not unloaded meanwhile.

        Raises:
            ApiError: there is none of this name, or it does not fit into the budget.
            LlmEdgeError: it cannot be loaded.
        """
        entry, precision = await run_in_threadpool(self.find, name)
        place = await self._acquire(f"{entry.name}:{precision}", entry, precision)
        assert place.ready is not None
        try:
            yield place.ready
        finally:
            place.users -= 1
            place.used = time.monotonic()
            # Not awaited under the lock: this runs in requests that are being cancelled.
            self._spawn(self._notify())

    async def _acquire(self, key: str, entry: ModelEntry, precision: str) -> _Place:
        waited_for: _Place | None = None
        async with self._changed:
            while True:
                if self._closing:
                    raise ApiError(503, "the server is shutting down", "shutting_down", retry_after=5)
                place = self._places.get(key)
                if place is None and waited_for is not None and waited_for.error is not None:
                    raise waited_for.error
                if place is None:
                    place = self._reserve(key, entry, precision)
                elif place.ready is not None and not place.draining:
                    place.users += 1
                    place.used = time.monotonic()
                    return place
                waited_for = place
                await self._changed.wait()

    def _reserve(self, key: str, entry: ModelEntry, precision: str) -> _Place | None:
        """Begin to load a model if the budget allows it, or else to make room for it."""
        states = 4 * entry.bundle.shape.state_numbers * 2 * self.config.parallel  # before and after a step, in float32
        need = int(entry.bundle.precisions[precision].size * _OVERHEAD) + states + self.config.cache_bytes
        budget = self.config.memory
        if need > budget:
            message = f"model {key!r} needs about {need / 1e9:.1f} GB, more than the budget of {budget / 1e9:.1f} GB"
            raise ApiError(503, message, "insufficient_memory")
        if sum(place.memory for place in self._places.values()) + need <= budget:
            place = self._places[key] = _Place(key, need)
            self._spawn(self._load(place, entry, precision))
            return place
        loaded = [place for place in self._places.values() if place.ready is not None]
        victims = sorted(loaded, key=lambda place: (place.users > 0, place.used))
        if victims and not any(place.draining for place in loaded):
            victims[0].draining = True
            if not victims[0].users:
                self._spawn(self._notify())
        return None

    async def _load(self, place: _Place, entry: ModelEntry, precision: str) -> None:
        began = time.perf_counter()
        try:
            ready = await run_in_threadpool(self._load_now, place.name, entry, precision)
        except Exception as error:  # noqa: BLE001 (raised by everyone who waits)
            place.error = error
        async with self._changed:
            if place.error is None:
                place.ready, place.used = ready, time.monotonic()
                _log.info("loaded %s in %.1f s", place.name, time.perf_counter() - began)
            else:
                del self._places[place.name]
                _log.error("cannot load %s: %s", place.name, place.error)
            self._changed.notify_all()

    def _load_now(self, name: str, entry: ModelEntry, precision: str) -> LoadedModel:
        c = self.config
        loaded = load(entry.bundle.path, LoadOptions(precision, c.provider, c.threads), fused=True)
        engine = Engine(loaded, active=c.parallel, waiting=c.queue, cache_bytes=c.cache_bytes)
        ready = LoadedModel(name, loaded, engine, c.generation)
        if c.cache_dir is not None:
            load_prefixes(engine, ready.fingerprint, c.cache_dir)
        return ready

    def _close_now(self, model: LoadedModel) -> None:
        c = self.config
        if c.cache_dir is not None:
            save_prefixes(model.engine, model.fingerprint, model.prefixes.most_used(), c.cache_dir, c.cache_bytes)
        model.engine.close()

    async def _notify(self) -> None:
        """Unload drained models, and wake those who wait for a change."""
        async with self._changed:
            for place in list(self._places.values()):
                if place.draining and not place.users and place.ready is not None:
                    await self._unload(place)
            self._changed.notify_all()

    async def _unload(self, place: _Place) -> None:
        assert place.ready is not None
        await run_in_threadpool(self._close_now, place.ready)
        del self._places[place.name]
        _log.info("unloaded %s", place.name)

    async def preload(self, name: str) -> None:
        """Load a model before the first request for it; those of upstreams need not be."""
        if self.upstreams.find(name) is not None:
            return
        async with self.use(name):
            pass

    async def unload(self, name: str) -> bool:
        """Unload a model once its answers have ended; returns whether it was loaded."""
        async with self._changed:
            place = self._places.get(name)
            if place is None:
                return False
            place.draining = True
        await self._notify()
        return True

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, wait for the running ones at most so long, and close all models."""
        async with self._changed:
            self._closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + seconds
        while any(place.users for place in self._places.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for place in list(self._places.values()):
            if place.ready is not None:
                await self._unload(place)
        await self.upstreams.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
