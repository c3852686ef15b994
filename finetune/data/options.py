"""`DataOptions`: how a data file becomes training and evaluation samples, with command-line flags and help texts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Option


class LongConversations(StrEnum):
    """What happens to a conversation of more than `max_length` tokens."""

    CUT = "cut"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Options of reading a data file, which needs the tokenizer of the model."""

    max_length: Annotated[
        int, Option(min=8, help="Maximum number of tokens of a conversation; at most the model's context.")
    ] = 1024
    long: Annotated[
        LongConversations,
        Option(help="Conversations longer than --max-length: cut after the last answer that fits, or skip."),
    ] = LongConversations.CUT
    evaluation: Annotated[
        float, Option(min=0.0, max=0.5, help="Share of the conversations that is kept for evaluation.")
    ] = 0.05
    evaluation_data: Annotated[
        Path | None, Option(help="JSONL file of conversations for evaluation, in place of a share of the data.")
    ] = None
    split_seed: Annotated[int, Option(min=0, help="Seed of the choice of conversations for evaluation.")] = 0
    config: Annotated[
        Path | None, Option(help="For a bare state dict: its config.yaml, params.json or config.json.")
    ] = None
    tokenizer: Annotated[
        Path | None,
        Option(help="For a bare state dict: folder with tokenizer.json, or with …vocab.json and …merges.txt."),
    ] = None
