"""`open_model`: opens the checkpoint that a user wants to fine-tune."""

from __future__ import annotations

import sys
from pathlib import Path

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.meta.config import StateDictOptions
from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.finetune.data.options import DataOptions
from llm_edge.runtime.bundle import MANIFEST
from llm_edge.runtime.errors import CheckpointError, ParameterError


def state_dict_options(options: DataOptions) -> StateDictOptions:
    """Return what the options say about a bare state dict."""
    return StateDictOptions(config=options.config, tokenizer=options.tokenizer)


def open_model(model: str, options: DataOptions) -> Checkpoint:
    """Open a checkpoint that is named as for llm-export; slow steps, such as a download, are reported on stderr.

    Raises:
        InputError: there is no such checkpoint, or it is of another kind.
    """
    path = Path(model)
    if path.suffix in (".jsonl", ".json"):
        raise ParameterError(f"{model} is no model: give the model first, then the data file")
    if (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{model} is a bundle, which cannot be trained: give the checkpoint that it was made from"
        )
    source = SourceOptions(state_dict_options(options))
    return open_checkpoint(model, source, lambda message: print(message, file=sys.stderr))
