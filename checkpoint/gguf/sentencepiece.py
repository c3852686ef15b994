"""Converts the SentencePiece BPE vocabulary of a GGUF file to a `tokenizers.Tokenizer`.

SentencePiece (arXiv:1808.06226) repeatedly joins the two adjacent pieces whose union has the highest score, leftmost
first; unknown text falls back to bytes. GGUF stores pieces and scores but no merges, so they are derived: every split
of a piece into two pieces is a merge with the rank of the piece.

Two things follow llama.cpp and the published tokenizer.json files rather than SentencePiece: text after an added
token starts with the prefix space again (if there is one), and no normalization is applied, because the format does
not store it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from llm_edge.checkpoint.gguf.file import GGUFFile

# Token types (`tokenizer.ggml.token_type`); 5 is unused.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
# Ids that llama.cpp uses for these roles if the file does not specify them.
DEFAULT_ROLES: Mapping[str, int] = {"unk_token": 0, "bos_token": 1, "eos_token": 2}

_SPACE = "▁"
_MAX_PIECE = 512  # characters; SentencePiece's default is 16
_MAX_MERGES = 4_000_000  # Llama 2 has 61,249 for 32,000 pieces


def build_tokenizer(gguf: GGUFFile, vocab: dict[str, int], types: Sequence[int]) -> Tokenizer:
    """Build the tokenizer without added tokens and without a post-processor; `vocab` is in ascending order of ids.

    Raises:
        CheckpointError: the scores are invalid, or a setting is not supported.
    """
    if gguf.meta_bool("tokenizer.ggml.remove_extra_whitespaces", default=False):
        gguf.fail("tokenizer.ggml.remove_extra_whitespaces is set, which is not supported")
    if "tokenizer.ggml.precompiled_charsmap" in gguf.metadata:
        gguf.fail("tokenizer.ggml.precompiled_charsmap (text normalization) is set, which is not supported")
    unknown = next((token for token, index in vocab.items() if types[index] == UNKNOWN), None)
    n_bytes = sum(token_type == BYTE for token_type in types)
    if unknown is None and n_bytes < 256:
        gguf.fail("has neither an unknown token nor a token for each byte: convert the model again")
    merges = _merges(gguf, vocab, types)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=n_bytes > 0))
    spaces = normalizers.Replace(" ", _SPACE)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_prefix_space(gguf):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", left=1))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def adds_prefix_space(gguf: GGUFFile) -> bool:
    """Whether encoding prepends a space, which decoding removes."""
    return gguf.meta_bool("tokenizer.ggml.add_space_prefix", default=True)


def _merges(gguf: GGUFFile, vocab: Mapping[str, int], types: Sequence[int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that form a piece, in descending order of the piece's score.

    Ties are resolved by id: SentencePiece numbers pieces by descending score, and some converters write the same
    score for all. The splits of one piece start with the longest prefix, as in transformers.
    """
    scores = _scores(gguf, len(types))
    pieces = {token: index for token, index in vocab.items() if types[index] == NORMAL}
    merges: list[tuple[str, str]] = []
    for piece in sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece])):
        if len(piece) > _MAX_PIECE:
            gguf.fail(f"token {pieces[piece]} has {len(piece)} characters; the limit is {_MAX_PIECE}")
        splits = (at for at in range(len(piece) - 1, 0, -1) if piece[at:] in pieces and piece[:at] in pieces)
        merges.extend((piece[:at], piece[at:]) for at in splits)
        if len(merges) > _MAX_MERGES:
            gguf.fail(f"has a vocabulary with more than {_MAX_MERGES:,} merges, which is not supported")
    return merges


def _scores(gguf: GGUFFile, n_tokens: int) -> list[float]:
    key = "tokenizer.ggml.scores"
    found = gguf.metadata.get(key)
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or len(found) != n_tokens:
        gguf.fail(f"{key} is not an array of {n_tokens} floats, one per token: convert the model again")
    scores: list[float] = found.tolist()
    if not all(map(math.isfinite, scores)):
        gguf.fail(f"{key} has entries that are not finite: convert the model again")
    return scores
