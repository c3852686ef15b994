"""From the SentencePiece BPE vocabulary of a GGUF file to a `tokenizers.Tokenizer`. It knows no roles of tokens.

SentencePiece (arXiv:1808.06226) joins the two neighbours whose piece has the highest score, the leftmost first,
until none is left; what has no piece falls apart into bytes. A GGUF keeps pieces and scores but no merges, so these
are derived: every way to cut a piece into two pieces is a merge, and its rank is that of the piece.

Two things are as in llama.cpp and in the tokenizer.json that these models were published with, but not in
SentencePiece: text behind an added token begins with the prefix space again (where there is one), and the
normalization that a vocabulary was trained with is taken to be none, for the format has no place for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from llm_edge.checkpoint.gguf.reader import GGUFFile
from llm_edge.runtime.errors import CheckpointError

# Kinds of tokens (`tokenizer.ggml.token_type`); 5 is a token that is not used.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
# The ids that llama.cpp takes for these roles where a file does not name them.
ROLES: Mapping[str, int] = {"unk_token": 0, "bos_token": 1, "eos_token": 2}

_SPACE = "▁"
_LONGEST_PIECE = 512  # in characters; SentencePiece's default is 16
_MOST_MERGES = 4_000_000  # the 32,000 pieces of Llama 2 make 61,249


def tokenizer(gguf: GGUFFile, vocab: dict[str, int], kinds: Sequence[int]) -> Tokenizer:
    """The tokenizer without its added tokens and without what it puts around a text.

    Args:
        gguf: the file.
        vocab: token -> id, ids ascending.
        kinds: of each token.

    Raises:
        CheckpointError: scores are missing or no numbers, or something is asked for that cannot be done.
    """
    if gguf.meta_bool("tokenizer.ggml.remove_extra_whitespaces", default=False):
        _fail(gguf, "tokenizer.ggml.remove_extra_whitespaces is set, which is not supported")
    if "tokenizer.ggml.precompiled_charsmap" in gguf.metadata:
        _fail(gguf, "normalizes text before encoding it (tokenizer.ggml.precompiled_charsmap): not supported")
    unknown = next((token for token, index in vocab.items() if kinds[index] == UNKNOWN), None)
    bytes_known = sum(kind == BYTE for kind in kinds)
    if unknown is None and bytes_known < 256:
        _fail(gguf, "has neither a token for what is unknown nor one for each byte: convert the model again")
    model = BPE(
        vocab=vocab,
        merges=_merges(gguf, vocab, kinds),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=bytes_known > 0,
    )
    made = Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_prefix(gguf):
        made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", left=1))
    else:
        made.normalizer = spaces
    made.decoder = decoders.Sequence(steps)
    return made


def adds_prefix(gguf: GGUFFile) -> bool:
    """Whether a text is encoded as if it began with a space, which decoding takes away again."""
    return gguf.meta_bool("tokenizer.ggml.add_space_prefix", default=True)


def _merges(gguf: GGUFFile, vocab: Mapping[str, int], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make up a piece, those of the highest score first.

    Among equals the earlier piece is first: a SentencePiece vocabulary is numbered by falling score, and some
    converters write the same score for all. Of one piece the longest beginning is first, as in transformers.
    """
    scores = _scores(gguf, len(kinds))
    pieces = {token: index for token, index in vocab.items() if kinds[index] == NORMAL}
    merges: list[tuple[str, str]] = []
    for piece in sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece])):
        if len(piece) > _LONGEST_PIECE:
            _fail(gguf, f"token {pieces[piece]} has {len(piece)} characters, more than the {_LONGEST_PIECE} of a piece")
        cuts = (cut for cut in range(len(piece) - 1, 0, -1) if piece[cut:] in pieces and piece[:cut] in pieces)
        merges.extend((piece[:cut], piece[cut:]) for cut in cuts)
        if len(merges) > _MOST_MERGES:
            _fail(gguf, f"has a vocabulary of more than {_MOST_MERGES:,} merges, which no real one has")
    return merges


def _scores(gguf: GGUFFile, n_tokens: int) -> list[float]:
    key = "tokenizer.ggml.scores"
    found = gguf.metadata.get(key)
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or len(found) != n_tokens:
        _fail(gguf, f"{key} is not an array of {n_tokens} numbers, one for each token: convert the model again")
    scores: list[float] = found.tolist()
    if not all(map(math.isfinite, scores)):
        _fail(gguf, f"{key} has entries that are not finite: convert the model again")
    return scores


def _fail(gguf: GGUFFile, reason: str) -> NoReturn:
    raise CheckpointError(f"{gguf.path}: {reason}")
