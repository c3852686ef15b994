"""Runs one export at a time, which continues in the background when its screen is closed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textual.app import App
from textual.worker import get_current_worker

from llm_edge.chat import bundles
from llm_edge.chat.export_process import Export, ExportRequest
from llm_edge.chat.settings import Settings
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import InputError, MachineError

_MAX_NAME = 40  # characters


@dataclass(eq=False, slots=True)
class ExportJob:
    """An export and its result."""

    request: ExportRequest
    browse: bool  # whether the source was chosen among files, rather than typed as a Hugging Face id
    export: Export
    ended: bool = False  # with a bundle, or with `export.error()`
    bundle: Path | None = None

    @property
    def name(self) -> str:
        """A short name of the source."""
        source = self.request.source
        return one_line(printable(Path(source).name if self.browse else source), _MAX_NAME) or "?"

    @property
    def progress(self) -> str:
        """The current stage and how much of it is done."""
        stages = self.export.stages()
        share = f" {stages[-1].share:.0%}" if stages and stages[-1].share is not None else ""
        return f"{printable(stages[-1].name)}{share}" if stages else "starting"

    @property
    def failed(self) -> bool:
        """Whether it ended without a bundle."""
        return self.ended and self.bundle is None


class ExportManager:
    """Starts exports and reports their ends; `on_background_end` is called while no screen is watching.

    Attributes:
        job: the running export or, until its result was dismissed, the last one.
        watcher: called when the running export ends; set by the screen that shows it.
    """

    def __init__(self, app: App[Any], settings: Settings, on_background_end: Callable[[ExportJob], None]) -> None:
        self.job: ExportJob | None = None
        self.watcher: Callable[[ExportJob], None] | None = None
        self._app, self._settings, self._on_background_end = app, settings, on_background_end

    @property
    def running(self) -> ExportJob | None:
        """The running export."""
        return self.job if self.job is not None and not self.job.ended else None

    def start(self, request: ExportRequest, *, browse: bool = False, command: Sequence[str] = ()) -> ExportJob:
        """Start an export; the result of the last one is dismissed.

        Raises:
            InputError: an export is running.
            MachineError: the process could not be started.
        """
        if self.running is not None:
            raise InputError(f"the export of {self.running.name} is still running: cancel it, or wait until it ends")
        self.job = ExportJob(request, browse, Export(request, command))
        self._app.run_worker(functools.partial(self._wait, self.job), thread=True, group="export")
        return self.job

    def dismiss(self, job: ExportJob) -> None:
        """Drop the result of an export, once the user has seen it."""
        if self.job is job and job.ended:
            self.job = None

    def close(self) -> None:
        """Cancel the running export."""
        if self.job is not None:
            self.job.export.cancel()

    def _wait(self, job: ExportJob) -> None:
        bundle = job.export.result()
        if get_current_worker().is_cancelled:
            return
        if bundle is not None:
            with contextlib.suppress(MachineError):  # reported when the user changes a setting
                bundles.used(self._settings, bundle)
        self._app.call_from_thread(self._ended, job, bundle)

    def _ended(self, job: ExportJob, bundle: Path | None) -> None:
        job.ended, job.bundle = True, bundle
        watcher, self.watcher = self.watcher, None
        (watcher or self._on_background_end)(job)
