"""Reads the SentencePiece BPE vocabulary of a GGUF file, which does not store its normalization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.text import sentencepiece_bpe

# Ids that llama.cpp uses for these roles if the file does not specify them.
DEFAULT_ROLES: Mapping[str, int] = {"unk_token": 0, "bos_token": 1, "eos_token": 2}


def build_tokenizer(gguf: GGUFFile, vocab: dict[str, int], types: Sequence[int]) -> Tokenizer:
    """Build the tokenizer without added tokens and without a post-processor; `vocab` is in ascending order of ids.

    Raises:
        CheckpointError: the scores are invalid, or a setting is not supported.
    """
    if gguf.meta_bool("tokenizer.ggml.remove_extra_whitespaces", default=False):
        gguf.fail("tokenizer.ggml.remove_extra_whitespaces is set, which is not supported")
    if "tokenizer.ggml.precompiled_charsmap" in gguf.metadata:
        gguf.fail("tokenizer.ggml.precompiled_charsmap (text normalization) is set, which is not supported")
    key = "tokenizer.ggml.scores"
    scores = gguf.metadata.get(key)
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) != len(types):
        gguf.fail(f"{key} is not an array of {len(types)} floats, one per token: convert the model again")
    pieces = sentencepiece_bpe.Pieces(vocab, types, scores.tolist(), adds_prefix_space(gguf), str(gguf.path))
    return sentencepiece_bpe.build_tokenizer(pieces)


def adds_prefix_space(gguf: GGUFFile) -> bool:
    """Whether encoding prepends a space, which decoding removes."""
    return gguf.meta_bool("tokenizer.ggml.add_space_prefix", default=True)
