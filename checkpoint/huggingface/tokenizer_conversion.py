"""Converts vocabularies that are not a tokenizer.json: our own readers for some kinds, transformers for the others."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_edge.checkpoint.text.converted import ConvertedTokenizer
from llm_edge.checkpoint.text.sentencepiece_model import read_sentencepiece
from llm_edge.checkpoint.text.tekken import read_tekken
from llm_edge.checkpoint.text.tiktoken_file import is_tiktoken, read_tiktoken
from llm_edge.checkpoint.text.vocab_merges import read_vocab_and_merges
from llm_edge.runtime.errors import CheckpointError

_SENTENCEPIECE, _TEKKEN = "tokenizer.model", "tekken.json"
_VOCABULARIES = ((_TEKKEN,), (_SENTENCEPIECE,), ("spiece.model",), ("vocab.json", "merges.txt"))


def find_vocabulary(folder: Path) -> Path | None:
    """Return the first file of the vocabulary in a folder that `convert_tokenizer` reads, or None."""
    names = _find(folder)
    return None if names is None else folder / names[0]


def convert_tokenizer(folder: Path, config: Mapping[str, Any]) -> ConvertedTokenizer:
    """Convert the vocabulary of a folder to a tokenizer.json. No code of the folder is executed.

    tekken.json, tiktoken's files, most SentencePiece models and the files of GPT-2's and Qwen2's tokenizers are read
    here; transformers converts the others.

    Args:
        folder: contains the vocabulary.
        config: content of tokenizer_config.json; empty if there is none.

    Raises:
        CheckpointError: there is no vocabulary, it is damaged, or transformers is missing or cannot convert it.
    """
    names = _find(folder)
    if names is None:
        raise CheckpointError(
            f"{folder} has no tokenizer.json: save one with transformers "
            "(AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        )
    first = folder / names[0]
    if first.name == _TEKKEN:
        return read_tekken(first)
    if is_tiktoken(first):
        return read_tiktoken(first, config)
    if first.name == _SENTENCEPIECE and (found := read_sentencepiece(first, config)) is not None:
        return found
    if len(names) == 2 and (found := read_vocab_and_merges(first, folder / names[1], config)) is not None:
        return found
    return ConvertedTokenizer(_convert_with_transformers(folder, " and ".join(names)))


def _find(folder: Path) -> tuple[str, ...] | None:
    """Return the names of the files of a vocabulary."""
    ranks = tuple((path.name,) for path in sorted(folder.glob("*.tiktoken")) + sorted(folder.glob("tiktoken.model")))
    known = (*_VOCABULARIES, *ranks)
    return next((names for names in known if all((folder / name).is_file() for name in names)), None)


def _convert_with_transformers(folder: Path, names: str) -> str:
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
