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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import MachineError

_SMOLLM2 = "smollm2"
PRECISIONS = ("int8", "int4", "fp32", "int8-exact", "int4-mixed", "int8-kv8", "fp16", "source")
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".gguf")
OPTIONS: Mapping[str, str] = {
    "config": "config.yaml, params.json or config.json",
    "tokenizer": "folder with tokenizer.json, or vocab.json and merges.txt",
    "n-heads": "query heads",
    "n-kv-heads": "key/value heads",
    "rope-theta": "RoPE base frequency",
    "norm-eps": "epsilon of the norm layers",
    "max-seq-len": "maximum number of tokens",
    "adapter": "folder or id of a LoRA adapter",
    "output": "folder for the bundle",
}
"""Options that a source may require, with a description; the error of `llm-export` names them."""

_BARE = ("config", "tokenizer", "n-heads", "n-kv-heads", "rope-theta", "norm-eps", "max-seq-len")
_COMMAND = "import sys; sys.argv[0] = 'llm-export'; from llm_edge.exporter.cli import main; main()"
_MAX_LINE = 1 << 16
_MAX_ERROR = 600  # characters
_TAIL = 40  # latest lines of stderr that are kept
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_OPTION = re.compile(r"(?<![\w-])(?:--([a-z][a-z-]*)|-o(?![\w-]))")


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What to export; the fields correspond to the options of `llm-export`.

    Attributes:
        source: a file, a folder, a Hugging Face id or `smollm2`.
        precisions: some of `PRECISIONS`; empty = the default ones.
        options: values of some of `OPTIONS`, as typed.
        force: replace an existing bundle.
        validate: compare the bundle with PyTorch and measure its fidelity.
    """

    source: str
    precisions: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    validate: bool = True

    def arguments(self) -> list[str]:
        """The arguments of `llm-export`."""
        given = ["--progress", "json"]
        if self.precisions:
            given += ["--precision", ",".join(self.precisions)]
        given += [f"--{name}={value.strip()}" for name, value in self.options.items() if value.strip()]
        if self.force:
            given.append("--force")
        if not self.validate:
            given.append("--no-validate")
        return [*given, "--", os.path.expanduser(self.source)]  # noqa: PTH111 (it may be an id instead of a path)


SMOLLM2_UNVALIDATED = ExportRequest(_SMOLLM2, ("int8",), force=True, validate=False)
"""The fastest way to a usable model."""
SMOLLM2_VALIDATED = ExportRequest(_SMOLLM2, ("int8",), force=True)
"""The same with validation, which takes minutes."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of an export.

    Attributes:
        name: the stage's name.
        share: fraction that is done; None = unknown.
        detail: what is being processed.
    """

    name: str
    share: float | None
    detail: str


class Export:
    """A running export.

    Args:
        request: what to export.
        command: the command that is run, without the arguments of `llm-export`.

    Raises:
        MachineError: the process cannot be started.
    """

    def __init__(self, request: ExportRequest, command: Sequence[str] = ()) -> None:
        command = command or (sys.executable, "-P", "-c", _COMMAND)  # -P: nothing is imported from this folder
        own = {"start_new_session": True} if os.name == "posix" else {}
        try:
            self._process = subprocess.Popen(  # noqa: S603 (no shell)
                [*command, *request.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                **own,  # type: ignore[call-overload]
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
            raise MachineError(f"llm-export could not be started: {error}") from error
        self._stages: dict[str, Stage] = {}
        self._errors: deque[str] = deque(maxlen=_TAIL)
        self._path: Path | None = None
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
    return list(dict.fromkeys([*named, *(_BARE if {*_BARE} & {*named} else ())]))
