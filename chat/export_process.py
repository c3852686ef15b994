"""Makes a bundle by running `llm-export` as a process of its own, which can be watched and ended. Knows no widgets."""

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
    "rope-theta": "base of the rotary positions",
    "norm-eps": "epsilon of the norms",
    "max-seq-len": "tokens a context holds at most",
    "adapter": "folder or id of a LoRA adapter",
    "output": "folder for the bundle",
}
"""Those that may have to be given, by what they are; `llm-export` names the ones it wants in its error."""

_BARE = ("config", "tokenizer", "n-heads", "n-kv-heads", "rope-theta", "norm-eps", "max-seq-len")
_COMMAND = "import sys; sys.argv[0] = 'llm-export'; from llm_edge.exporter.cli import main; main()"
_LONGEST_LINE = 1 << 16
_LONGEST_ERROR = 600  # characters
_TAIL = 40  # lines of what it said last
_GRACE = 5.0  # seconds to clean up in
_OPTION = re.compile(r"(?<![\w-])(?:--([a-z][a-z-]*)|-o(?![\w-]))")


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What is to be exported.

    Attributes:
        source: a file, a folder, a Hugging Face id or the word `smollm2`.
        precisions: some of `PRECISIONS`; none = what `llm-export` takes by itself.
        options: some of `OPTIONS`, with what was typed for each.
        force: replace what is there.
        validate: compare with PyTorch, and measure how close it is.
    """

    source: str
    precisions: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    validate: bool = True

    def arguments(self) -> list[str]:
        """Of `llm-export`."""
        given = ["--progress", "json"]
        if self.precisions:
            given += ["--precision", ",".join(self.precisions)]
        given += [f"--{name}={value.strip()}" for name, value in self.options.items() if value.strip()]
        if self.force:
            given.append("--force")
        if not self.validate:
            given.append("--no-validate")
        return [*given, "--", os.path.expanduser(self.source)]  # noqa: PTH111 (it may be an id, and no path)


SMOLLM2_SOON = ExportRequest(_SMOLLM2, ("int8",), force=True, validate=False)
"""The quickest way to a model that answers well."""
SMOLLM2_INT8 = ExportRequest(_SMOLLM2, ("int8",), force=True)
"""The same, with its proof, which takes minutes."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the work: its share done, None where nobody knows, and what is at work."""

    name: str
    share: float | None
    detail: str


class Export:
    """An export that runs; begins at once.

    Args:
        wish: what.
        command: runs `llm-export`; its arguments are added.

    Raises:
        MachineError: no process could be started.
    """

    def __init__(self, wish: ExportRequest, command: Sequence[str] = ()) -> None:
        command = command or (sys.executable, "-P", "-c", _COMMAND)  # -P: nothing is imported from this folder
        own = {"start_new_session": True} if os.name == "posix" else {}
        try:
            self._process = subprocess.Popen(  # noqa: S603 (no shell)
                [*command, *wish.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                **own,  # type: ignore[call-overload]
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
            raise MachineError(f"llm-export could not be started: {error}") from error
        self._stages: dict[str, Stage] = {}
        self._said: deque[str] = deque(maxlen=_TAIL)
        self._path: Path | None = None
        self._cancelled = False
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._watch, daemon=True, args=(stream, take))
            for stream, take in ((self._process.stdout, self._progress), (self._process.stderr, self._said.append))
        ]
        for thread in self._threads:
            thread.start()

    def stages(self) -> list[Stage]:
        """What has begun so far, in order; the last one is at work."""
        with self._lock:
            return list(self._stages.values())

    @property
    def seconds(self) -> float:
        """How long it has been at work."""
        return time.monotonic() - self._began

    @property
    def cancelled(self) -> bool:
        """Whether it was ended by `cancel`."""
        return self._cancelled

    def result(self) -> Path | None:
        """Waits for the end; the bundle, or None where there is none, see `error`."""
        for thread in self._threads:
            thread.join()
        return self._path if self._process.wait() == 0 else None

    def error(self) -> str:
        """Once it has ended without a bundle: why, in a line."""
        code = self._process.wait()
        if self._cancelled:
            return "the export was cancelled; nothing is left of it"
        said = [line for line in self._said if line.strip()]
        told = next((line for line in reversed(said) if line.lower().startswith("error:")), said[-1] if said else "")
        if told and code >= 0:
            return one_line(re.sub("^error: *", "", told, flags=re.IGNORECASE), _LONGEST_ERROR)
        if code < 0:
            return f"the export was killed (signal {-code}): maybe memory ran out; try fewer precisions"
        return f"the export ended with code {code} and said nothing"

    def cancel(self) -> None:
        """End it: first so that it can clean up, after a while for good."""
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
            while line := stream.readline(_LONGEST_LINE):
                take(printable(line.decode("utf-8", "replace")).strip())

    def _progress(self, line: str) -> None:
        try:
            told = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(told, dict) or not isinstance(told.get("stage"), str):
            return
        if told["stage"] == "done":
            self._path = Path(str(told.get("path", "")))
            return
        share = told.get("share")
        known = isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1
        name = one_line(told["stage"], 20)
        with self._lock:
            if name in self._stages or len(self._stages) < _TAIL:
                self._stages[name] = Stage(name, share if known else None, one_line(str(told.get("detail", "")), 200))


def named_options(error: str) -> list[str]:
    """Those of `OPTIONS`, and `force`, that an error of `llm-export` names, in its order.

    Behind them come the others that go with them: whoever has to say one thing of a bare state dict has to say more.
    """
    found = [match[1] or "output" for match in _OPTION.finditer(error)]
    named = [name for name in dict.fromkeys(found) if name in OPTIONS or name == "force"]
    return list(dict.fromkeys([*named, *(_BARE if {*_BARE} & {*named} else ())]))
