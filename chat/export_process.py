"""`Export`: runs `llm-export` in a subprocess that reports progress and can be cancelled."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, get_args, get_type_hints

from llm_edge.chat.text import one_line, printable
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime.errors import MachineError, ParameterError

_HINTS = get_type_hints(ExportOptions, include_extras=True)


def _flag(name: str) -> str:
    """The flag of a field of `ExportOptions`, for example `--n-heads` or `--validate/--no-validate`."""
    declared = get_args(_HINTS[name])[1].default  # typer takes the first argument of an annotation for the default
    return declared if isinstance(declared, str) else f"--{name.replace('_', '-')}"


SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".gguf")
OPTIONS: Mapping[str, str] = {
    _flag(field.name)[2:]: get_args(_HINTS[field.name])[1].help.removeprefix("For a bare state dict: ")
    for field in fields(ExportOptions)
    if field.default is None and field.name != "precision" and not field.name.startswith("target_")
}
"""Options that a source may require, with a description; the error of `llm-export` names them."""

_STATE_DICT = tuple(name for name in OPTIONS if name not in ("adapter", "output"))
_COMMAND = "import sys; sys.argv[0] = 'llm-export'; from llm_edge.exporter.cli import main; main()"
_MAX_LINE = 1 << 16
_MAX_ERROR = 600  # characters
_TAIL = 40  # latest lines of stderr that are kept
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_OPTION = re.compile(r"(?<![\w-])(?:--([a-z][a-z-]*)|-o(?![\w-]))")


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What to export: a file, a folder, a Hugging Face id or `smollm2`; and the options of `llm-export`."""

    source: str
    options: ExportOptions = ExportOptions()  # noqa: RUF009 (frozen)

    @property
    def precisions(self) -> list[str]:
        """The names of the precisions; empty = the default ones."""
        return self.options.precision.split(",") if self.options.precision else []

    def arguments(self) -> list[str]:
        """The arguments of `llm-export`."""
        given = ["--progress=json"]
        for field in fields(ExportOptions):
            value = getattr(self.options, field.name)
            on, _, off = _flag(field.name).partition("/")
            if value != field.default:
                given.append((on if value else off) if isinstance(value, bool) else f"{on}={value}")
        return [*given, "--", os.path.expanduser(self.source)]  # noqa: PTH111 (it may be an id instead of a path)


def parse_options(typed: Mapping[str, str]) -> dict[str, Any]:
    """Convert typed values of `OPTIONS` to those of the fields of `ExportOptions`; empty ones are left out.

    Raises:
        ParameterError: a value is not a number.
    """
    values: dict[str, Any] = {}
    for option, text in typed.items():
        name = option.replace("-", "_")
        kind = get_args(get_args(_HINTS[name])[0])[0]  # of `kind | None`
        try:
            values |= {name: kind(text.strip())} if text.strip() else {}
        except ValueError as error:
            wanted = "an integer" if kind is int else "a number"
            raise ParameterError(f"--{option} is {text.strip()!r}, not {wanted}") from error
    return values


SMOLLM2_VALIDATED = ExportRequest("smollm2", ExportOptions(precision="int8", force=True))
"""The default model; validation takes minutes."""
SMOLLM2_UNVALIDATED = ExportRequest("smollm2", replace(SMOLLM2_VALIDATED.options, validate=False))
"""The fastest way to a usable model."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of an export."""

    name: str
    share: float | None  # fraction that is done; None = unknown
    detail: str  # what is being processed


class Export:
    """A running export.

    Args:
        request: what to export.
        command: replaces the command that takes the arguments of `llm-export`.
        folder: working folder of the process; None = the current one.
        environment: its environment variables; None = those of this process.

    Raises:
        MachineError: the process cannot be started.
    """

    def __init__(
        self,
        request: ExportRequest,
        command: Sequence[str] = (),
        *,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = command or (sys.executable, "-P", "-c", _COMMAND)  # -P: nothing is imported from this folder
        own = {"start_new_session": True} if os.name == "posix" else {}
        try:
            self._process = subprocess.Popen(  # noqa: S603 (no shell)
                [*command, *request.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=environment,
                **own,  # type: ignore[call-overload]
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
            raise MachineError(f"llm-export could not be started: {error}") from error
        self._stages: dict[str, Stage] = {}
        self._errors: deque[str] = deque(maxlen=_TAIL)
        self._path: Path | None = None
        self._report: dict[str, Any] = {}
        self._cancelled = False
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._watch, daemon=True, args=(stream, take))
            for stream, take in ((self._process.stdout, self._progress), (self._process.stderr, self._errors.append))
        ]
        for thread in self._threads:
            thread.start()

    def stages(self) -> list[Stage]:
        """The stages that have started, in order; the last one is running."""
        with self._lock:
            return list(self._stages.values())

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def result(self) -> Path | None:
        """Wait for the end; returns the bundle, or None if the export failed; see `error`."""
        for thread in self._threads:
            thread.join()
        return self._path if self._process.wait() == 0 else None

    @property
    def report(self) -> dict[str, Any]:
        """Sizes and differences from PyTorch, see `exporter.results.Report.to_json`; empty until the end."""
        return self._report

    def error(self) -> str:
        """Why the export failed, as one line."""
        code = self._process.wait()
        if self._cancelled:
            return "the export was cancelled; its files were removed"
        lines = [line for line in self._errors if line.strip()]
        error = next((line for line in reversed(lines) if line.lower().startswith("error:")), "".join(lines[-1:]))
        if error and code >= 0:
            return one_line(re.sub("^error: *", "", error, flags=re.IGNORECASE), _MAX_ERROR)
        if code < 0:
            return f"the export was killed (signal {-code}): possibly out of memory; try fewer precisions"
        return f"the export failed with exit code {code} and no message"

    def cancel(self) -> None:
        """Terminate the process, and kill it if it does not end in time."""
        if self._process.poll() is not None:
            return
        self._cancelled = True
        self._signal(getattr(signal, "SIGTERM", None))
        threading.Thread(target=self._kill_later, daemon=True).start()

    def _kill_later(self) -> None:
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._signal(getattr(signal, "SIGKILL", None))

    def _signal(self, number: int | None) -> None:
        with contextlib.suppress(OSError):
            if os.name == "posix" and number is not None:
                os.killpg(self._process.pid, number)
            else:
                self._process.kill()

    def _watch(self, stream: IO[bytes] | None, take: Any) -> None:
        assert stream is not None
        with stream:
            while line := stream.readline(_MAX_LINE):
                take(printable(line.decode("utf-8", "replace")).strip())

    def _progress(self, line: str) -> None:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(event, dict) or not isinstance(event.get("stage"), str):
            return
        if event["stage"] == "done":
            self._path = Path(str(event.get("path", "")))
            self._report = event["report"] if isinstance(event.get("report"), dict) else {}
            return
        share = event.get("share")
        known = isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1
        name = one_line(event["stage"], 20)
        with self._lock:
            if name in self._stages or len(self._stages) < _TAIL:
                self._stages[name] = Stage(name, share if known else None, one_line(str(event.get("detail", "")), 200))


def named_options(error: str) -> list[str]:
    """The options that an error of `llm-export` names, in its order: those of `OPTIONS`, and `force`.

    If one of them describes a bare state dict, the others that do follow.
    """
    found = [match[1] or "output" for match in _OPTION.finditer(error)]
    named = [name for name in dict.fromkeys(found) if name in OPTIONS or name == "force"]
    return list(dict.fromkeys([*named, *(_STATE_DICT if {*_STATE_DICT} & {*named} else ())]))
