"""Checkpoints and bundles shared by many tests; each is created once per run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny
from calling import call
from filelock import FileLock

from llm_edge.checkpoint.download.smollm2 import smollm2_gguf
from llm_edge.exporter import cli
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions, GraphChoice
from llm_edge.runtime.engine import Engine

if TYPE_CHECKING:
    from openai_server import Server

# A test run in the background may have been started with SIGINT or SIGHUP ignored, and the commands under test would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model as a Hugging Face folder."""
    return _once(tmp_path_factory, "checkpoint", lambda folder: tiny.save_checkpoint(folder / "tiny"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` exported to all precisions; read-only."""
    source = str(tiny_checkpoint)
    return _once(tmp_path_factory, "fused", lambda folder: _export(source, folder / "tiny", GraphChoice.FUSED))


@pytest.fixture(scope="session")
def tiny_portable_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` exported with standard operators only; read-only."""
    source = str(tiny_checkpoint)
    return _once(tmp_path_factory, "portable", lambda folder: _export(source, folder / "tiny", GraphChoice.PORTABLE))


@pytest.fixture(scope="session", params=["lfm2", "granitemoehybrid", "qwen3_5_text", "falcon_h1"])
def state_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with states: convolutions, Mamba 2 with experts, a gated delta net, Mamba 2 beside attention.

    In fp32: rounded activations turn a difference of 1e-7, which the number of tokens in a pass makes, into 1e-2.
    """
    import general_models  # imported only when needed

    def make(folder: Path) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            general_models.shorten_validation(patch, 64)
            source = general_models.save(request.param, tmp_path_factory.mktemp(request.param))
            export(str(source), ExportOptions(folder / request.param, precision="fp32"))
        return folder

    return _once(tmp_path_factory, request.param, make)


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The GGUF of SmolLM2-135M-Instruct, downloaded once into the user's cache."""
    return smollm2_gguf()


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 exported to fp32, with validation (about half a minute); read-only."""
    assert smollm2_file.is_file()

    def make(folder: Path) -> Path:
        return _export("smollm2", folder / "smollm2-135m", GraphChoice.FUSED, "fp32")

    return _once(tmp_path_factory, "smollm2", make)


@pytest.fixture
def llm_export(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `llm-export` with these arguments; returns exit code, stdout and stderr."""
    return lambda *arguments: call(cli.main, capsys, "llm-export", *arguments)


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    """A server with OpenAI's API, shared by the tests of a module; see `server`."""
    from openai_server import Server  # imported only when needed, because it loads a web framework

    made = Server()
    yield made
    made.stop()


@pytest.fixture
def server(running_server: Server) -> Server:
    """The module's server, reset to its initial state."""
    running_server.reset()
    return running_server


@pytest.fixture
def load_engine(tiny_bundle: Path) -> Iterator[Callable[..., Engine]]:
    """Loads engines of a tiny model with speculative decoding, as in `Model`; they are closed after the test."""
    loaded: list[Engine] = []

    def load(precision: str = "fp32", **options: Any) -> Engine:
        loaded.append(Engine.load(tiny_bundle, precision, threads=1, **{"speculative": True, **options}))
        return loaded[-1]

    yield load
    for engine in loaded:
        engine.close()


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """The output of `make` in a folder, created by one test process and shared by all of them."""
    several = "PYTEST_XDIST_WORKER" in os.environ
    folder = (factory.getbasetemp().parent if several else factory.getbasetemp()) / f"shared-{name}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_name(f"partial-{name}")
            partial.mkdir(exist_ok=True)
            make(partial)
            partial.rename(folder)
    return next(folder.iterdir())


def _export(source: str, output: Path, graph: GraphChoice, precisions: str = "fp32,int8,int4") -> Path:
    export(source, ExportOptions(output, precision=precisions, graph=graph))
    return output
