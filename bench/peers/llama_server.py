"""llama-server, built from the sources that llama-cpp-python ships, and a server on a model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from llm_edge.bench.peers.environments import ENVIRONMENTS, call
from llm_edge.runtime.errors import MachineError

_NAME = "llama-server"
_PACKAGE = "llama-cpp-python==0.3.36"
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # it would be downloaded
    "-DLLAMA_OPENSSL=OFF",
)
_TARGETS = ("llama-server", "llama-quantize")
_PATIENCE = 120.0  # seconds until it has loaded its model


def built(work: Path, progress: Callable[[str], None]) -> Path:
    """The folder with the programs, built on first use and again when the package or the options change.

    Raises:
        MachineError: the sources cannot be fetched or built.
    """
    folder = work / _NAME
    programs, stamp = folder / "build" / "bin", folder / "made-of.json"
    environment = ENVIRONMENTS["llama.cpp"]
    made_of = json.dumps([_PACKAGE, _OPTIONS, dict(environment.files)], indent=1)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == made_of:
        return programs
    progress(f"building llama-server of {_PACKAGE} in {folder} (many minutes)")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in environment.files.items():
        (folder / name).write_text(content, encoding="utf-8")
    log = folder / "install.log"
    name = _PACKAGE.partition("==")[0]
    pip = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", f"--no-binary={name}", "-d", str(folder)]
    call([*pip, _PACKAGE], log, _NAME)
    _unpack(next(folder.glob("*.tar.gz")), folder / "source")
    flags = {"CXXFLAGS": environment.variables["CXXFLAGS"].format(folder=folder)}
    source, build = str(folder / "source"), str(folder / "build")
    call(["cmake", "-S", source, "-B", build, *_OPTIONS], log, _NAME, flags)
    jobs = str(os.cpu_count() or 1)
    call(["cmake", "--build", build, "--target", *_TARGETS, "--parallel", jobs], log, _NAME, flags)
    stamp.write_text(made_of, encoding="utf-8")
    return programs


def _unpack(archive: Path, target: Path) -> None:
    """Extract llama.cpp from the package's archive."""
    with tarfile.open(archive) as file:
        file.extractall(target.with_name("package"), filter="data")
    (inner,) = target.with_name("package").glob("*/vendor/llama.cpp")
    inner.rename(target)


def quantized(programs: Path, gguf: Path, kind: str, work: Path) -> Path:
    """A GGUF in another format, such as Q8_0, made on first use."""
    target = work / _NAME / "models" / f"{gguf.stem}-{kind}.gguf"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(".partial")
        command = [str(programs / "llama-quantize"), "--allow-requantize", str(gguf), str(partial), kind]
        call(command, work / _NAME / "convert.log", _NAME)
        partial.rename(target)
    return target


@contextlib.contextmanager
def running(programs: Path, gguf: Path, threads: int, slots: int, context: int) -> Iterator[tuple[str, int]]:
    """llama-server on a model, until the block ends; yields its URL and the id of its process.

    Args:
        programs: from `built`.
        gguf: the model.
        threads: for decode and prefill.
        slots: number of answers generated at the same time.
        context: tokens of each slot.

    Raises:
        MachineError: it did not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(programs / "llama-server"), "--model", str(gguf), "--port", str(port), "--threads", str(threads)]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * context), "--log-disable"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise MachineError(f"llama-server did not start (exit code {process.poll()})")
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def _healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as reply:  # noqa: S310
        return bool(reply.status == 200)
    return False
