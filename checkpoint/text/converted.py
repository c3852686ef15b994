"""`ConvertedTokenizer`: what the readers of vocabularies return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ConvertedTokenizer:
    """A vocabulary as a tokenizer.json.

    Attributes:
        tokenizer_json: text of the tokenizer.json.
        config: keys of tokenizer_config.json that the vocabulary determines, such as `bos_token`; that file overrides.
        eos_token_ids: tokens that end an answer, if no other file names them.
    """

    tokenizer_json: str
    config: Mapping[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
