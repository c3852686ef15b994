"""Runs a command in a forked process with limits, and says what is wrong with how it ended.

Everything that commands import has to be imported before, so that the time is that of the work. Linux only.
"""

from __future__ import annotations

import os
import resource
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 3.0  # of processor time, because other programs may use the processors
MAX_WAIT = 30.0  # seconds, for commands that wait instead of working
MAX_BYTES = 1 << 30  # of memory in use
MAX_ADDRESSES = 3 << 30  # of address space, beyond what the parent has reserved; protects this machine
FOREIGN = ("Traceback", "panicked", "onnxruntime:", "terminate called", "what():", "libc++", "Warning", ".rs:", ".cc:")


@dataclass(frozen=True)
class Command:
    """A command to run in a folder.

    Attributes:
        what: what is wrong with its input, for reports.
        main: a command's entry point, which reads `sys.argv`.
        words: the command line; paths in it are relative to the folder.
        variables: environment variables, in addition to those of this process.
        typed: standard input.
    """

    what: str
    main: Callable[[], object]
    words: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    typed: str = ""

    def shell(self, folder: Path) -> str:
        """The line for a shell that repeats it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        line = " ".join([*variables, shlex.join(self.words)])
        return f"cd {shlex.quote(str(folder))} && printf %s {shlex.quote(self.typed)} | {line}"


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: exit code; negative for a signal.
        out: everything written to file descriptor 1.
        err: everything written to file descriptor 2.
        seconds: of processor time.
        size: largest number of bytes in use.
        waited: seconds from start to end.
    """

    code: int
    out: str
    err: str
    seconds: float
    size: int
    waited: float

    def problem(self) -> str | None:
        """Why this is wrong; None for a success, and for a refusal in one line."""
        if self.waited > MAX_WAIT:
            return f"ended only after {self.waited:.0f} s"
        no_memory = self.code == 3 and "not enough memory" in self.err  # MAX_ADDRESSES were reserved
        if self.code not in (0, 2) and not no_memory:
            return f"exit code {self.code}"
        if found := next((words for words in FOREIGN if words in self.err or words in self.out), None):
            return f"printed {found!r}"
        lines = self.err.splitlines()
        if self.code != 0 and (len(lines) != 1 or not lines[0].startswith("error: ") or not lines[0].isprintable()):
            return f"printed {len(lines)} lines instead of one error"
        if self.seconds > SECONDS:
            return f"took {self.seconds:.1f} s"
        if self.size > MAX_BYTES:
            return f"used {self.size / 1e6:,.0f} MB"
        return None


def run(command: Command, folder: Path) -> Outcome:
    """Run a command in a process of its own."""
    out, err, typed = (folder.with_name(f"{folder.name}.{name}") for name in ("out", "err", "in"))
    typed.write_text(command.typed, encoding="utf-8")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            for number, path in enumerate((typed, out, err)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC * (number > 0)), number)
            os._exit(_child(command, folder))
        finally:
            os._exit(70)
    status, usage = _wait(child, began + MAX_WAIT)
    return Outcome(
        code=os.waitstatus_to_exitcode(status),
        out=out.read_text(encoding="utf-8", errors="replace"),
        err=err.read_text(encoding="utf-8", errors="replace"),
        seconds=usage.ru_utime + usage.ru_stime,
        size=usage.ru_maxrss * 1024,
        waited=time.monotonic() - began,
    )


def _child(command: Command, folder: Path) -> int:
    os.setpgid(0, 0)  # so that processes that the command starts can be ended with it
    os.chdir(folder)
    os.environ.update(command.variables)
    sys.argv = list(command.words)
    reserved = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (reserved + MAX_ADDRESSES, reserved + MAX_ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code: object = 0
    try:
        command.main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 (the report of any failure)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 0 if code is None else 1


def _wait(child: int, deadline: float) -> tuple[int, resource.struct_rusage]:
    """Wait for a process, and kill it with those that it started at the deadline."""
    while True:
        number, status, usage = os.wait4(child, os.WNOHANG)
        if number:
            return status, usage
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage
        time.sleep(0.005)
