"""`ServeOptions`: every option of `llm-serve`, on its command line and in its configuration file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from llm_edge.runtime.errors import InputError, ParameterError
from llm_edge.server.config import GIB, LOOPBACK, JobConfig, ModelConfig, ServerConfig
from llm_edge.server.upstream_config import read_upstreams

SECRET = ("api_key",)
"""Options that are never shown."""
_MIN_KEY = 8  # characters
_SERVER, _MODELS, _JOBS = ServerConfig(), ModelConfig(), JobConfig()  # the defaults


class Provider(StrEnum):
    """Execution provider; AUTO takes CUDA where it works."""

    CPU = "cpu"
    CUDA = "cuda"
    AUTO = "auto"


class LogLevel(StrEnum):
    """What is logged; ACCESS adds a line for each request."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    ACCESS = "access"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of `llm-serve`.

    Each field is an option of the command line and a key in the section `server` of a configuration file; its
    annotation holds the help text and the range.
    """

    models: Annotated[Path, Option(metavar="DIR", help="Folder of bundles.")] = _MODELS.folder
    model: Annotated[str | None, Option(metavar="NAME", help="Default model. Default: the first.")] = None
    precision: Annotated[
        str | None, Option(help="Precision where a request names none. Default: int8, if available.")
    ] = None
    host: Annotated[str, Option(help="Address to listen on; other than loopback needs a key.")] = _SERVER.host
    port: Annotated[int, Option(min=0, max=65_535, help="Port to listen on; 0 = a free one.")] = _SERVER.port
    api_key: Annotated[
        list[str], Option(help="Key that requests have to carry; repeatable. Visible in ps: prefer --api-key-file.")
    ] = field(default_factory=list, repr=False)
    api_key_file: Annotated[Path | None, Option(help="File with one key per line.")] = None
    allowed_host: Annotated[list[str], Option(metavar="NAME", help="Further name of this server; repeatable.")] = field(
        default_factory=list
    )
    allowed_origin: Annotated[
        list[str], Option(metavar="ORIGIN", help="Origin of pages that may use the API; repeatable.")
    ] = field(default_factory=list)
    memory: Annotated[
        float | None,
        Option(metavar="GB", min=0.1, max=1e6, help="Memory for all models. Default: half of the machine's."),
    ] = None
    parallel: Annotated[int, Option(min=1, max=1024, help="Answers generated at the same time.")] = _MODELS.parallel
    queue: Annotated[int, Option(min=0, max=1024, help="Requests that may wait for each model.")] = _MODELS.queue
    threads: Annotated[int | None, Option(min=1, max=1024, help="Threads per operator. Default: physical cores.")] = (
        None
    )
    provider: Annotated[Provider, Option(help="Where models run.")] = Provider.CPU
    allow_uploads: Annotated[
        bool, Option("--allow-uploads", help="Let clients upload checkpoints, which are exported here.")
    ] = False
    allow_downloads: Annotated[
        bool, Option("--allow-downloads", help="Let clients add models of the Hugging Face Hub by their id.")
    ] = False
    max_upload: Annotated[float, Option(metavar="GB", min=0.001, max=1e6, help="Size limit of an upload.")] = (
        _JOBS.max_upload / 1e9
    )
    upstreams: Annotated[
        Path | None, Option(metavar="FILE", help="YAML file of OpenAI-compatible servers to offer models of.")
    ] = None
    cache_dir: Annotated[
        Path | None, Option(metavar="DIR", help="Folder that keeps cached prompts over a restart. Default: none.")
    ] = None
    drain_seconds: Annotated[
        float, Option(min=0, max=3600, help="How long running answers may continue after SIGTERM.")
    ] = _SERVER.drain_seconds
    log_level: Annotated[LogLevel, Option(help="access: one line per request, without its content.")] = LogLevel.INFO

    def to_config(self, generation: Mapping[str, Any] | None = None) -> ServerConfig:
        """The configuration; `generation` = sampling parameters where a request gives none.

        Raises:
            ParameterError: the server would be open to other machines without a key.
            InputError: a key cannot be used, or the file of upstreams cannot.
        """
        keys = _keys(self.api_key, self.api_key_file)
        if self.host.strip("[]").lower() not in LOOPBACK and not keys:
            raise ParameterError(
                f"--host {self.host} can be reached from other machines: add --api-key-file or --api-key"
            )
        models = ModelConfig(
            folder=self.models,
            default=self.model,
            precision=self.precision,
            provider=self.provider,
            threads=self.threads,
            memory=int(self.memory * GIB) if self.memory is not None else _MODELS.memory,
            parallel=self.parallel,
            queue=self.queue,
            cache_dir=self.cache_dir,
            generation=dict(generation or {}),
        )
        return ServerConfig(
            models=models,
            jobs=JobConfig(self.allow_uploads, self.allow_downloads, int(self.max_upload * 1e9)),
            upstreams=read_upstreams(self.upstreams) if self.upstreams is not None else (),
            host=self.host,
            port=self.port,
            api_keys=keys,
            allowed_hosts=tuple(self.allowed_host),
            allowed_origins=tuple(self.allowed_origin),
            drain_seconds=self.drain_seconds,
            access_log=self.log_level is LogLevel.ACCESS,
            log_level="info" if self.log_level is LogLevel.ACCESS else self.log_level,
        )

    def shown(self) -> dict[str, Any]:
        """The options as plain values, without keys and what is not set."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name not in SECRET}
        return {name: _plain(value) for name, value in values.items() if value not in (None, [])}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path | StrEnum) else value


def _keys(given: Iterable[str], file: Path | None) -> tuple[str, ...]:
    keys = list(given)
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: the API keys cannot be read: {error}") from error
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InputError(f"{file} contains no key: write one per line")
    for key in keys:
        if len(key) < _MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"an API key is shorter than {_MIN_KEY} characters or not printable ASCII without spaces")
    return tuple(keys)
