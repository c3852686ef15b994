"""`Checkpoint`: what every reader returns."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from torch import Tensor
from typing_extensions import TypeVar

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
        chat_template: Jinja source, or None for a model without a chat format.
        named_templates: further chat templates by name; `tool_use` is the one for conversations with tools.
        bos_token_id: token that starts a text, or None.
        eos_token_ids: tokens that end an answer; may be empty.
        pad_token_id: token that pads the rows of a batch, or None.
        notes: see `Checkpoint.notes`.
    """

    tokenizer_json: str
    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    chat_template: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    named_templates: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceFile:
    """Name, size in bytes and SHA-256 of a file that supplied weights."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint came from."""

    name: str  # display name of the model
    format: str  # name of the file format
    files: tuple[SourceFile, ...]  # those that supplied weights
    weight_types: str  # storage types of the weights, most frequent first, separated by commas

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class OriginalModel:
    """What another library needs to read a Hugging Face checkpoint on its own.

    Attributes:
        config: content of `config.json`.
        folder: folder that holds config and weights; None if the library would not find the weights there.
        names: names of the tensors as the library knows them.
        load: reads one of them.
        adapter: folder of the merged LoRA adapter, or None.
    """

    config: Mapping[str, Any]
    folder: Path | None
    names: tuple[str, ...]
    load: Callable[[str], Tensor]
    adapter: Path | None = None


ConfigT = TypeVar("ConfigT", default=ModelConfig)
"""Architecture and sizes of a model: a `ModelConfig`, or what another route of the export has instead."""
WeightsT = TypeVar("WeightsT", bound=Mapping[str, Tensor], default=Weights)


@dataclass(frozen=True, slots=True)
class Checkpoint(Generic[ConfigT, WeightsT]):
    """A model with everything an export needs.

    Attributes:
        config: architecture and sizes; at least `vocab_size` and `max_position_embeddings`.
        hf_config: the equivalent Hugging Face `config.json`, including `model_type`, for other readers of the bundle.
        weights: weights, read lazily.
        tokenizer: tokenizer files.
        generation: default sampling parameters, with the keys of Hugging Face's `generation_config.json`.
        source: where the checkpoint came from.
        reasoning: tokens or tags that enclose the model's reasoning, or None.
        guards: constraints on the output that the model requires, or None.
        notes: what the export should tell its user: files and settings that were overruled or ignored, one sentence
            each. They are printed and stored in the manifest.
        original: for an independent reader; None if the source is not a Hugging Face checkpoint.
    """

    config: ConfigT
    hf_config: Mapping[str, Any]
    weights: WeightsT
    tokenizer: TokenizerAssets
    generation: Mapping[str, Any]
    source: Source
    reasoning: ReasoningTokens | ReasoningTags | None = None
    guards: Guards | None = None
    notes: tuple[str, ...] = ()
    original: OriginalModel | None = None


AnyCheckpoint = Checkpoint[Any, Any]


def hash_file(path: Path) -> SourceFile:
    """Return name, size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SourceFile(path.name, path.stat().st_size, digest)


def by_frequency(types: Iterable[str]) -> str:
    """Join the distinct type names with commas, most frequent first."""
    return ", ".join(name for name, _ in Counter(types).most_common())
