"""The one export of an application, which goes on where nobody looks at it. Knows no widgets."""

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

_NAME = 40  # characters


@dataclass(eq=False, slots=True)
class Job:
    """An export, and what came of it.

    Attributes:
        wish: what was wished for.
        browse: whether a file or folder was looked for, and not an id given.
        export: the process.
        ended: whether it is over; with a bundle, or with `export.error()`.
        bundle: that was made.
    """

    wish: ExportRequest
    browse: bool
    export: Export
    ended: bool = False
    bundle: Path | None = None

    @property
    def name(self) -> str:
        """What is exported, in a few words."""
        source = self.wish.source
        return one_line(printable(Path(source).name if self.browse else source), _NAME) or "?"

    @property
    def doing(self) -> str:
        """What it is at, and how much of that is done."""
        stages = self.export.stages()
        share = f" {stages[-1].share:.0%}" if stages and stages[-1].share is not None else ""
        return f"{printable(stages[-1].name)}{share}" if stages else "starting"

    @property
    def failed(self) -> bool:
        """Whether it ended without a bundle."""
        return self.ended and self.bundle is None


class Exports:
    """See the module.

    Args:
        app: whose threads wait for the end.
        settings: where a bundle that was made is noted, so that it is offered wherever it lies.
        unseen: told of the end of an export that nobody looks at.

    Attributes:
        job: the export at work, or the last one as long as nobody has seen what came of it.
        watcher: who looks at the export at work, and is told of its end.
    """

    def __init__(self, app: App[Any], settings: Settings, unseen: Callable[[Job], None]) -> None:
        self.job: Job | None = None
        self.watcher: Callable[[Job], None] | None = None
        self._app = app
        self._settings = settings
        self._unseen = unseen

    @property
    def at_work(self) -> Job | None:
        """The export that runs."""
        return self.job if self.job is not None and not self.job.ended else None

    def begin(self, wish: ExportRequest, *, browse: bool = False, command: Sequence[str] = ()) -> Job:
        """Begin one; the one before is forgotten.

        Raises:
            InputError: there is one at work.
            MachineError: no process could be started.
        """
        if self.at_work is not None:
            raise InputError(f"the export of {self.at_work.name} is still at work: cancel it, or wait for its end")
        self.job = Job(wish, browse, Export(wish, command))
        self._app.run_worker(functools.partial(self._wait, self.job), thread=True, group="export")
        return self.job

    def forget(self, job: Job) -> None:
        """What came of it was seen."""
        if self.job is job and job.ended:
            self.job = None

    def close(self) -> None:
        """The application ends, and its export with it."""
        if self.job is not None:
            self.job.export.cancel()

    def _wait(self, job: Job) -> None:
        path = job.export.result()
        if get_current_worker().is_cancelled:
            return
        if path is not None:
            with contextlib.suppress(MachineError):  # settings that cannot be written are told when one writes some
                bundles.used(self._settings, path)
        self._app.call_from_thread(self._ended, job, path)

    def _ended(self, job: Job, path: Path | None) -> None:
        job.ended, job.bundle = True, path
        watcher, self.watcher = self.watcher, None
        (watcher or self._unseen)(job)
