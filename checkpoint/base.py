"""What every reader returns. Knows no format; the readers beside this file fill it in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_edge.model.config import ModelConfig
from llm_edge.model.weights import Weights
from llm_edge.runtime.bundle import Guards, ReasoningTags, ReasoningTokens


@dataclass(frozen=True, slots=True)
class TokenizerAssets:
    """A tokenizer as the files of a Hugging Face folder.

    Attributes:
        tokenizer_json: text of `tokenizer.json`.
        tokenizer_config: content of `tokenizer_config.json`, without the chat template.
        special_tokens_map: content of `special_tokens_map.json`.
        chat_template: Jinja source, or None for a model that does not chat.
        bos_token_id: token that opens a text, or None.
        eos_token_ids: tokens that end an answer; may be empty.
        pad_token_id: token that fills rows of a batch, or None.
    """

    tokenizer_json: str
    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    chat_template: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file the weights came from: its name, size in bytes and sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint came from: a name for people, the format, its files and the types of its weights."""

    name: str
    format: str
    files: tuple[SourceFile, ...]
    weight_types: str

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A decoder, whole.

    Attributes:
        config: its shape.
        hf_config: the same as a Hugging Face `config.json`, `model_type` and all, for the bundle's other readers.
        weights: read when they are asked for.
        tokenizer: its files.
        generation: defaults, keys of Hugging Face's `generation_config.json`.
        source: where it came from.
        reasoning: the tokens or texts around its reasoning, where it has them.
        guards: what keeps its answers from going wrong, where it needs that.
    """

    config: ModelConfig
    hf_config: Mapping[str, Any]
    weights: Weights
    tokenizer: TokenizerAssets
    generation: Mapping[str, Any]
    source: Source
    reasoning: ReasoningTokens | ReasoningTags | None = None
    guards: Guards | None = None


def hash_file(path: Path) -> SourceFile:
    """Size and sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SourceFile(path.name, path.stat().st_size, digest)
