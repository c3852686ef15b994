"""Byte-level BPE vocabularies whose tokens are ranked byte strings, as in tiktoken.

Of all adjacent tokens whose union is a token, the union of the lowest rank is joined first. As a list of merges, each
way to split a token into two has the token's rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from llm_edge.runtime.errors import CheckpointError

MAX_TOKENS = 4_000_000
_MAX_WORK = 1_000_000_000  # bytes of all parts of all tokens; vocabularies of 200,000 tokens have 20,000,000


def build_tokenizer(
    ranks: Mapping[bytes, int], first_id: int, pattern: str, special: Mapping[str, int], bos: str | None, where: str
) -> Tokenizer:
    """Build the tokenizer of a ranked vocabulary.

    Args:
        ranks: tokens with unique ranks.
        first_id: id of the token of rank 0.
        pattern: regular expression that splits text into words.
        special: special tokens and their ids.
        bos: the special token that starts a text, or None.
        where: path of the vocabulary, for messages.

    Raises:
        CheckpointError: tokens of a single byte are missing, or the vocabulary is too large.
    """
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise CheckpointError(f"{where}: has no token for the byte {missing}: the file is damaged, download it again")
    if sum(len(token) ** 2 for token in ranks) > _MAX_WORK or len(ranks) > MAX_TOKENS:
        raise CheckpointError(f"{where}: the tokens are too many or too long: the file is damaged, download it again")
    names = {token: _name(token) for token in sorted(ranks, key=lambda token: ranks[token])}
    # The text of a special token is matched before words are split, so an ordinary token of this text is never used.
    names = {token: name for token, name in names.items() if name not in special}
    vocab = {**special, **{name: first_id + ranks[token] for token, name in names.items()}}
    merges = [
        (names[token[:at]], names[token[at:]])
        for token in names
        for at in sorted(_splits(token, names), key=lambda at: (ranks[token[:at]], ranks[token[at:]]))
    ]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, special[bos])]
        )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token in sorted(special, key=lambda token: special[token])
        ]
    )
    return tokenizer


def _splits(token: bytes, names: Mapping[bytes, str]) -> Sequence[int]:
    return [at for at in range(1, len(token)) if token[:at] in names and token[at:] in names]


def _alphabet() -> list[str]:
    """Return the characters that stand for the 256 bytes in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_ALPHABET = _alphabet()


def _name(token: bytes) -> str:
    return "".join(_ALPHABET[byte] for byte in token)
