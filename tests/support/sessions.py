"""Sessions and models over graph files, for tests that use parts of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
from llm_edge.runtime.backend.open import open_graph
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.bundle import Bundle
from llm_edge.runtime.loading import LoadedBundle
from llm_edge.runtime.model import Model
from llm_edge.runtime.model_shape import ModelShape


def open_file(
    path: Path,
    shape: ModelShape,
    share_buffer: bool,
    provider: str = "auto",
    threads: int | None = None,
    *,
    spinning: bool = True,
    hidden_size: int | None = None,
) -> Session:
    """A session over an `.onnx` file."""
    file = GraphFile(path, shape, share_buffer=share_buffer, hidden_size=hidden_size)
    return Session(open_graph(file, ExecutionOptions(provider, threads, spinning)))


def open_precision(path: Path, precision: str, provider: str = "cpu", threads: int | None = 1) -> Session:
    """A session over the graph of a bundle's precision."""
    bundle = Bundle.open(path)
    return Session(open_graph(GraphFile.of(bundle, bundle.precision(precision)), ExecutionOptions(provider, threads)))


def model_over(session: Any, like: Model) -> Model:
    """A copy of the model `like` that uses another session."""
    return Model(LoadedBundle(like.bundle, like.precision, like.tokenizer, session))
