"""`ExportJobs`: exports that clients have requested, one after the other, each in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from llm_edge.chat.export_process import Export, ExportRequest
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.server.config import JobConfig
from llm_edge.server.errors import ApiError, invalid
from llm_edge.server.uploads import Upload, remove_old_uploads, slug

_log = logging.getLogger("llm_edge.server")
_MAX_JOBS = 100  # that are listed
_MAX_WAITING = 10
_POLL_SECONDS = 0.2
_CLOSE_SECONDS = 10.0
_DEFAULT_PRECISION = "int8"


class JobState(StrEnum):
    """What has become of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass
class Job:
    """An export that a client has requested.

    Attributes:
        id: identifies it.
        model: name of the model that it creates.
        source: a Hub id, or the names of the uploaded files.
        request: what `llm-export` is called with.
        created: Unix time.
        upload: the uploaded files, removed at the end.
        state: what has become of it.
        stage: of the export: its name, the fraction that is done (None = unknown), and what is being processed.
        error: why it failed, in one line.
        report: sizes, and how far each precision is from PyTorch.
        seconds: duration of the export so far.
    """

    id: str
    model: str
    source: str
    request: ExportRequest
    created: float
    upload: Upload | None = None
    state: JobState = JobState.QUEUED
    stage: tuple[str, float | None, str] | None = None
    error: str | None = None
    report: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state not in (JobState.QUEUED, JobState.RUNNING)

    def to_json(self) -> dict[str, Any]:
        """The job as clients see it."""
        stage, fraction, detail = self.stage or (None, None, None)
        return {
            "id": self.id,
            "object": "model.job",
            "model": self.model,
            "source": self.source,
            "created": int(self.created),
            "status": self.state.value,
            "stage": stage,
            "progress": fraction,
            "detail": detail,
            "seconds": round(self.seconds, 1),
            "error": self.error,
            "report": self.report or None,
        }

    def changed(self) -> None:
        """Wake those who watch it."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncIterator[dict[str, Any]]:
        """The job now and after each change, until it has ended."""
        while True:
            changed = self._changed
            yield self.to_json()
            if self.ended:
                return
            await changed.wait()


class ExportJobs:
    """Runs exports; all methods are called on the event loop.

    Args:
        config: limits.
        models: folder in which the bundles appear.
        secret_names: environment variables that the processes must not see.
    """

    def __init__(self, config: JobConfig, models: Path, secret_names: Collection[str] = ()) -> None:
        self.config = config
        self.uploads = models / ".uploads"
        self._models = models
        self._environment = {name: value for name, value in os.environ.items() if name not in secret_names}
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slot = asyncio.Lock()
        if config.uploads:
            remove_old_uploads(self.uploads)

    def list(self) -> list[Job]:
        """All jobs, the latest first."""
        return list(reversed(self._jobs.values()))

    def get(self, identifier: str) -> Job:
        """One job.

        Raises:
            ApiError: there is none of this id.
        """
        job = self._jobs.get(identifier)
        if job is None:
            raise ApiError(404, "there is no such job", "job_not_found")
        return job

    def add(
        self, source: str | Upload, *, name: str = "", precision: str = "", validate: bool = True, title: str = ""
    ) -> Job:
        """Export a model of the Hub, or an upload, which is removed at the end.

        Args:
            source: what to export; checked by the caller.
            name: of the model; "" = derived from `title`, and numbered if there is one of that name.
            precision: comma-separated; "" = int8.
            validate: measure how far the precisions are from PyTorch.
            title: a text to derive a name from.

        Raises:
            ApiError: the name is taken or cannot be used, or too many jobs are waiting.
        """
        if sum(not job.ended for job in self._jobs.values()) > _MAX_WAITING:
            raise ApiError(429, "too many exports are waiting: try again later", "queue_full", retry_after=60)
        model = self._checked_name(name) if name else self._free_name(slug(title) or "model")
        path = source.source() if isinstance(source, Upload) else source
        output = (self._models / model).absolute()
        options = ExportOptions(output=output, precision=precision or _DEFAULT_PRECISION, validate=validate)
        upload = source if isinstance(source, Upload) else None
        shown = ", ".join(sorted(upload.files)) if upload is not None else str(path)
        absolute = str(path.absolute()) if isinstance(path, Path) else path
        job = Job(secrets.token_hex(8), model, shown, ExportRequest(absolute, options), time.time(), upload)
        self._forget_oldest()
        self._jobs[job.id] = job
        task = asyncio.get_running_loop().create_task(self._run(job))
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))
        return job

    def exists(self, model: str) -> bool:
        """Whether there is, or soon will be, a model of this name."""
        active = (job.model for job in self._jobs.values() if not job.ended)
        return os.path.lexists(self._models / model) or model in active

    def _checked_name(self, name: str) -> str:
        if name != slug(name):
            raise invalid(
                f"name: use lower-case letters, digits and dashes, such as {slug(name) or 'my-model'!r}", "name"
            )
        if self.exists(name):
            raise ApiError(409, f"there is a model {name!r} already: choose another name", "model_exists", "name")
        return name

    def _free_name(self, wanted: str) -> str:
        names = [wanted, *(f"{wanted}-{number}" for number in range(2, 1000))]
        return next(name for name in names if not self.exists(name))

    def _forget_oldest(self) -> None:
        for identifier in [job.id for job in self._jobs.values() if job.ended][: len(self._jobs) - _MAX_JOBS + 1]:
            del self._jobs[identifier]

    async def cancel(self, identifier: str) -> Job:
        """Stop a job, or remove one that has ended from the list.

        Raises:
            ApiError: there is none of this id.
        """
        job = self.get(identifier)
        task = self._tasks.get(identifier)
        if task is None:
            del self._jobs[identifier]
            return job
        task.cancel()
        await asyncio.wait([task], timeout=_CLOSE_SECONDS)
        return job

    async def close(self) -> None:
        """Stop all jobs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)

    async def _run(self, job: Job) -> None:
        try:
            async with self._slot:
                await self._export(job)
        except asyncio.CancelledError:
            job.state, job.error = JobState.CANCELLED, "the export was cancelled; its files were removed"
        except LlmEdgeError as error:
            job.state, job.error = JobState.FAILED, str(error)
        except Exception:  # noqa: BLE001 (nobody else would report it)
            _log.exception("the export of %s failed", job.model)
            job.state, job.error = JobState.FAILED, "internal error: see the server's log"
        finally:
            if job.upload is not None:
                await asyncio.shield(run_in_threadpool(job.upload.remove))
            if job.state is JobState.FAILED:
                _log.warning("the export of %s failed: %s", job.model, job.error)
            job.changed()

    async def _export(self, job: Job) -> None:
        """Run the process and copy its progress.

        Its working folder is that of the uploads, so that a Hub id cannot be taken for a folder.
        """
        folder = await run_in_threadpool(_empty_folder, self.uploads)
        command = (sys.executable, "-P", "-m", "llm_edge.server.export_command", str(self.config.memory))
        export = Export(job.request, command, folder=folder, environment=self._environment)
        result = asyncio.ensure_future(asyncio.to_thread(export.result))
        job.state = JobState.RUNNING
        late = False
        try:
            while not result.done():
                self._copy_progress(job, export)
                await asyncio.wait([result], timeout=_POLL_SECONDS)
                if export.seconds > self.config.seconds and not late:
                    late = True
                    export.cancel()
            path = result.result()
            self._copy_progress(job, export)
            if path is None:
                limit = f"the export took longer than {self.config.seconds / 60:.0f} minutes and was stopped"
                job.error = limit if late else await asyncio.to_thread(export.error)
            job.report = export.report
            # The state is set last: a client that follows the job stops reading when it sees it.
            job.state = JobState.FINISHED if path is not None else JobState.FAILED
        finally:
            export.cancel()
            if not result.done():
                await asyncio.wait([result], timeout=_CLOSE_SECONDS)

    def _copy_progress(self, job: Job, export: Export) -> None:
        stages = export.stages()
        latest = (stages[-1].name, stages[-1].share, stages[-1].detail) if stages else None
        job.seconds = export.seconds
        if latest != job.stage:
            job.stage = latest
            job.changed()


def _empty_folder(parent: Path) -> Path:
    folder = parent / "empty"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
