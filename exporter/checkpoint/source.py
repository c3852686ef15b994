"""From what a user names to a checkpoint: the word `smollm2`, a folder or a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from llm_edge.exporter.checkpoint.base import Checkpoint
from llm_edge.exporter.checkpoint.gguf_checkpoint import read_gguf
from llm_edge.exporter.checkpoint.huggingface import read_folder
from llm_edge.exporter.checkpoint.smollm2 import smollm2_gguf
from llm_edge.runtime.errors import CheckpointError

SMOLLM2 = "smollm2"
_SMOLLM2_NAME = "smollm2-135m"
_SMOLLM2_SAMPLING = {
    "do_sample": True,
    "temperature": 0.2,
    "top_p": 0.9,
}  # of the model's card; the GGUF has none


def bundle_name(source: str) -> str:
    """Folder name of a source's bundle where the user gives none."""
    return _SMOLLM2_NAME if source == SMOLLM2 else Path(source).resolve().name.removesuffix(".gguf")


def open_checkpoint(source: str, progress: Callable[[str], None]) -> Checkpoint:
    """Open a source; weights are read later, one at a time.

    Args:
        source: `smollm2`, a Hugging Face folder or a `.gguf` file.
        progress: is told in a few words what goes on where that takes long.

    Raises:
        CheckpointError: it is missing, damaged or of a kind that is not read.
    """
    if source == SMOLLM2:
        checkpoint = read_gguf(smollm2_gguf(progress))
        return dataclasses.replace(
            checkpoint,
            generation={**checkpoint.generation, **_SMOLLM2_SAMPLING},
            source=dataclasses.replace(checkpoint.source, name="SmolLM2-135M-Instruct"),
        )
    path = Path(source)
    if path.is_dir():
        return read_folder(path)
    if not path.exists():
        raise CheckpointError(f"{source}: no such file or folder (the word {SMOLLM2!r} fetches a model to try)")
    if not path.is_file():
        raise CheckpointError(f"{source}: neither a file nor a folder")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read ({error.strerror})") from error
    if magic == b"GGUF":
        return read_gguf(path)
    raise CheckpointError(f"{source}: not a GGUF file; give a Hugging Face folder, a .gguf file or {SMOLLM2!r}")
