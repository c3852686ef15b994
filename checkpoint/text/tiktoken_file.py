"""Reads tiktoken's files of ranks: a line for each token, its bytes in base64 and its rank.

The files contain neither the pattern that splits text nor the special tokens, which are in the program of the model's
tokenizer. For known programs they are in `KNOWN`; no program of a checkpoint is run.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_edge.checkpoint.text.converted import ConvertedTokenizer
from llm_edge.checkpoint.text.ranked_bpe import build_tokenizer
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_bytes, short_repr
from llm_edge.runtime.text import known_patterns as known

_MAX_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class KnownTokenizer:
    """What the program of a tokenizer adds to its file of ranks.

    Attributes:
        pattern: splits text into words.
        special: the special tokens after the ordinary ones, in the order of their ids.
        bos: the one that starts every text, or None.
        ends: those that end an answer.
    """

    pattern: str
    special: tuple[str, ...]
    bos: str | None = None
    ends: tuple[str, ...] = ()


_LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
)
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
_GLM4 = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>"),
    *("<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
META_LLAMA3 = "Llama 3"
"""The name in `KNOWN` of the program of Meta's own releases, whose folders have no tokenizer_config.json."""
KNOWN: Mapping[str, KnownTokenizer] = {
    META_LLAMA3: KnownTokenizer(known.LLAMA3, _LLAMA3, "<|begin_of_text|>", ("<|end_of_text|>", "<|eot_id|>")),
    "ChatGLM4Tokenizer": KnownTokenizer(known.LLAMA3, _GLM4, None, ("<|endoftext|>", "<|user|>", "<|observation|>")),
    "QWenTokenizer": KnownTokenizer(known.QWEN2, _QWEN, None, ("<|endoftext|>", "<|im_end|>")),
}
"""By the `tokenizer_class` of tokenizer_config.json."""
_META_RANKS = 128_000  # of Llama 3


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins with a line of base64 and a rank."""
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 12).split()
        return len(line) == 2 and line[1].isdigit() and base64.b64decode(line[0], validate=True) != b""
    except (OSError, ValueError):
        return False


def read_tiktoken(path: Path, config: Mapping[str, Any]) -> ConvertedTokenizer:
    """Read a file of ranks.

    Args:
        path: the file.
        config: content of tokenizer_config.json, whose `tokenizer_class` says which program it belongs to, and whose
            `added_tokens_decoder` replaces the special tokens known for it.

    Raises:
        CheckpointError: the file is damaged, or the tokenizer is not known.
    """
    ranks = _ranks(read_bytes(path, _MAX_BYTES, error=CheckpointError).split(b"\n"), path)
    name = config.get("tokenizer_class")
    if name is None and len(ranks) == _META_RANKS:
        name = META_LLAMA3
    found = KNOWN.get(name) if isinstance(name, str) else None
    if found is None:
        raise CheckpointError(
            f"{path}: a tiktoken vocabulary does not say how text is split, and the tokenizer class {short_repr(name)} "
            f"is not known (known: {', '.join(sorted(KNOWN))}): give the model's tokenizer.json"
        )
    special = {text: len(ranks) + number for number, text in enumerate(found.special)}
    special = _listed(config.get("added_tokens_decoder"), len(ranks)) or special
    bos = found.bos if found.bos in special else None
    tokenizer = build_tokenizer(ranks, 0, found.pattern, special, bos, str(path))
    ends = tuple(special[text] for text in found.ends if text in special)
    roles = {"eos_token": next((text for text in found.ends if text in special), None), "bos_token": bos}
    return ConvertedTokenizer(tokenizer.to_str(), {role: text for role, text in roles.items() if text}, ends)


def _ranks(lines: Iterable[bytes], path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        parts = line.split()
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (IndexError, binascii.Error, ValueError):
            token, rank = b"", -1
        if not token or token in ranks or rank != len(ranks) or len(parts) != 2:
            raise CheckpointError(f"{path}: line {number} is not a new token in base64 with the next rank")
        ranks[token] = rank
    return ranks


def _listed(entries: Any, first: int) -> dict[str, int]:
    """Return the special tokens of an `added_tokens_decoder` if their ids follow those of the vocabulary."""
    if not isinstance(entries, Mapping):
        return {}
    tokens = sorted(
        (int(index), token.get("content"))
        for index, token in entries.items()
        if str(index).isdecimal() and len(str(index)) < 10 and isinstance(token, Mapping)
    )
    adjacent = [index for index, _ in tokens] == list(range(first, first + len(tokens)))
    names = [text for _, text in tokens if isinstance(text, str) and text]
    return (
        dict(zip(names, range(first, first + len(names)), strict=True))
        if adjacent and len({*names}) == len(tokens)
        else {}
    )
