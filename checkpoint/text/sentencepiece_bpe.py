"""Converts a SentencePiece BPE vocabulary to a `tokenizers.Tokenizer`.

SentencePiece (arXiv:1808.06226) repeatedly joins the two adjacent pieces whose union has the highest score, leftmost
first; unknown text falls back to bytes. There are no merges, so they are derived: every split of a piece into two
pieces is a merge with the rank of the piece.

Two things follow llama.cpp and the published tokenizer.json files rather than SentencePiece: text after an added
token starts with the prefix space again (if there is one), and no normalization is applied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from llm_edge.runtime.errors import CheckpointError

# Types of pieces (sentencepiece_model.proto, and GGUF's `tokenizer.ggml.token_type`); 5 is unused.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

_SPACE = "▁"
_MAX_PIECE = 512  # characters; SentencePiece's default is 16
_MAX_MERGES = 4_000_000  # Llama 2 has 61,249 for 32,000 pieces


@dataclass(frozen=True, slots=True)
class Pieces:
    """A SentencePiece vocabulary.

    Attributes:
        vocab: ids of the pieces, in ascending order.
        types: type of each piece.
        scores: score of each piece.
        prefix_space: encoding prepends a space, which decoding removes.
        where: path, for messages.
    """

    vocab: Mapping[str, int]
    types: Sequence[int]
    scores: Sequence[float]
    prefix_space: bool
    where: str

    def fail(self, reason: str) -> NoReturn:
        """Raise a `CheckpointError` about this vocabulary."""
        raise CheckpointError(f"{self.where}: {reason}")


def build_tokenizer(pieces: Pieces) -> Tokenizer:
    """Build the tokenizer without added tokens and without a post-processor.

    Raises:
        CheckpointError: the scores are invalid, or the vocabulary cannot encode every text.
    """
    types, vocab = pieces.types, pieces.vocab
    unknown = next((token for token, index in vocab.items() if types[index] == UNKNOWN), None)
    n_bytes = sum(token_type == BYTE for token_type in types)
    if unknown is None and n_bytes < 256:
        pieces.fail("has neither an unknown token nor a token for each byte: convert the model again")
    merges = _merges(pieces)
    tokenizer = Tokenizer(
        BPE(vocab=dict(vocab), merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=n_bytes > 0)
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if pieces.prefix_space:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", left=1))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """Return the pairs of pieces that form a piece, in descending order of the piece's score.

    Ties are resolved by id: SentencePiece numbers pieces by descending score, and some converters write the same
    score for all. The splits of one piece start with the longest prefix, as in transformers.
    """
    scores = pieces.scores
    if not all(map(math.isfinite, scores)):
        pieces.fail("has scores that are not finite: convert the model again")
    normal = {token: index for token, index in pieces.vocab.items() if pieces.types[index] == NORMAL}
    merges: list[tuple[str, str]] = []
    for piece in sorted(normal, key=lambda piece: (-scores[normal[piece]], normal[piece])):
        if len(piece) > _MAX_PIECE:
            pieces.fail(f"token {normal[piece]} has {len(piece)} characters; the limit is {_MAX_PIECE}")
        splits = (at for at in range(len(piece) - 1, 0, -1) if piece[at:] in normal and piece[:at] in normal)
        merges.extend((piece[:at], piece[at:]) for at in splits)
        if len(merges) > _MAX_MERGES:
            pieces.fail(f"has a vocabulary with more than {_MAX_MERGES:,} merges, which is not supported")
    return merges
