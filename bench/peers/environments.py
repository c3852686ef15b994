"""Creates the environment of each peer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm_edge.runtime.errors import MachineError

TORCH = "torch==2.13.0"  # exactly: a looser pin may take a build with gigabytes of CUDA libraries
_GGUF = ("transformers==5.5.4", "gguf==0.19.0", "accelerate==1.15.0")  # newer ones cannot save a model read from a GGUF

# gcc before 14 declares that `_tile_loadconfig` reads 8 of the 64 bytes that it actually reads, and omits the stores of
# the others: llama.cpp then crashes with a segmentation fault on processors with AMX. Nothing else is changed.
_TILE_HEADER = """\
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\\t%0" : : "m"(*(const char (*)[64])(config)))
#endif
"""
_QUIET = {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "CI": "true", "PYTHONNOUSERSITE": "1"}


@dataclass(frozen=True, slots=True)
class Environment:
    """The content of an environment.

    Attributes:
        peer: its name.
        version: of the peer, for reports.
        installs: arguments of each `pip install` call.
        variables: environment variables for pip; `{folder}` stands for the peer's folder.
        files: files to create in the peer's folder first, name -> content.
    """

    peer: str
    version: str
    installs: tuple[tuple[str, ...], ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def stamp(self) -> str:
        """A hash of everything above."""
        return json.dumps([self.installs, dict(self.variables), dict(self.files)], indent=1)


ENVIRONMENTS: Mapping[str, Environment] = {
    "llama.cpp": Environment(
        "llama.cpp",
        "llama-cpp-python 0.3.36",
        # pip's cache might contain a wheel built with other flags
        (("--no-cache-dir", "--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36"),),
        {
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF",
            "CXXFLAGS": "-include '{folder}/tile_config.h'",
        },
        {"tile_config.h": _TILE_HEADER},
    ),
    "genai": Environment(
        "genai",
        "onnxruntime-genai 0.18.0, onnxruntime 1.32.0",
        (
            (
                "onnxruntime-genai==0.18.0",
                "onnxruntime==1.32.0",
                "onnx==1.23.2",
                "onnx-ir==1.1.0",
                TORCH,
                *_GGUF,
            ),
        ),
    ),
    "openvino": Environment(
        "openvino",
        "openvino-genai 2026.4.1, nncf 3.4.0, optimum-intel 2.2.0",
        (
            (
                "openvino-genai==2026.4.1.0",
                "openvino==2026.4.1",
                "nncf==3.4.0",
                TORCH,
                *_GGUF,
                "requests==2.34.2",
            ),
            # it depends on torchvision without using it here, and a build that does not match torch breaks both
            ("--no-deps", "optimum-intel==2.2.0", "optimum==2.3.0"),
        ),
    ),
}


def python_of(environment: Environment, work: Path, progress: Callable[[str], None]) -> Path:
    """The interpreter of an environment, created on first use and again when its pins change, with its models.

    Raises:
        MachineError: it cannot be created.
    """
    folder = work / environment.peer
    python, stamp = folder / "venv" / "bin" / "python", folder / "made-of.json"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == environment.stamp:
        return python
    progress(f"installing {environment.version} into {folder} (minutes)")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in environment.files.items():
        (folder / name).write_text(content, encoding="utf-8")
    variables = {key: value.format(folder=folder) for key, value in environment.variables.items()}
    log = folder / "install.log"
    call([sys.executable, "-m", "venv", str(folder / "venv")], log, environment.peer)
    for arguments in environment.installs:
        call([str(python), "-m", "pip", "install", "--no-input", *arguments], log, environment.peer, variables)
    stamp.write_text(environment.stamp, encoding="utf-8")
    return python


def call(command: Sequence[str], log: Path, what: str, variables: Mapping[str, str] | None = None) -> None:
    """Run a command and append its output to a file.

    Raises:
        MachineError: it failed.
    """
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False, env=variables_for(variables)
        )
    if done.returncode != 0:
        raise MachineError(f"{what}: {' '.join(command[1:4])} … failed (exit code {done.returncode}): see {log}")


def variables_for(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables for installing peers and converting models: no hub access, no telemetry."""
    return {**os.environ, **_QUIET, **(more or {})}
