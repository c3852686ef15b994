"""`ServerConfig`: everything that can be configured about the server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_edge.server.upstream_config import UpstreamConfig

GIB = 1 << 30
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _half_of_memory() -> int:
    """Half of the machine's memory in bytes; 8 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 8 * GIB


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which models are served, and how they are loaded.

    Attributes:
        folder: holds the bundles.
        default: name of the model for requests that name none; None = the first.
        precision: to load where a request names none; None = int8 if there is one.
        provider: `cpu`, `cuda` or `auto`.
        threads: per operator; None = the number of physical cores.
        memory: bytes for all models that are loaded at the same time.
        parallel: number of answers that a model generates at the same time.
        queue: number of requests that may wait for a model.
        cache_bytes: memory of a model for keys and values of earlier prompts.
        cache_dir: keeps cached prompts over a restart; None = none.
        generation: sampling parameters where a request gives none; others are the model's.
    """

    folder: Path = Path("artifacts")
    default: str | None = None
    precision: str | None = None
    provider: str = "cpu"
    threads: int | None = None
    memory: int = field(default_factory=_half_of_memory)
    parallel: int = 8
    queue: int = 64
    cache_bytes: int = 1 * GIB
    cache_dir: Path | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobConfig:
    """How clients may add models.

    Attributes:
        uploads: clients may upload checkpoints.
        downloads: clients may name models of the Hugging Face Hub.
        max_upload: bytes of an upload.
        seconds: time limit of an export.
        memory: bytes that the process of an export may allocate.
    """

    uploads: bool = False
    downloads: bool = False
    max_upload: int = 20_000_000_000
    seconds: float = 6 * 3600.0
    memory: int = field(default_factory=_half_of_memory)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The server's configuration.

    Attributes:
        models: which models are served.
        jobs: how clients may add models.
        upstreams: servers whose models are offered besides ours.
        host: address to listen on.
        port: port to listen on.
        api_keys: a request needs one of them; empty = no key is needed.
        allowed_hosts: further values of the Host header besides the address itself and the loopback names.
        allowed_origins: origins of pages on other hosts that may use the API.
        max_body: bytes of a request's body.
        keepalive: seconds after which a stream without an event gets a comment.
        drain_seconds: how long running answers may continue after SIGTERM.
        log_level: `error`, `warning` or `info`.
        access_log: log a line for each request.
    """

    models: ModelConfig = field(default_factory=ModelConfig)
    jobs: JobConfig = field(default_factory=JobConfig)
    upstreams: tuple[UpstreamConfig, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body: int = 16 << 20
    keepalive: float = 15.0
    drain_seconds: float = 30.0
    log_level: str = "info"
    access_log: bool = False
