"""Export, chat and engine without the modules and calls that only Linux has, simulated in separate processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Only our code misses them: libraries choose their calls by the name of the system.
WINDOWS_LIKE = """
import builtins, ctypes, importlib.util, mmap, os, signal, sys, types
MODULES = ("resource", "fcntl", "termios", "pty", "tty", "grp", "pwd", "readline")
NAMES = ("fork", "forkpty", "sched_getaffinity", "getuid", "geteuid", "killpg", "setsid", "statvfs", "O_DIRECTORY",
         "O_NONBLOCK", "O_CLOEXEC", "register_at_fork", "posix_fadvise", "uname", "getloadavg", "sysconf",
         "SIGHUP", "SIGKILL", "SIGUSR1", "pthread_sigmask", "setitimer", "pthread_kill")
def ours(depth=2):
    return sys._getframe(depth).f_globals.get("__name__", "").startswith("llm_edge.")
class Limited(types.ModuleType):
    def __getattribute__(self, name):
        if (name in NAMES or name.startswith(("MADV_", "MAP_"))) and ours():
            raise AttributeError(f"module {self} has no attribute {name!r}")
        return super().__getattribute__(name)
for module in (os, signal, mmap):
    module.__class__ = Limited
real_import, real_find = builtins.__import__, importlib.util.find_spec
def import_module(name, *rest, **options):
    if name in MODULES and ours():
        raise ImportError(f"No module named {name!r}")
    return real_import(name, *rest, **options)
def find_spec(name, *rest):
    return None if name in MODULES else real_find(name, *rest)
builtins.__import__, importlib.util.find_spec = import_module, find_spec
real_open, real_fsync, real_library = os.open, os.fsync, ctypes.CDLL
for_writing = {}
def open_file(path, flags, *rest, **options):
    if ours() and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    descriptor = real_open(path, flags, *rest, **options)
    for_writing[descriptor] = flags & 3 != 0
    return descriptor
def fsync(descriptor):
    if not for_writing.get(descriptor, True):
        raise OSError(9, "Bad file descriptor")
    real_fsync(descriptor)
def library(name, *rest, **options):
    if name is None and ours():
        raise TypeError("bad argument type for built-in operation")  # as on Windows
    return real_library(name, *rest, **options)
os.open, os.fsync, ctypes.CDLL = open_file, fsync, library
"""
SETUP = (
    WINDOWS_LIKE
    + """
from pathlib import Path
arguments = sys.argv[1:]
"""
)


def run(code: str, *arguments: object, code_expected: int = 0) -> str:
    words = [sys.executable, "-c", SETUP + code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == code_expected, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


COMMAND = """
import importlib
main = importlib.import_module(f"llm_edge.{arguments[0]}.cli").main
sys.argv = ["command", *arguments[1:]]
main()
"""
LIBRARY = """
from llm_edge.runtime import Engine, Model, SamplingParams
model = Model.load(arguments[0], "fp32")
text = model.generate("Hello", SamplingParams(temperature=0, max_tokens=8)).result().text
engine = Engine.load(arguments[0], "fp32", active=2)
answers = [engine.generate("Hello", SamplingParams(temperature=0, max_tokens=8)) for _ in range(3)]
assert all(answer.result().text == text for answer in answers)
engine.close()
print("same")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="simulates other systems on Linux")
class TestWithoutTheCallsOfLinux:
    def test_an_export_writes_a_bundle_twice(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        options = ("-o", tmp_path / "bundle", "--no-validate", "--precision", "int8", "--force")
        for _ in range(2):
            run(COMMAND, "exporter", tiny_checkpoint, *options)
            assert (tmp_path / "bundle" / "manifest.json").exists()
            assert [path.name for path in tmp_path.iterdir()] == ["bundle"]

    def test_model_and_engine_give_the_same_text(self, tiny_bundle: Path) -> None:
        assert run(LIBRARY, tiny_bundle) == "same\n"

    def test_the_chat_answers_a_question(self, tiny_bundle: Path) -> None:
        options = ("--ask", "hi", "--max-tokens", "4", "--temperature", "0")
        assert "error" not in run(COMMAND, "tui", tiny_bundle, *options)

    def test_the_full_screen_chat_can_be_imported(self) -> None:
        run("import llm_edge.tui.app, llm_edge.tui.terminal, llm_edge.chat.history.store")

    def test_benchmarks_name_what_they_need(self, tiny_bundle: Path) -> None:
        output = run(COMMAND, "bench", tiny_bundle, code_expected=2)
        assert output == "error: llm-bench needs the Python module resource: run it on Linux or macOS\n"
        chat = "import llm_edge.bench.chat as chat; chat.main(arguments)"
        assert "needs the Python module pty, termios" in run(chat, tiny_bundle, code_expected=2)
