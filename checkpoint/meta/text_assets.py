"""Reads what accompanies the weights of a state dict: tokenizer, chat template, sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_edge.checkpoint.base import TokenizerAssets
from llm_edge.checkpoint.huggingface.generation import read_generation as read_folder_generation
from llm_edge.checkpoint.huggingface.tokenizer import read_tokenizer
from llm_edge.checkpoint.meta.chat import (
    ControlTokens,
    chat_template,
    read_control_tokens,
    read_generation,
    read_guards,
)
from llm_edge.checkpoint.meta.config import Settings
from llm_edge.checkpoint.meta.tokenizer import Vocabulary, find_tokenizer, read_vocabulary
from llm_edge.checkpoint.text.converted import ConvertedTokenizer
from llm_edge.runtime.bundle import Guards, ReasoningTokens
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import read_json


@dataclass(frozen=True, slots=True)
class TextAssets:
    """The fields of `Checkpoint` that are not read from the tensor file."""

    tokenizer: TokenizerAssets
    generation: Mapping[str, Any]
    reasoning: ReasoningTokens | None
    guards: Guards | None
    notes: tuple[str, ...] = ()


def read_text_assets(checkpoint: Path, settings: Settings, context: int) -> TextAssets:
    """Find and read the files beside a state dict.

    A config with `tokens:`, or a `…vocab.json` with all default control tokens, selects the chat format of
    `chat.py`. Otherwise the files of the tokenizer's folder determine it.

    Raises:
        CheckpointError: the tokenizer is missing or damaged, or lacks the config's control tokens.
    """
    files = find_tokenizer(checkpoint, settings.tokenizer, settings.path, settings.paths)
    converted = files.convert()
    vocabulary = read_vocabulary(files, converted)
    tokens = None
    if settings.tokens is not None or files.merges is not None:
        tokens = read_control_tokens(settings.content.get("tokens"), f"{settings.path}: tokens", vocabulary)
    generation = read_generation(settings.generation, tokens)
    if tokens is not None:
        tokenizer = _assets(vocabulary, context, tokens)
        return TextAssets(tokenizer, generation, tokens.reasoning, read_guards(settings.generation, tokens))
    if files.merges is not None:
        return TextAssets(_assets(vocabulary, context, None), generation, None, None)
    folder_generation, notes = _folder_generation(files.main.parent, settings.content, vocabulary)
    generation = {**_ids(converted, vocabulary), **folder_generation, **generation}
    return TextAssets(read_tokenizer(files.main.parent, generation, converted), generation, None, None, notes)


def _ids(converted: ConvertedTokenizer | None, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the token ids of a generation config that a converted vocabulary determines."""
    if converted is None:
        return {}
    ends, bos = list(converted.eos_token_ids), vocabulary.id(str(converted.config.get("bos_token")))
    found = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None, "bos_token_id": bos}
    return {key: value for key, value in found.items() if value is not None}


def _assets(vocabulary: Vocabulary, context: int, tokens: ControlTokens | None) -> TokenizerAssets:
    roles = {} if tokens is None else {"eos_token": tokens.answer_end, "pad_token": tokens.padding}
    named = {role: vocabulary.text(index) for role, index in roles.items()}
    return TokenizerAssets(
        tokenizer_json=vocabulary.with_special(tokens.ids if tokens is not None else ()),
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        },
        special_tokens_map=named,
        chat_template=chat_template(tokens, vocabulary) if tokens is not None else None,
        bos_token_id=None,
        eos_token_ids=(tokens.answer_end,) if tokens is not None else (),
        pad_token_id=tokens.padding if tokens is not None else None,
    )


def _folder_generation(
    folder: Path, config: Mapping[str, Any], vocabulary: Vocabulary
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read generation_config.json, with notes on what is ignored.

    Missing token ids are looked up by the names in tokenizer_config.json: without an end token, answers never end.
    """
    generation, notes = read_folder_generation(folder, config)
    path = folder / "tokenizer_config.json"
    names = read_json(path, error=CheckpointError) if path.is_file() else {}
    for role in ("bos_token", "eos_token", "pad_token"):
        token = names.get(role)
        token = token.get("content") if isinstance(token, Mapping) else token
        index = vocabulary.id(token) if isinstance(token, str) else None
        if index is not None:
            generation.setdefault(f"{role}_id", index)
    return generation, notes
