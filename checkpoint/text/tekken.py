"""Reads tekken.json, the vocabulary of Mistral's models (mistral-common's `Tekkenizer`)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_edge.checkpoint.text.converted import ConvertedTokenizer
from llm_edge.checkpoint.text.ranked_bpe import MAX_TOKENS, build_tokenizer
from llm_edge.model.config_reader import ConfigReader
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json
from llm_edge.runtime.text.pattern_check import check_patterns

_MAX_BYTES = 256 * MIB
# Of files without a list of special tokens (mistral-common's `DEPRECATED_SPECIAL_TOKENS`).
_OLD_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def read_tekken(path: Path) -> ConvertedTokenizer:
    """Read a tekken.json: special tokens have the first ids, ordinary ones follow in the order of their ranks.

    Raises:
        CheckpointError: the file is damaged.
    """
    content = read_json(path, _MAX_BYTES, error=CheckpointError)
    config = ConfigReader(content, str(path)).section("config")
    if config is None:
        raise CheckpointError(f"{path}: config is missing: the file is damaged, download it again")
    size, first_id = config.integer("default_vocab_size"), config.integer("default_num_special_tokens")
    if not 0 <= first_id < size <= MAX_TOKENS:
        config.fail(f"{first_id} special tokens of {size} are not possible")
    pattern = config.text("pattern")
    reason = check_patterns([pattern])
    if reason is not None:
        config.fail(f"pattern: {reason}")
    ranks = _ranks(content.get("vocab"), size - first_id, path)
    special = _special(content.get("special_tokens"), first_id, path)
    roles = {role: text for role, text in _ROLES.items() if text in special}
    tokenizer = build_tokenizer(ranks, first_id, pattern, special, roles.get("bos_token"), str(path))
    ends = (special[_ROLES["eos_token"]],) if "eos_token" in roles else ()
    return ConvertedTokenizer(tokenizer.to_str(), {**roles, "add_bos_token": "bos_token" in roles}, ends)


def _ranks(vocab: Any, count: int, path: Path) -> dict[bytes, int]:
    """Return the first `count` tokens with their ranks."""
    if not isinstance(vocab, list) or len(vocab) < count:
        raise CheckpointError(f"{path}: vocab is not a list of at least {count} tokens")
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(vocab[:count]):
        text = entry.get("token_bytes") if isinstance(entry, Mapping) and entry.get("rank") == rank else None
        try:
            token = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        except (binascii.Error, ValueError):
            token = b""
        if not token or token in ranks:
            raise CheckpointError(f"{path}: token {rank} is not a new byte string in base64 with its rank")
        ranks[token] = rank
    return ranks


def _special(entries: Any, count: int, path: Path) -> dict[str, int]:
    """Return the special tokens with their ids; the rest of `count` are named as in mistral-common."""
    if entries is None:
        entries = [{"rank": rank, "token_str": text} for rank, text in enumerate(_OLD_SPECIAL[:count])]
    valid = isinstance(entries, list) and len(entries) <= count and all(isinstance(each, Mapping) for each in entries)
    found = {each.get("token_str"): each.get("rank") for each in entries} if valid else {}
    if (
        not found
        or list(found.values()) != list(range(len(entries)))
        or not all(isinstance(x, str) and x for x in found)
    ):
        raise CheckpointError(
            f"{path}: special_tokens is not a list of at most {count} tokens in the order of their ranks"
        )
    return {**found, **{f"<SPECIAL_{rank}>": rank for rank in range(len(found), count)}}
