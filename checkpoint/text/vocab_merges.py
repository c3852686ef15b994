"""Reads the two files of a byte-level BPE: vocab.json, ids by token, and merges.txt, a pair of tokens in each line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from llm_edge.checkpoint.text.converted import ConvertedTokenizer
from llm_edge.checkpoint.text.pre_tokenizers import PRE_TOKENIZERS
from llm_edge.checkpoint.text.ranked_bpe import MAX_TOKENS
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json, read_text

_MAX_BYTES = 64 * MIB
_PRE_TOKENIZERS = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
_CHANGES = ("add_prefix_space", "add_bos_token", "add_eos_token")


def read_vocab_and_merges(vocab: Path, merges: Path, config: Mapping[str, Any]) -> ConvertedTokenizer | None:
    """Read the files of a tokenizer of GPT-2 or Qwen2.

    Args:
        vocab: the vocabulary.
        merges: the pairs.
        config: content of tokenizer_config.json.

    Returns:
        None if `tokenizer_class` is another one, or a setting adds something to texts.

    Raises:
        CheckpointError: a file is damaged.
    """
    name = _PRE_TOKENIZERS.get(str(config.get("tokenizer_class")).removesuffix("Fast"))
    if name is None or any(config.get(key) for key in _CHANGES):
        return None
    ids = read_json(vocab, _MAX_BYTES, error=CheckpointError)
    if not all(type(index) is int and 0 <= index < MAX_TOKENS for index in ids.values()) or len({*ids.values()}) != len(
        ids
    ):
        raise CheckpointError(f"{vocab}: not a vocabulary: a JSON object from tokens to their own ids is required")
    pre = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(BPE(vocab=ids, merges=[(left, right) for left, right in read_merges(merges, ids)]))
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer()
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return ConvertedTokenizer(tokenizer.to_str())


def read_merges(path: Path, vocabulary: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the pairs of tokens in a merges file; lines that start with `#version` are skipped, as in `tokenizers`.

    Raises:
        CheckpointError: a line does not join two tokens of the vocabulary into a third.
    """
    lines = read_text(path, _MAX_BYTES, error=CheckpointError).split("\n")
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise CheckpointError(
                f"{path}: line {number} does not join two tokens of the vocabulary into a third: {line[:80]!a}"
            )
        yield pair
