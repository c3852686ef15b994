"""Checkpoints and bundles that many tests share; each is made once a run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from calling import call

from llm_edge.exporter import cli
from llm_edge.exporter.checkpoint.smollm2 import smollm2_gguf
from llm_edge.exporter.export import export
from llm_edge.exporter.graph import GraphStyle
from llm_edge.exporter.recipes import parse_precisions
from llm_edge.runtime.engine import Engine

# A run in the background may have been begun with Ctrl-C or a closing terminal ignored, and the commands under test
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model as a Hugging Face folder."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` exported to all precisions; not to be written to."""
    return _export(str(tiny_checkpoint), tmp_path_factory.mktemp("bundle") / "tiny", GraphStyle.FUSED)


@pytest.fixture(scope="session")
def tiny_portable_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` exported with standard operators only; not to be written to."""
    return _export(str(tiny_checkpoint), tmp_path_factory.mktemp("portable") / "tiny", GraphStyle.PORTABLE)


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The GGUF of SmolLM2-135M-Instruct, fetched once into the user's cache."""
    return smollm2_gguf()


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 exported to fp32, with validation (about half a minute); not to be written to."""
    assert smollm2_file.is_file()
    return _export("smollm2", tmp_path_factory.mktemp("bundle") / "smollm2-135m", GraphStyle.FUSED, "fp32")


@pytest.fixture
def llm_export(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `llm-export` with these arguments; gives exit code, stdout and stderr."""
    return lambda *arguments: call(cli.main, capsys, "llm-export", *arguments)


@pytest.fixture
def load_engine(tiny_bundle: Path) -> Iterator[Callable[..., Engine]]:
    """Loads engines of a tiny model that guess as `Model` does; they are closed behind the test."""
    loaded: list[Engine] = []

    def load(precision: str = "fp32", **options: Any) -> Engine:
        loaded.append(Engine.load(tiny_bundle, precision, 1, **{"guess": True, **options}))
        return loaded[-1]

    yield load
    for engine in loaded:
        engine.close()


def _export(source: str, output: Path, style: GraphStyle, precisions: str = "fp32,int8,int4") -> Path:
    recipes = parse_precisions(precisions)
    export(source, output, recipes, style, validate=True, force=False, progress=lambda *_: None)
    return output
