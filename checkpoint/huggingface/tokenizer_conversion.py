"""Converts vocabularies that are not a tokenizer.json with transformers, if it is installed."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

from llm_edge.runtime.errors import CheckpointError

_VOCABULARIES = (("tokenizer.model",), ("spiece.model",), ("vocab.json", "merges.txt"), ("tekken.json",))


def convert_tokenizer(folder: Path) -> str:
    """Return the content of a tokenizer.json for the vocabulary of a folder. No code of the folder is executed.

    Raises:
        CheckpointError: there is no vocabulary, or transformers is missing or cannot convert it.
    """
    found = next((names for names in _VOCABULARIES if all((folder / name).is_file() for name in names)), None)
    if found is None:
        raise CheckpointError(
            f"{folder} has no tokenizer.json: save one with transformers "
            "(AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        )
    names = " and ".join(found)
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"{folder} has no tokenizer.json: to convert {names}, pip install transformers sentencepiece protobuf"
        ) from error
    level = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity(logging.CRITICAL)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return str(loaded.backend_tokenizer.to_str())
    except BaseException as error:  # native libraries may raise other than Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and transformers cannot convert {names} ({reason}): "
            "save one where the model's tokenizer loads (AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
