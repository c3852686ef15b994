"""Keeps the prefixes that requests share, such as system prompts, over a restart (`--cache-dir`).

A file holds the keys and values of one prefix, as `Engine.save_cache` writes them; its name begins with the fingerprint
of the weights. What only one request contained is not saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import InputError, LlmEdgeError
from llm_edge.runtime.scheduling.prefixes import common_prefix
from llm_edge.server.request import ChatRequest

_log = logging.getLogger("llm_edge.server")
_MAX_TRACKED = 64
_MAX_FILES = 8  # per model: as many as an engine has slots for them
_MIN_TOKENS = 16
_PATTERN = "fp_*-*.npz"


@dataclass
class _Shared:
    """The prefix that several prompts have in common."""

    tokens: list[int]
    requests: int = 1


class SharedPrefixes:
    """Counts which prefixes the prompts of a model share; used from several threads."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, _Shared] = OrderedDict()
        self._lock = threading.Lock()

    def record(self, request: ChatRequest, tokens: list[int]) -> None:
        """Take note of a prompt; prompts with the same system messages and tools are expected to share a prefix."""
        system = [message["content"] for message in request.messages if message["role"] == "system"]
        tools = [tool.to_json() for tool in request.tool_use.tools]
        key = hashlib.sha256(json.dumps([system, tools]).encode()).hexdigest()
        with self._lock:
            shared = self._found.pop(key, None)
            if shared is None:
                shared = _Shared(tokens)
            else:
                shared.tokens = shared.tokens[: common_prefix(shared.tokens, tokens)]
                shared.requests += 1
            self._found[key] = shared
            if len(self._found) > _MAX_TRACKED:
                self._found.popitem(last=False)

    def most_used(self) -> list[list[int]]:
        """The prefixes that at least two prompts shared, most used first."""
        with self._lock:
            found = [each for each in self._found.values() if each.requests > 1 and len(each.tokens) >= _MIN_TOKENS]
        return [each.tokens for each in sorted(found, key=lambda each: -each.requests)]


def save_prefixes(engine: Engine, fingerprint: str, prefixes: Sequence[list[int]], folder: Path, limit: int) -> None:
    """Save prefixes that are still cached, and delete the oldest files beyond `limit` bytes.

    Failures are logged: they must not keep a model from being unloaded.
    """
    saved = 0
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for tokens in reversed(prefixes[:_MAX_FILES]):  # the most used one becomes the newest file
            name = hashlib.sha256(str(tokens).encode()).hexdigest()[:16]
            saved += engine.save_cache(folder / f"{fingerprint}-{name}.npz", tokens) > 0
        _prune(folder, limit)
    except (LlmEdgeError, OSError) as error:
        _log.warning("the prefix cache cannot be saved: %s", error)
    if saved:
        _log.info("saved %d prefixes to %s", saved, folder)


def load_prefixes(engine: Engine, fingerprint: str, folder: Path) -> None:
    """Load the newest prefixes of a model; damaged files are skipped with a line in the log."""
    loaded = 0
    for path in _newest_first(folder, f"{fingerprint}-*.npz")[:_MAX_FILES]:
        try:
            engine.load_cache(path)
            loaded += 1
        except InputError as error:
            _log.warning("ignored a saved prefix: %s", error)
    if loaded:
        _log.info("loaded %d prefixes from %s", loaded, folder)


def _newest_first(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by time of their last change; those that vanish meanwhile are left out."""
    dated = []
    with contextlib.suppress(OSError):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                dated.append((path.lstat().st_mtime_ns, path))
    return [path for _, path in sorted(dated, reverse=True)]


def _prune(folder: Path, limit: int) -> None:
    total = 0
    for path in _newest_first(folder, _PATTERN):
        total += path.lstat().st_size
        if total > limit:
            path.unlink()
